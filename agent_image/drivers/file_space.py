"""Space: what a dataset takes, what is left, and who may have it.

``used`` is disk space as the file system counts it, plus what a thick volume has reserved and not yet taken. A content file
several snapshots share is counted once, at the dataset of the oldest of them. ``written`` compares blocks; for a snapshot, which
never changes, it is compared once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from agent_image.drivers.base import Usage
from agent_image.drivers.file_contents import changed_bytes
from agent_image.drivers.file_pool import FilePool
from agent_image.drivers.file_records import NO_CONTENT, DatasetRecord, SnapshotRecord
from imaging import files
from imaging.errors import NoSpaceError, NotFoundError
from imaging.names import DatasetName, PoolName, SnapshotName

WRITTEN_KEPT_MAX = 10_000
"""Comparisons remembered: far more than a hypervisor has snapshots, and 2 MB of memory."""


class FileSpace(FilePool):
    """Adds ``usage`` and the admission of new data."""

    def __init__(self, pool: PoolName, state_dir: Path, *, size_bytes: int | None, now: Callable[[], float]) -> None:
        super().__init__(pool, state_dir, size_bytes=size_bytes, now=now)
        self._written: dict[tuple[str, str], int] = {}
        """(content, base content) -> bytes written between two files that never change."""
        self._owners: dict[str, list[str]] = {}
        self._owners_version = -1

    def usage(self, name: DatasetName | SnapshotName) -> Usage:
        """The sizes that move."""
        if isinstance(name, SnapshotName):
            return self._snapshot_usage(name)
        with ExitStack() as opened:
            with self._locked() as catalog:
                dataset = self._dataset(name)
                used, available = self._used(dataset), self._available(dataset)
                referenced = self._contents.allocated(dataset.content)
                measure = self._measure(dataset, self._settled_content(dataset), catalog.base(dataset), opened)
            written = measure()
        return Usage(
            used_bytes=used,
            referenced_bytes=max(referenced, written),
            written_bytes=written,
            available_bytes=available,
            quota_bytes=dataset.quota_bytes,
            refreservation_bytes=dataset.refreservation_bytes,
        )

    def written(self, names: Sequence[SnapshotName]) -> Mapping[SnapshotName, int]:
        """What was written before each snapshot since the one before; measured once, remembered after."""
        found = {}
        for name in names:
            try:
                found[name] = self._snapshot_usage(name).written_bytes
            except NotFoundError:
                continue  # destroyed since the caller learnt of it
        return found

    def _snapshot_usage(self, name: SnapshotName) -> Usage:
        with ExitStack() as opened:
            with self._locked() as catalog:
                snapshot = self._snapshot(name)
                referenced = self._contents.allocated(snapshot.content)
                used = referenced if catalog.references(snapshot.content) == 1 else 0
                measure = self._measure(snapshot, snapshot.content, catalog.before(snapshot), opened)
            written = measure()
        return Usage(used, max(referenced, written), written, available_bytes=0)

    # -- written -----------------------------------------------------------------------------------------------------

    def _measure(
        self,
        record: DatasetRecord | SnapshotRecord,
        settled: str | None,
        base: SnapshotRecord | None,
        opened: ExitStack,
    ) -> Callable[[], int]:
        """What will tell how much ``record`` wrote since ``base``.

        Made under the lock, with every file it needs open, and called outside of it, because it may have to read a lot. ``settled`` is the
        unchanging content the record's bytes equal, if that is known: then the answer is kept.
        """
        if base is None or base.content == NO_CONTENT:
            written = self._contents.allocated(record.content)
            return lambda: written
        key = (settled, base.content) if settled is not None else None
        known = 0 if settled == base.content else self._written.get(key) if key is not None else None
        if known is not None:
            return lambda: known
        fd = opened.enter_context(self._contents.open(record.content, record.volsize_bytes))
        base_fd = opened.enter_context(self._contents.open(base.content, base.volsize_bytes))

        def compare() -> int:
            written = changed_bytes(fd, base_fd, record.volblocksize_bytes)
            if key is not None:
                self._remember(key, written)
            return written

        return compare

    def _remember(self, key: tuple[str, str], written: int) -> None:
        with self._lock:
            if len(self._written) >= WRITTEN_KEPT_MAX:
                self._written.clear()
            self._written[key] = written

    def _settled_content(self, dataset: DatasetRecord) -> str | None:
        """The unchanging content a volume's bytes equal right now; None if it has been written to."""
        if not dataset.private:
            return dataset.content
        if dataset.synced_mtime_ns and self._contents.mtime_ns(dataset.content) == dataset.synced_mtime_ns:
            return dataset.synced_content
        return None

    # -- used and available ------------------------------------------------------------------------------------------

    def _unfilled(self, dataset: DatasetRecord) -> int:
        """What a thick volume has reserved and not yet taken."""
        if not dataset.refreservation_bytes:
            return 0
        taken = self._contents.allocated(dataset.content) if dataset.private else 0
        return max(0, dataset.refreservation_bytes - taken)

    def _used(self, dataset: DatasetRecord) -> int:
        if self._owners_version != self._catalog.version:
            self._owners, self._owners_version = self._assign_owners(), self._catalog.version
        total = 0
        for each in self._catalog.walk(dataset):
            total += sum(map(self._contents.allocated, self._owners.get(each.id, ()))) + self._unfilled(each)
        return total

    def _assign_owners(self) -> dict[str, list[str]]:
        owner: dict[str, str] = {}
        for dataset in self._catalog.all_datasets():
            owner[dataset.content] = dataset.id
        for snapshot in sorted(self._catalog.all_snapshots(), key=lambda s: s.createtxg, reverse=True):
            owner[snapshot.content] = snapshot.dataset  # the oldest comes last and stays
        owner.pop(NO_CONTENT, None)
        owned: dict[str, list[str]] = {}
        for content, dataset_id in owner.items():
            owned.setdefault(dataset_id, []).append(content)
        return owned

    def _available(self, dataset: DatasetRecord) -> int:
        """What can still be written below a dataset, or into a volume with what it reserved."""
        return max(0, self._headroom(dataset)) + self._unfilled(dataset)

    def _headroom(self, dataset: DatasetRecord) -> int:
        root = self._dataset(self._pool.root)
        unfilled = sum(map(self._unfilled, self._catalog.all_datasets()))
        room = files.free_bytes(self._directory) - unfilled
        if self._size_bytes is not None:
            room = min(room, self._size_bytes - self._used(root))
        for above in self._above(dataset):
            if above.quota_bytes:
                room = min(room, above.quota_bytes - self._used(above))
        return room

    def _above(self, dataset: DatasetRecord) -> Iterator[DatasetRecord]:
        """A dataset and all above it."""
        above: DatasetRecord | None = dataset
        while above is not None:
            yield above
            above = self._catalog.dataset(above.parent)

    def _admit(self, dataset: DatasetRecord, size_bytes: int, what: str) -> None:
        """Refuse ``size_bytes`` more below ``dataset`` if pool or a quota has no room for them."""
        room = self._headroom(dataset)
        if size_bytes > room:
            raise NoSpaceError(f"{what}: no space left on device ({size_bytes} bytes wanted, {max(0, room)} left)")

    def _admit_private(self, dataset: DatasetRecord, content: str, what: str) -> None:
        """Refuse a private copy of ``content`` for a volume; what the volume reserved is its own."""
        self._admit(dataset, max(0, self._contents.allocated(content) - self._unfilled(dataset)), what)
