"""Looking at the pool: one dataset by channel program, everything by ``zfs list``.

Per object ``zfs list`` is cheaper than a channel program that reads the same (5 ms against 13 ms, emulated); for one dataset it is the
other way round, as starting the program costs more than the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.zfs import programs
from agent_image.drivers.zfs.command import LIST_TIMEOUT_S, run_zfs
from agent_image.drivers.zfs.errors import Operation
from agent_image.drivers.zfs.hidden import without_mark
from agent_image.drivers.zfs.lzc import Lzc
from imaging.errors import InvalidNameError
from imaging.names import DatasetName, SnapshotName

COLUMNS = ("name", "type", "guid", "createtxg", "creation", "origin", "volsize", "volblocksize")
PROGRAM_NAMES_MAX = 256
"""Datasets a channel program looks at in one run: it holds the pool's configuration lock meanwhile."""
ABSENT = "-"

T = TypeVar("T", DatasetName, SnapshotName)

log = logging.getLogger(__name__)


def find_dataset(lzc: Lzc, name: DatasetName) -> DatasetInfo | None:
    """The dataset as it is now, with the driver's own mark among its properties."""
    entry = lzc.program(programs.DESCRIBE, [str(name)]).get(str(name).encode())
    return None if entry is None else programs.dataset_of(name, entry)


def find_snapshot(lzc: Lzc, name: SnapshotName) -> SnapshotInfo | None:
    """The snapshot as it is now."""
    entry = lzc.program(programs.DESCRIBE, [str(name)]).get(str(name).encode())
    return None if entry is None else programs.snapshot_of(name, entry)


def snapshots(lzc: Lzc, name: DatasetName) -> list[SnapshotInfo]:
    """The snapshots of one dataset as they are now."""
    answer = lzc.program(programs.SNAPSHOTS, [str(name)])
    found = ((_parse(SnapshotName, key.decode("utf-8", "replace")), entry) for key, entry in answer.items())
    return [programs.snapshot_of(snapshot, entry) for snapshot, entry in found if snapshot is not None]


def visible(info: DatasetInfo) -> DatasetInfo:
    """The dataset as callers see it."""
    return replace(info, properties=without_mark(dict(info.properties)))


def everything(lzc: Lzc, root: DatasetName) -> tuple[list[DatasetInfo], list[SnapshotInfo]]:
    """All datasets and snapshots whose names are of our grammar; others are not ours and left out."""
    arguments = ["list", "-Hp", "-r", "-t", "filesystem,volume,snapshot", "-o", ",".join(COLUMNS), "--", str(root)]
    output = run_zfs(arguments, operation=Operation.READ, subject=str(root), timeout_s=LIST_TIMEOUT_S)
    datasets: list[DatasetInfo] = []
    found_snapshots: list[SnapshotInfo] = []
    for line in output.splitlines():
        info = parse_line(line)
        if isinstance(info, DatasetInfo):
            datasets.append(info)
        elif info is not None:
            found_snapshots.append(info)
    properties = read_properties(lzc, [info.name for info in datasets])
    return [replace(info, properties=properties.get(info.name, {})) for info in datasets], found_snapshots


def read_properties(lzc: Lzc, names: Sequence[DatasetName]) -> dict[DatasetName, Mapping[str, str]]:
    """User properties and readonly of many datasets; those that are gone are missing."""
    found: dict[DatasetName, Mapping[str, str]] = {}
    for batch in _batches(names):
        answer = lzc.program(programs.PROPERTIES, [str(name) for name in batch])
        for name in batch:
            entry = answer.get(str(name).encode())
            if entry is not None:
                found[name] = programs.properties_of(entry)
    return found


def read_written(lzc: Lzc, names: Sequence[SnapshotName]) -> dict[SnapshotName, int]:
    """What was written before each snapshot; those that are gone are missing."""
    found: dict[SnapshotName, int] = {}
    for batch in _batches(names):
        answer = lzc.program(programs.WRITTEN, [str(name) for name in batch])
        for name in batch:
            entry = answer.get(str(name).encode())
            if entry is not None:
                found[name] = programs.written_of(name, entry)
    return found


def _batches(names: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(names), PROGRAM_NAMES_MAX):
        yield names[start : start + PROGRAM_NAMES_MAX]


def parse_line(line: str) -> DatasetInfo | SnapshotInfo | None:
    """One line of ``zfs list``; None for what is not of our grammar."""
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        log.warning("zfs_list_line_ignored", extra={"fields": len(fields)})
        return None
    name, kind, guid, createtxg, creation, origin, volsize, volblocksize = fields
    if kind == "snapshot":
        snapshot = _parse(SnapshotName, name)
        if snapshot is None:
            return None
        return SnapshotInfo(snapshot, int(guid), int(createtxg), int(creation), _size(volsize))
    dataset = _parse(DatasetName, name)
    if dataset is None:
        return None
    return DatasetInfo(
        name=dataset,
        kind=DatasetKind(kind),
        guid=int(guid),
        createtxg=int(createtxg),
        creation_s=int(creation),
        origin=None if origin == ABSENT else _parse(SnapshotName, origin),
        volsize_bytes=_size(volsize),
        volblocksize_bytes=_size(volblocksize),
    )


def _size(text: str) -> int | None:
    return None if text == ABSENT else int(text)


def _parse(kind: type[T], text: str) -> T | None:
    try:
        return kind.parse(text)
    except InvalidNameError:
        return None
