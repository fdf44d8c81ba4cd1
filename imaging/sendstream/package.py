"""What surrounds streams: packages (``-p``, ``-R``, ``-I``) and the choice of one volume in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imaging.errors import BadDataError, InvalidArgumentError
from imaging.sendstream import nvlist
from imaging.sendstream.reader import Frame
from imaging.sendstream.records import (
    MAGIC,
    Begin,
    HeaderType,
    RecordType,
    StreamKind,
)
from imaging.sendstream.rules import check_begin
from imaging.sendstream.writer import StreamWriter, package_end


@dataclass(frozen=True, slots=True)
class PackagedDataset:
    """What a package's header says of one dataset."""

    name: str
    origin_guid: int = 0
    properties: Mapping[str, nvlist.Value] = field(default_factory=dict)
    snapshots: Mapping[str, nvlist.Value] = field(default_factory=dict)
    """Name and guid."""


def packaged_datasets(payload: bytes | memoryview) -> list[PackagedDataset]:
    """The datasets a package's header lists; none if it has no list (``-I`` alone)."""
    if not len(payload):
        return []
    listed = nvlist.decode(payload).get("fss", {})
    if not isinstance(listed, dict):
        raise BadDataError("the package's list of datasets is malformed")
    return [_dataset(entry) for entry in listed.values()]


def _dataset(entry: nvlist.Value) -> PackagedDataset:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise BadDataError("the package lists a dataset without a name")
    name, origin = str(entry["name"]), entry.get("origin", 0)
    properties, snapshots = entry.get("props", {}), entry.get("snaps", {})
    if not isinstance(properties, dict) or not isinstance(snapshots, dict) or not isinstance(origin, int):
        raise BadDataError(f"the package's entry for {name[:256]!r} is malformed")
    return PackagedDataset(name, origin, properties, snapshots)


def resume_position(payload: bytes | memoryview) -> tuple[int, int]:
    """Object and offset a resuming stream starts from, from its BEGIN payload."""
    values = nvlist.decode(payload)
    number, offset = values.get("resume_object"), values.get("resume_offset")
    if not isinstance(number, int) or not isinstance(offset, int):
        raise BadDataError("the resuming stream does not say where it goes on [rule resume]")
    return number, offset


class StreamSet:
    """Follows the streams of a package (or the one plain stream) and says which frames belong to the chosen volume.

    Without a chosen ``dataset`` the only volume is taken; a second one is refused. Filesystems are passed over.
    """

    def __init__(self, dataset: str | None = None) -> None:
        self._wanted = dataset
        self._in_package = False
        self._chosen: str | None = dataset
        self._passing: str | None = None  # dataset of the stream being passed over
        self._inside = False
        self.datasets: list[PackagedDataset] = []

    @property
    def in_package(self) -> bool:
        """Whether a package's header was seen."""
        return self._in_package

    def take(self, frame: Frame) -> bool:
        """True if this frame is not of the chosen volume: the package's own, or of a stream that is passed over."""
        if frame.type == RecordType.BEGIN:
            record = frame.record()
            assert isinstance(record, Begin)
            return self._begin(record, frame)
        if not self._inside:
            return True
        passing = self._passing is not None
        if frame.type == RecordType.END:
            self._inside, self._passing = False, None
        return passing

    def _begin(self, begin: Begin, frame: Frame) -> bool:
        if begin.header_type == HeaderType.PACKAGE:
            self._in_package = True
            self.datasets = packaged_datasets(frame.payload)
            return True
        self._inside, self._passing = True, None
        if not self._in_package:
            return False
        check_begin(begin)
        if begin.kind == StreamKind.VOLUME and self._chosen is None:
            self._chosen = begin.dataset
        if begin.kind == StreamKind.VOLUME and begin.dataset != self._chosen and self._wanted is None:
            raise InvalidArgumentError(
                f"the package holds several volumes, choose one: {self._chosen!r}, {begin.dataset!r}"
            )
        if begin.dataset != self._chosen:
            self._passing = begin.dataset
        return self._passing is not None


def package_head(toname: str, dataset_key: int, dataset: PackagedDataset, *, fromsnap: str | None = None) -> bytes:
    """A package's start for one volume, as ``zfs send -p`` makes it: header, list of datasets, and the header's END.

    ``dataset_key`` is any number that no other dataset of the package has. Number and index properties must be ``int``: kernels
    abort on strings there, after all data was received.
    """
    values: nvlist.NvList = {"tosnap": toname.partition("@")[2]}
    if fromsnap is not None:
        values["fromsnap"] = fromsnap
    values["not_recursive"] = True
    snapshots = dict(dataset.snapshots)
    entry: nvlist.NvList = {"name": dataset.name, "parentfromsnap": 0}
    if dataset.origin_guid:
        entry["origin"] = dataset.origin_guid
    entry["props"] = dict(dataset.properties)
    entry["snaps"] = snapshots
    entry["snapprops"] = {name: {} for name in snapshots}
    values["fss"] = {f"{dataset_key:#x}": entry}
    writer = StreamWriter()
    name = toname.encode()
    begin = Begin(0, MAGIC, HeaderType.PACKAGE, 0, StreamKind.PACKAGE, 0, 0, 0, name)
    return writer.begin(begin, nvlist.encode_xdr(values)) + writer.package_head_end()


__all__ = [
    "PackagedDataset",
    "StreamSet",
    "package_end",
    "package_head",
    "packaged_datasets",
    "resume_position",
]
