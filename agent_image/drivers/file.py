"""The file driver: a pool of sparse files, for machines without ZFS, for trying and for tests. Crash-safe like the real thing.

In the state directory, for a pool ``tank``::

    pools/tank/lock          held while the pool is open (BusyError for the second process)
    pools/tank/records.db    every dataset, snapshot, bookmark and hold (file_store, file_records)
    pools/tank/contents/ID   the bytes: one file for each snapshot that differs and each volume somebody may write to (file_contents)
    zvol/tank/...            links named like the volumes, what ``device`` hands out (file_links)

What is different from ZFS, as far as a caller can notice:

* Filesystems hold datasets and quotas, no files: they have nothing to send.
* Where the file system has no reflinks, the first ``device`` of a clone and each snapshot of a written volume copy its data; while a
  guest keeps writing during every such copy, ``snapshot`` raises BusyError rather than taking bytes of different moments.
* ``rollback`` refuses while the volume is open: the guest would go on with a file that is no longer the volume's.
* A guest that writes through ``device`` is stopped by the size of its volume, not by a quota above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.file_streams import FileStreams
from imaging.names import DatasetName, PoolName, SnapshotName

VOLBLOCKSIZE_DEFAULT_BYTES = 16_384
"""The default of ZFS 2.2 and later."""


class FileDriver(FileStreams):
    """A StorageDriver on sparse files.

    ``size_bytes`` is the pool's capacity; without it, what the file system has.
    """

    def __init__(
        self,
        pool: PoolName,
        state_dir: Path,
        *,
        size_bytes: int | None = None,
        volblocksize_default_bytes: int = VOLBLOCKSIZE_DEFAULT_BYTES,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            pool, state_dir, size_bytes=size_bytes, volblocksize_default_bytes=volblocksize_default_bytes, now=now
        )

    def get(self, name: DatasetName) -> DatasetInfo:
        """The dataset."""
        with self._locked() as catalog:
            return catalog.dataset_info(self._dataset(name))

    def list(self, root: DatasetName, *, kind: DatasetKind | None = None) -> Sequence[DatasetInfo]:
        """``root`` and everything below it in name order."""
        with self._locked() as catalog:
            found = catalog.walk(self._dataset(root))
            return [catalog.dataset_info(dataset) for dataset in found if kind in {None, dataset.kind}]

    def get_snapshot(self, name: SnapshotName) -> SnapshotInfo:
        """The snapshot."""
        with self._locked() as catalog:
            return catalog.snapshot_info(self._snapshot(name))

    def list_snapshots(self, root: DatasetName, *, recursive: bool = True) -> Sequence[SnapshotInfo]:
        """Snapshots of ``root`` (and below): datasets by name, each one's by createtxg."""
        with self._locked() as catalog:
            top = self._dataset(root)
            datasets = catalog.walk(top) if recursive else [top]
            return [catalog.snapshot_info(s) for dataset in datasets for s in catalog.snapshots(dataset)]

    def clones(self, snapshot: SnapshotName) -> Sequence[DatasetName]:
        """Datasets whose origin is ``snapshot``, by name."""
        with self._locked() as catalog:
            return sorted(catalog.name_of(clone) for clone in catalog.clones(self._snapshot(snapshot)))
