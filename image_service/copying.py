"""Copying all records or all blobs from one store to another: what is there already is not copied again, all is verified.

The source may be in use: records are read from a snapshot, blobs never change. A second run copies what was added since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, InvalidArgumentError
from imaging.files import os_errors
from imaging.kv.base import ABSENT, Compare, Delete, Entry, KeyValue, Operation, Put
from imaging.kv.leases import LEASES

PAGE_ENTRIES = 500
"""Read at once from each store."""

BATCH_ENTRIES = 100
"""Written in one transaction, below etcd's limit of 128."""

BATCH_BYTES = 512 << 10
"""Of values in one transaction, below etcd's limit of 1.5 MiB with one more value."""

COPY_BYTES = 4 << 20
"""Read at once from a blob."""


@dataclass(slots=True)
class CopyCount:
    """What a copy did, or would do."""

    copied: int = 0
    copied_bytes: int = 0
    same: int = 0
    removed: int = 0


class BlobSource(Protocol):
    """What a copy needs of the store it reads."""

    def list(self) -> Iterator[BlobInfo]:
        """Every blob."""

    def open(self, digest: Digest, *, offset_bytes: int = 0) -> AbstractContextManager[BinaryIO]:
        """Read a blob from an offset."""


class LocalBlobFiles:
    """The blobs of a local store, read beside the service that owns it."""

    def __init__(self, directory: Path) -> None:
        self._blobs = directory / "blobs" / "sha256"
        if not self._blobs.is_dir():
            raise InvalidArgumentError(f"not a store of images: {directory}")

    def list(self) -> Iterator[BlobInfo]:
        """Every blob, in digest order; one that is removed meanwhile is left out."""
        with os_errors(f"cannot list {self._blobs}"):
            paths = sorted(path for path in self._blobs.glob("??/*") if len(path.name) == 64)
        for path in paths:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            yield BlobInfo(Digest("sha256", path.name), stat.st_size, stat.st_mtime)

    @contextmanager
    def open(self, digest: Digest, *, offset_bytes: int = 0) -> Iterator[BinaryIO]:
        """Read a blob from an offset."""
        path = self._blobs / digest.hex[:2] / digest.hex
        with os_errors(f"cannot read blob {digest}"):
            file = path.open("rb")
        with file:
            file.seek(offset_bytes)
            yield file


def entries(store: KeyValue) -> Iterator[Entry]:
    """Everything but leases, which belong to running processes."""
    after = ""
    while page := store.list(after=after, limit=PAGE_ENTRIES):
        yield from (entry for entry in page if not entry.key.startswith(LEASES))
        after = page[-1].key


def differences(source: KeyValue, target: KeyValue) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Pairs (source's entry, target's entry) of every key, in key order; None where one has none."""
    left, right = entries(source), entries(target)
    ours, theirs = next(left, None), next(right, None)
    while ours is not None or theirs is not None:
        if theirs is None or (ours is not None and ours.key.encode() < theirs.key.encode()):
            yield ours, None
            ours = next(left, None)
        elif ours is None or theirs.key.encode() < ours.key.encode():
            yield None, theirs
            theirs = next(right, None)
        else:
            yield ours, theirs
            ours, theirs = next(left, None), next(right, None)


def copy_records(source: KeyValue, target: KeyValue, *, prune: bool = False, dry_run: bool = False) -> CopyCount:
    """Make the target hold what the source holds; with ``prune`` nothing else.

    Each write states what it replaces: ConflictError if somebody else writes to the target meanwhile. BadDataError if the
    target does not hold the same afterwards.
    """
    count = CopyCount()
    operations: list[Operation] = []
    compares: list[Compare] = []
    for ours, theirs in differences(source, target):
        operation = _needed(ours, theirs, count, prune=prune)
        if operation is None:
            continue
        operations.append(operation)
        compares.append(Compare(operation.key, theirs.revision if theirs else ABSENT))
        if len(operations) >= BATCH_ENTRIES or _size(operations) >= BATCH_BYTES:
            _apply(target, operations, compares, dry_run=dry_run)
            operations, compares = [], []
    _apply(target, operations, compares, dry_run=dry_run)
    if not dry_run:
        _verify_records(source, target, prune=prune)
    return count


def _needed(ours: Entry | None, theirs: Entry | None, count: CopyCount, *, prune: bool) -> Operation | None:
    if ours is None:
        if theirs is None or not prune:
            return None
        count.removed += 1
        return Delete(theirs.key)
    if theirs is not None and theirs.value == ours.value:
        count.same += 1
        return None
    count.copied += 1
    count.copied_bytes += len(ours.value)
    return Put(ours.key, ours.value)


def _size(operations: Sequence[Operation]) -> int:
    return sum(len(operation.value) for operation in operations if isinstance(operation, Put))


def _apply(target: KeyValue, operations: Sequence[Operation], compares: Sequence[Compare], *, dry_run: bool) -> None:
    if not operations or dry_run:
        return
    try:
        target.transact(operations, compares)
    except ConflictError as err:
        raise ConflictError("somebody else writes to the target; stop that and copy again") from err


def _verify_records(source: KeyValue, target: KeyValue, *, prune: bool) -> None:
    for ours, theirs in differences(source, target):
        missing = ours is not None and (theirs is None or theirs.value != ours.value)
        if missing or (ours is None and prune):
            key = (ours or theirs or Entry("", b"", 0)).key
            raise BadDataError(f"the target differs from the source after the copy: {key[:80]!r}")


def copy_blobs(
    source: BlobSource, target: BlobStore, *, dry_run: bool = False, told: Callable[[BlobInfo], None] | None = None
) -> CopyCount:
    """Copy every blob the target lacks, by digest. A copy that broke off goes on where it was; its digest is verified."""
    count = CopyCount()
    there = {info.digest: info.size_bytes for info in target.list()}
    for info in source.list():
        if there.get(info.digest) == info.size_bytes:
            count.same += 1
            continue
        if not dry_run:
            _copy_blob(source, target, info)
        count.copied += 1
        count.copied_bytes += info.size_bytes
        if told is not None:
            told(info)
    return count


def _copy_blob(source: BlobSource, target: BlobStore, info: BlobInfo) -> None:
    with target.ingest(f"copy-{info.digest.hex}", max_bytes=info.size_bytes) as writer:
        with source.open(info.digest, offset_bytes=writer.offset_bytes) as reader:
            while piece := reader.read(COPY_BYTES):
                writer.write(piece)
        writer.commit(digest=info.digest, size_bytes=info.size_bytes)
