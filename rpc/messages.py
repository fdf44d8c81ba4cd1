"""The structs two processes exchange: the only place with wire names and wire units.

Attributes are named as the rest of the project names things (``size_mib``, ``destroy_more_recent``); the wire's names stand beside
them. The wire counts MiB, rounded down; :func:`mib_from_bytes` and :func:`bytes_from_mib` are the only two conversions.

Reading (:func:`from_wire`) follows the rules old clients rely on: object keys match without regard to case (an exact match wins),
``null`` leaves a field at its default, unknown keys are ignored, except that guests, disks and network cards keep them in ``extra``
and write them back, because other programs own them. Writing (:func:`to_wire`) omits what the table of the wire says to omit when
empty: a field with a plain default is such a field, a field with a default factory of a scalar is always written.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec

from imaging.errors import InvalidArgumentError

MIB_BYTES = 1 << 20
"""The wire's unit of size."""

SIZE_MIB_MAX = (1 << 43) - 1
"""Sizes in bytes stay below 2**63, as ZFS and file offsets want them."""

EXTRA_KEY = "*"
"""Where unknown keys of a guest live between :func:`from_wire` and :func:`to_wire`; never seen on the wire."""

ZERO_TIME = datetime.min.replace(tzinfo=UTC)
"""``0001-01-01T00:00:00Z``: the wire's way to say that something has not happened."""

SizeMib = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=SIZE_MIB_MAX)]
"""Sizes below zero are read, so that the method can refuse them in its own words."""

Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


def mib_from_bytes(size_bytes: int) -> int:
    """Bytes as the wire's MiB, rounded down."""
    return size_bytes // MIB_BYTES


def bytes_from_mib(size_mib: int) -> int:
    """The wire's MiB as bytes."""
    return size_mib * MIB_BYTES


def _none() -> None:
    """Default of a field that is written as ``null``, not omitted."""


def _empty() -> list[Any]:
    """Default of a list that is written as ``[]``, not omitted (msgspec omits the default of the ``list`` factory)."""
    return []


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Base of every struct on the wire."""


class OpenMessage(Message, kw_only=True, omit_defaults=True):
    """Base of structs whose unknown keys belong to other programs: kept in ``extra`` and written back."""

    extra: dict[str, Any] = msgspec.field(default_factory=dict, name=EXTRA_KEY)


# -- what is shown -------------------------------------------------------------------------------------------------------


class Progress(Message, kw_only=True, omit_defaults=True):
    """How far a fetch has come; shown only to callers that asked for images on their way."""

    stage: str = msgspec.field(default_factory=str)
    received_bytes: Number = msgspec.field(default_factory=int)
    expected_bytes: Number = msgspec.field(default_factory=lambda: -1)
    """-1 when the length is unknown."""
    attempt: Number = 0
    message: str = ""
    """Why the last attempt failed."""


class Image(Message, kw_only=True, omit_defaults=True):
    """An image the agent has, or is about to have."""

    id: str = msgspec.field(default_factory=str)
    type: str = msgspec.field(default_factory=str)
    volume: str = ""
    snapshot: str = ""
    size_mib: SizeMib = msgspec.field(default_factory=int, name="size")
    status: str = ""
    digest: str = ""
    """Ours: the digest of what was downloaded."""
    progress: Progress | None = None
    """Ours: only if the request asked for it."""


class Volume(Message, kw_only=True, omit_defaults=True):
    """A volume and the path a guest opens."""

    id: str = msgspec.field(default_factory=str)
    size_mib: SizeMib = msgspec.field(default_factory=int, name="size")
    device: str = msgspec.field(default_factory=str)


class Snapshot(Message, kw_only=True, omit_defaults=True):
    """A snapshot; its size is what was written since the one before."""

    id: str = msgspec.field(default_factory=str)
    size_mib: SizeMib = msgspec.field(default_factory=int, name="size")


class Disk(OpenMessage, kw_only=True, omit_defaults=True):
    """One disk of a guest."""

    bus: str = msgspec.field(default_factory=str)
    device: str = msgspec.field(default_factory=str)
    size_mib: SizeMib = msgspec.field(default_factory=int, name="size")
    volume: str = msgspec.field(default_factory=str)
    image: str = msgspec.field(default_factory=str)
    source: str = msgspec.field(default_factory=str)
    thin: bool = False
    """Ours: take space only as it is written to, and promise none."""


class Nic(OpenMessage, kw_only=True, omit_defaults=True):
    """One network card of a guest."""

    name: str = ""
    network: str = msgspec.field(default_factory=str)
    model: str = msgspec.field(default_factory=str)
    mac: str = ""
    address: str = msgspec.field(default_factory=str)
    netmask: str = msgspec.field(default_factory=str)
    gateway: str = msgspec.field(default_factory=str)
    device: str = ""
    vlans: list[Number] | None = msgspec.field(default_factory=_none)


class Guest(OpenMessage, kw_only=True, omit_defaults=True):
    """A guest, as far as its disks concern us; the rest passes through."""

    id: str = msgspec.field(default_factory=str)
    type: str = ""
    image: str = ""
    nics: list[Nic] = []
    disks: list[Disk] = []
    state: str = ""
    memory: Number = 0
    cpu: Number = 0
    vnc: Number = 0
    metadata: dict[str, Any] = {}


# -- requests ------------------------------------------------------------------------------------------------------------


class ImageRequest(Message, kw_only=True, omit_defaults=True):
    """Asks for an image, or for all of them."""

    id: str = msgspec.field(default_factory=str)
    type: str = msgspec.field(default_factory=str)
    dest: str = msgspec.field(default_factory=str)
    source: str = msgspec.field(default_factory=str)
    digest: str = ""
    """Ours: what the download must be (``sha256:<hex>``)."""
    wait: bool = True
    """Ours: false answers at once, with the status and progress of the fetch."""
    pending: bool = False
    """Ours: true also shows images that are on their way."""


class VolumeRequest(Message, kw_only=True, omit_defaults=True):
    """Names a dataset; with a size when one is created."""

    id: str = msgspec.field(default_factory=str)
    size_mib: SizeMib = msgspec.field(default_factory=int, name="size")


class SnapshotRequest(Message, kw_only=True, omit_defaults=True):
    """Names a snapshot, or the dataset to snapshot and the new snapshot's name."""

    id: str = msgspec.field(default_factory=str)
    dest: str = msgspec.field(default_factory=str)
    recursive: bool = msgspec.field(default_factory=bool)
    destroy_more_recent: bool = msgspec.field(default_factory=bool, name="destroyMoreRecent")
    defer: bool = False
    """Ours: true deletes a snapshot that is needed (by clones, holds, a running download) as soon as nothing needs it."""


class DownloadRequest(Message, kw_only=True, omit_defaults=True):
    """Names a snapshot to be downloaded; all but ``id`` is ours."""

    id: str = msgspec.field(default_factory=str)
    base: str = msgspec.field(default="", name="from")
    """What an increment builds on: a snapshot (``@s``, or an id) or a bookmark (``#b``) of the same dataset, or the origin of a clone."""
    compressed: bool = False
    large_blocks: bool = False
    embedded: bool = False
    raw: bool = False
    properties: bool = False
    resume_token: str = ""
    """Of a receiver that has the beginning: send the rest."""


class GuestRequest(Message, kw_only=True, omit_defaults=True):
    """A guest and what a chain of agents wants done with it."""

    guest: Guest = msgspec.field(default_factory=Guest)
    action: str = msgspec.field(default_factory=str)
    args: dict[str, Any] | None = msgspec.field(default_factory=_none)


# -- answers -------------------------------------------------------------------------------------------------------------


class ImagesAnswer(Message, kw_only=True, omit_defaults=True):
    """Images, under their key."""

    images: list[Image] = msgspec.field(default_factory=_empty)


class VolumesAnswer(Message, kw_only=True, omit_defaults=True):
    """Volumes, under their key."""

    volumes: list[Volume] = msgspec.field(default_factory=_empty)


class SnapshotsAnswer(Message, kw_only=True, omit_defaults=True):
    """Snapshots, under their key."""

    snapshots: list[Snapshot] = msgspec.field(default_factory=_empty)


class GuestResponse(Message, kw_only=True, omit_defaults=True):
    """A guest, and what the next agent in the chain should know."""

    guest: Guest = msgspec.field(default_factory=Guest)
    message: str = ""
    retry: Number = 0


# -- the image service ---------------------------------------------------------------------------------------------------


class ImageRecord(Message, kw_only=True, omit_defaults=True):
    """An image of the image service. Sizes are bytes here; the first nine fields are always written."""

    id: str = msgspec.field(default_factory=str)
    source: str = msgspec.field(default_factory=str)
    type: str = msgspec.field(default_factory=str)
    comment: str = msgspec.field(default_factory=str)
    status: str = msgspec.field(default_factory=str)
    size_bytes: Number = msgspec.field(default_factory=int, name="size")
    expected_size_bytes: Number = msgspec.field(default_factory=int, name="expected_size")
    """-1 when the length is unknown."""
    download_start: datetime = msgspec.field(default_factory=lambda: ZERO_TIME)
    download_end: datetime = msgspec.field(default_factory=lambda: ZERO_TIME)
    digest: str = ""
    format: str = ""
    """What the bytes are without their compression: ``zvol`` and ``zfs`` (send streams), ``raw``, ``qcow2``, ``tar``."""
    compression: str = ""
    """``none``, ``gzip``, ``xz``, ``zstd``, ``bzip2`` or ``lz4``; empty if not known."""
    virtual_size_bytes: Number = msgspec.field(default=0, name="virtual_size")
    """Size of the disk a guest sees; 0 if there is none."""
    content_digest: str = ""
    """Of the disk itself, or of the unpacked bytes where there is none: equal for every encoding of one image."""
    unpacked_digest: str = ""
    """sha256 of the bytes without their compression."""
    unpacked_sha512: str = ""
    unpacked_size_bytes: Number = msgspec.field(default=0, name="unpacked_size")
    same_as: list[str] = []
    """Ids of other images with the same content."""
    name: str = ""
    version: str = ""
    origin: str = ""
    """Where it comes from, in the words of whoever brought it."""
    error: str = ""
    """Why the image is in status ``error``."""
    labels: dict[str, str] = {}


class FetchRequest(Message, kw_only=True, omit_defaults=True):
    """Asks the image service to fetch an image from a source."""

    source: str = msgspec.field(default_factory=str)
    type: str = msgspec.field(default_factory=str)
    comment: str = msgspec.field(default_factory=str)
    digest: str = ""
    """Ours: what the download must be."""
    length_bytes: Number = msgspec.field(default=-1, name="length")
    """Ours: the length it must have; -1 if that does not matter. (``size`` is the record's, and ignored.)"""
    format: str = ""
    """Ours: the format it must have."""
    name: str = ""
    version: str = ""
    origin: str = ""
    labels: dict[str, str] = {}


# -- reading and writing -------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=Message)


def from_wire(kind: type[M], value: Any) -> M:
    """The struct a decoded JSON value stands for; ``null`` gives the defaults. InvalidArgumentError names the field that is wrong."""
    try:
        return msgspec.convert({} if value is None else _fold(kind, value), kind)
    except msgspec.ValidationError as err:
        raise InvalidArgumentError(f"invalid argument: {_explain(err)}") from err


def to_wire(message: Any) -> Any:
    """What the JSON encoder is to write for a message: the message itself, or plain data where keys of others are mixed in.

    What is no message passes as it is.
    """
    kind = type(message)
    if not issubclass(kind, Message):
        return message
    return _unfold(kind, msgspec.to_builtins(message)) if _has_extra(kind) else message


def _explain(err: msgspec.ValidationError) -> str:
    text, _, path = str(err).replace("`", "").partition(" - at ")
    field = path.strip().removeprefix("$").lstrip(".")
    return f"{field}: {text[:1].lower()}{text[1:]}" if field else f"{text[:1].lower()}{text[1:]}"


class _Shape:
    """How the keys of one struct are read."""

    def __init__(self, kind: type[Message]) -> None:
        fields = msgspec.structs.fields(kind)
        hints = typing.get_type_hints(kind)
        self.names = frozenset(field.encode_name for field in fields) - {EXTRA_KEY}
        self.by_folded = {name.casefold(): name for name in self.names}
        self.is_open = issubclass(kind, OpenMessage)
        self.nested = {f.encode_name: found for f in fields if (found := _message_in(hints[f.name])) is not None}


@functools.cache
def _shape(kind: type[Message]) -> _Shape:
    return _Shape(kind)


def _message_in(hint: Any) -> type[Message] | None:
    """The struct in ``S``, ``list[S]`` or ``S | None``."""
    if inspect.isclass(hint) and issubclass(hint, Message):
        return hint
    found = (_message_in(part) for part in typing.get_args(hint))
    return next((kind for kind in found if kind is not None), None)


@functools.cache
def _has_extra(kind: type[Message]) -> bool:
    return issubclass(kind, OpenMessage) or any(_has_extra(nested) for nested in _shape(kind).nested.values())


def _fold(kind: type[Message], value: Any) -> Any:
    """Give every key the spelling of the struct, drop nulls, put unknown keys of open structs aside."""
    if not isinstance(value, Mapping):
        return value  # convert() says what is wrong with it
    shape = _shape(kind)
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, item in value.items():
        name = key if key in shape.names else shape.by_folded.get(key.casefold())
        if name is None:
            extra[key] = item
        elif item is not None and (name == key or name not in value):
            known[name] = _fold_nested(shape, name, item)
    if shape.is_open and extra:
        known[EXTRA_KEY] = extra
    return known


def _fold_nested(shape: _Shape, name: str, item: Any) -> Any:
    kind = shape.nested.get(name)
    if kind is None:
        return item
    if isinstance(item, list):
        return [_fold(kind, {} if one is None else one) for one in item]
    return _fold(kind, item)


def _unfold(kind: type[Message], wire: dict[str, Any]) -> dict[str, Any]:
    """Mix ``extra`` back in, at every depth a struct can have it; the struct's own fields win."""
    for name, nested in _shape(kind).nested.items():
        item = wire.get(name)
        if isinstance(item, list):
            wire[name] = [_unfold(nested, one) for one in item]
        elif item is not None:
            wire[name] = _unfold(nested, item)
    extra = wire.pop(EXTRA_KEY, None) if issubclass(kind, OpenMessage) else None
    return {**extra, **wire} if extra else wire
