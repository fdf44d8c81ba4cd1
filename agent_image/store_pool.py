"""The pool as the store sees it: ids of requests turned into names once, hidden datasets hidden, driver calls off the loop."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo, StorageDriver
from agent_image.store_locks import SubtreeLocks
from imaging.errors import (
    InvalidArgumentError,
    InvalidNameError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from imaging.names import DatasetName, SnapshotName, parse_wire_name
from imaging.threads import Offload

P = ParamSpec("P")
T = TypeVar("T")
N = TypeVar("N", DatasetName, SnapshotName)

IMAGES = "images"
GUESTS = "guests"

_INCOMING = ".incoming-"
_DELETED = ".deleted-"
_HIDDEN = re.compile(r"\.(incoming|deleted)-")

Observer = Callable[[str, float], None]
"""Told of each call: the operation and how many seconds it took, waiting for a thread included."""


def _observe_nothing(_operation: str, _duration_s: float) -> None:
    """Nobody counts."""


TURN_LOOK_S = 2.0
"""How often a change that waits for a thread looks whether there is any hope."""
DEVICE_TIMEOUT_S = 10.0
"""What one volume's device may take to appear: under a second as a rule, more when hundreds are made at once."""
LIST_DEVICES_TIMEOUT_S = 2.0
"""The same for all volumes of a list together: an old volume has its device or never will (``volmode=none``)."""

NOT_A_DATASET = "not a valid dataset"
"""What old clients are told about a name that breaks the rules."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume (or, where a dataset of any kind is shown, a filesystem with size 0 and no device).

    In lists the device is empty while there is none.
    """

    name: DatasetName
    size_bytes: int
    device: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot; ``written_bytes`` is what was written since the one before."""

    name: SnapshotName
    written_bytes: int


def _itself(info: DatasetInfo | SnapshotInfo) -> DatasetInfo | SnapshotInfo:
    return info


class Pool:
    """One pool behind a driver.

    Ids in requests are relative to the pool. A full name is accepted too: if the relative reading does not exist and the first
    component is our pool, it is the pool. Datasets of our own (an image that is arriving, one that is deleted but still has clones)
    do not exist for callers.
    """

    def __init__(
        self, driver: StorageDriver, changes: Offload, answers: Offload, *, observe: Observer = _observe_nothing
    ) -> None:
        """``changes`` are the threads of calls that may wait for disks or devices, ``answers`` those of calls that only look."""
        self.driver = driver
        self._observe = observe
        self.locks = SubtreeLocks()
        self._changes = changes
        self._turns = asyncio.Semaphore(changes.threads_max)
        self._answers = answers
        self.root = driver.pool.root
        self.images = self.root / IMAGES
        self.guests = self.root / GUESTS
        self._without_device: set[int] = set()
        """Guids of volumes the last list waited for in vain."""

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call that may change something on a thread; UnavailableError if there is none and no hope of one."""
        async with self._turn():
            return await self._observed(self._changes, function, *args, **kwargs)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of the threads for changes. They may all hang as long as the pool's disks are away, which the pool says when asked."""
        while not await self._got_turn():
            await self.look(self.driver.usage, self.root)
        try:
            yield
        finally:
            self._turns.release()

    async def _got_turn(self) -> bool:
        try:
            async with asyncio.timeout(TURN_LOOK_S):
                return await self._turns.acquire()
        except TimeoutError:
            return False

    async def look(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that only looks, on threads no change can keep: one hangs as long as the pool's disks are away."""
        return await self._observed(self._answers, function, *args, **kwargs)

    async def _observed(self, offload: Offload, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        started_s = time.perf_counter()
        try:
            return await offload(function, *args, **kwargs)
        finally:
            self._observe(function.__name__.lstrip("_"), time.perf_counter() - started_s)

    async def open(self) -> None:
        """Make the two datasets everything lives below."""
        for name in (self.images, self.guests):
            await self.run(self._ensure_filesystem, name)

    def _ensure_filesystem(self, name: DatasetName) -> None:
        try:
            self.driver.get(name)
        except NotFoundError:
            self.driver.create_filesystem(name)

    # -- names -------------------------------------------------------------------------------------------------------

    def incoming(self, image_id: str) -> DatasetName:
        """Where an image is received."""
        return self.images / f"{_INCOMING}{image_id}"

    def tombstone(self, image_id: str, token: str) -> DatasetName:
        """Where a deleted image waits for its last clone to go."""
        return self.images / f"{_DELETED}{image_id}-{token}"

    def is_incoming(self, name: DatasetName) -> bool:
        """Whether an image is received there."""
        return name.parent == self.images and name.leaf.startswith(_INCOMING)

    def incoming_id(self, name: DatasetName) -> str:
        """Which image is received there."""
        return name.leaf.removeprefix(_INCOMING)

    def is_tombstone(self, name: DatasetName) -> bool:
        """Whether a deleted image waits there."""
        return name.parent == self.images and name.leaf.startswith(_DELETED)

    def is_hidden(self, name: DatasetName) -> bool:
        """Whether callers must not see it."""
        return name.is_within(self.images) and len(name.parts) > 2 and _HIDDEN.match(name.parts[2]) is not None

    def check_destroyable(self, name: DatasetName) -> None:
        """NotPermittedError for the datasets that make the pool ours."""
        if name in {self.root, self.images, self.guests}:
            raise NotPermittedError(f"{name} is part of the layout of the pool and can't be deleted")

    async def resolve(self, wire_id: str) -> DatasetName | SnapshotName:
        """The name an id of a request means, whether or not anything is there; InvalidNameError."""
        try:
            relative = parse_wire_name(self.driver.pool, wire_id)
        except InvalidNameError:
            relative = None  # a full name may fit where pool + full name is too long
        if not self._starts_with_pool(wire_id):
            return relative if relative is not None else parse_wire_name(self.driver.pool, wire_id)
        if relative is not None and await self.exists(relative):
            return relative
        return self.parse_full(wire_id)

    def _starts_with_pool(self, wire_id: str) -> bool:
        return re.split(r"[/@]", wire_id, maxsplit=1)[0] == str(self.driver.pool)

    def parse_full(self, text: str) -> DatasetName | SnapshotName:
        """A full name, pool first; InvalidNameError if it is malformed or of another pool."""
        if not self._starts_with_pool(text):
            err = InvalidNameError(NOT_A_DATASET)
            err.add_note(f"not in pool {self.driver.pool}")
            raise err
        return SnapshotName.parse(text) if "@" in text else DatasetName.parse(text)

    async def resolve_new(self, wire_id: str) -> DatasetName:
        """The name of a dataset to make; InvalidNameError also for snapshots and for names we keep for ourselves."""
        return self._check_new(await self.resolve(wire_id))

    def parse_new(self, text: str) -> DatasetName:
        """The same, from a full name."""
        return self._check_new(self.parse_full(text))

    def _check_new(self, name: DatasetName | SnapshotName) -> DatasetName:
        if isinstance(name, SnapshotName) or self.is_hidden(name):
            raise InvalidNameError(NOT_A_DATASET)
        return name

    # -- looking -----------------------------------------------------------------------------------------------------

    async def exists(self, name: DatasetName | SnapshotName) -> bool:
        """Whether a dataset or snapshot is there, for callers."""
        try:
            await (self.get_snapshot(name) if isinstance(name, SnapshotName) else self.get(name))
        except NotFoundError:
            return False
        return True

    async def get(self, name: DatasetName) -> DatasetInfo:
        """The dataset; NotFoundError with the words old clients know."""
        if self.is_hidden(name):
            raise NotFoundError("not found")
        return await self._known(self.driver.get, name)

    async def get_snapshot(self, name: SnapshotName) -> SnapshotInfo:
        """The snapshot; NotFoundError with the words old clients know."""
        if self.is_hidden(name.dataset):
            raise NotFoundError("not found")
        return await self._known(self.driver.get_snapshot, name)

    async def _known(self, function: Callable[[N], T], name: N) -> T:
        try:
            return await self.look(function, name)
        except NotFoundError as err:
            raise NotFoundError("not found") from err

    async def find(self, wire_id: str) -> DatasetInfo | SnapshotInfo:
        """What an id of a request names; InvalidNameError, NotFoundError, and for no id ``need an id``."""
        return await self.find_and(_itself, wire_id)

    async def find_and(self, then: Callable[[DatasetInfo | SnapshotInfo], T], wire_id: str) -> T:
        """What ``then`` makes of that, on the same thread: the ways to a thread are most of what a short answer costs."""
        if not wire_id:
            raise InvalidArgumentError("need an id")
        return await self.look(self._find_and, then, await self.resolve(wire_id))

    def _find_and(self, then: Callable[[DatasetInfo | SnapshotInfo], T], name: DatasetName | SnapshotName) -> T:
        if self.is_hidden(name.dataset if isinstance(name, SnapshotName) else name):
            raise NotFoundError("not found")
        try:
            info = self.driver.get_snapshot(name) if isinstance(name, SnapshotName) else self.driver.get(name)
        except NotFoundError as err:
            raise NotFoundError("not found") from err
        return then(info)

    # -- showing -----------------------------------------------------------------------------------------------------

    def show(self, info: DatasetInfo, *, timeout_s: float = DEVICE_TIMEOUT_S) -> Volume:
        """Blocking: a dataset as callers see it; UnavailableError if its device does not appear."""
        if info.kind is not DatasetKind.VOLUME:
            return Volume(info.name, 0, "")
        return Volume(info.name, info.volsize_bytes or 0, str(self.driver.device(info.name, timeout_s=timeout_s)))

    def show_as_is(self, info: DatasetInfo, *, timeout_s: float = LIST_DEVICES_TIMEOUT_S) -> Volume:
        """Blocking: the same for callers who can do without the device: empty if it does not appear.

        That of an image is not waited for: hardly anybody opens it, and without ZFS all of the image may have to be copied first.
        """
        try:
            return self.show(info, timeout_s=0.0 if info.name.parent == self.images else timeout_s)
        except UnavailableError:
            return Volume(info.name, info.volsize_bytes or 0, "")

    def show_listed(self, infos: Iterable[DatasetInfo]) -> list[Volume]:
        """Blocking: datasets as callers see them in a list; one without a device keeps neither the others nor the next list waiting."""
        shown, without, deadline = [], set(), time.monotonic() + LIST_DEVICES_TIMEOUT_S
        for info in infos:
            patience_s = 0.0 if info.guid in self._without_device else max(0.0, deadline - time.monotonic())
            try:
                volume = self.show_as_is(info, timeout_s=patience_s)
            except NotFoundError:
                continue  # destroyed since it was listed
            shown.append(volume)
            if not volume.device:
                without.add(info.guid)
        self._without_device = without
        return shown

    def show_snapshots(self, names: Sequence[SnapshotName]) -> list[Snapshot]:
        """Blocking: snapshots as callers see them; those that are gone meanwhile are left out."""
        written = self.driver.written(names)
        return [Snapshot(name, written[name]) for name in names if name in written]
