"""The agent's methods by name: one table for the server that offers them and the clients that call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rpc.messages import (
    GuestRequest,
    GuestResponse,
    ImageRequest,
    ImagesAnswer,
    Message,
    SnapshotRequest,
    SnapshotsAnswer,
    VolumeRequest,
    VolumesAnswer,
)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

PULL_TIMEOUT_S = 3600.0
"""RequestImage answers when the image is there: 100 GB over 1 Gbit/s take a quarter of an hour."""


@dataclass(frozen=True, slots=True)
class AgentMethod(Generic[Q, A]):
    """One method: its name, what it takes and gives, its other spellings, and how long a caller waits if not as usual."""

    name: str
    request: type[Q]
    answer: type[A]
    aliases: tuple[str, ...] = ()
    timeout_s: float | None = None


LIST_IMAGES = AgentMethod("ImageStore.ListImages", ImageRequest, ImagesAnswer)
GET_IMAGE = AgentMethod("ImageStore.GetImage", ImageRequest, ImagesAnswer)
REQUEST_IMAGE = AgentMethod("ImageStore.RequestImage", ImageRequest, ImagesAnswer, timeout_s=PULL_TIMEOUT_S)
DELETE_IMAGE = AgentMethod("ImageStore.DeleteImage", ImageRequest, ImagesAnswer)
CLONE_IMAGE = AgentMethod("ImageStore.CloneImage", ImageRequest, VolumesAnswer)
LIST_VOLUMES = AgentMethod("ImageStore.ListVolumes", VolumeRequest, VolumesAnswer)
CREATE_VOLUME = AgentMethod("ImageStore.CreateVolume", VolumeRequest, VolumesAnswer)
GET_VOLUME = AgentMethod("ImageStore.GetVolume", VolumeRequest, VolumesAnswer)
DELETE_DATASET = AgentMethod("ImageStore.DeleteDataset", VolumeRequest, VolumesAnswer)
LIST_SNAPSHOTS = AgentMethod("ImageStore.ListSnapshots", SnapshotRequest, SnapshotsAnswer, ("ImageStore.ListSnapshot",))
GET_SNAPSHOT = AgentMethod("ImageStore.GetSnapshot", SnapshotRequest, SnapshotsAnswer)
CREATE_SNAPSHOT = AgentMethod("ImageStore.CreateSnapshot", SnapshotRequest, SnapshotsAnswer)
DELETE_SNAPSHOT = AgentMethod("ImageStore.DeleteSnapshot", SnapshotRequest, SnapshotsAnswer)
ROLLBACK_SNAPSHOT = AgentMethod("ImageStore.RollbackSnapshot", SnapshotRequest, SnapshotsAnswer)
VERIFY_DISKS = AgentMethod("ImageStore.VerifyDisks", GuestRequest, GuestResponse)
CREATE_GUEST_DISKS = AgentMethod("ImageStore.CreateGuestDisks", GuestRequest, GuestResponse)
DELETE_GUESTS_DISKS = AgentMethod(
    "ImageStore.DeleteGuestsDisks", GuestRequest, GuestResponse, ("ImageStore.DeleteGuestDisks",)
)

AGENT_METHODS: tuple[AgentMethod[Any, Any], ...] = (
    LIST_IMAGES,
    GET_IMAGE,
    REQUEST_IMAGE,
    DELETE_IMAGE,
    CLONE_IMAGE,
    LIST_VOLUMES,
    CREATE_VOLUME,
    GET_VOLUME,
    DELETE_DATASET,
    LIST_SNAPSHOTS,
    GET_SNAPSHOT,
    CREATE_SNAPSHOT,
    DELETE_SNAPSHOT,
    ROLLBACK_SNAPSHOT,
    VERIFY_DISKS,
    CREATE_GUEST_DISKS,
    DELETE_GUESTS_DISKS,
)
