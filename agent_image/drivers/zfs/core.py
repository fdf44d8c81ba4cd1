"""What every part of the zfs driver stands on: opening, the lock, the index, reading."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo, Usage
from agent_image.drivers.zfs import programs, survey
from agent_image.drivers.zfs.devices import LINK_TIMEOUT_S, Devices
from agent_image.drivers.zfs.hidden import MARK, is_hidden
from agent_image.drivers.zfs.identity import Identities
from agent_image.drivers.zfs.index import PoolIndex
from agent_image.drivers.zfs.locking import ChangeLock
from agent_image.drivers.zfs.lzc import Lzc
from agent_image.drivers.zfs.ownership import open_zfs_device, own
from agent_image.drivers.zfs.properties import VOLBLOCKSIZE_DEFAULT_BYTES, check_volblocksize
from agent_image.drivers.zfs.together import Together
from agent_image.drivers.zfs.watch import Watch
from agent_image.drivers.zfs.written import Span
from imaging.errors import InvalidNameError, NotFoundError, UnavailableError, WrongKindError
from imaging.names import DatasetName, PoolName, SnapshotName

DEVICE_BUSY_TIMEOUT_S = 5.0
"""How long destroy waits for udev to let go of a device; it looks at one for well under a second unless hundreds come at once."""

log = logging.getLogger(__name__)


class ZfsCore:
    """Life and reading. Changes are made by the classes above it, under ``_lock``.

    The lock orders our own changes of names with those of the index; ZFS serializes them anyway. What only adds (create, clone,
    snapshot) shares it: ZFS makes such changes together. Nothing that waits for anybody else (devices, streams) happens under it.
    """

    def __init__(
        self,
        pool: PoolName,
        state_dir: Path | None = None,
        *,
        volblocksize_default_bytes: int = VOLBLOCKSIZE_DEFAULT_BYTES,
        device_directory: Path = Path("/dev"),
        link_directory: Path | None = None,
        link_timeout_s: float = LINK_TIMEOUT_S,
        device_busy_timeout_s: float = DEVICE_BUSY_TIMEOUT_S,
    ) -> None:
        """``state_dir`` is every driver's second argument; this one keeps all its state in the pool itself."""
        del state_dir
        self._pool = pool
        self._volblocksize_default_bytes = check_volblocksize(volblocksize_default_bytes)
        self._device_busy_timeout_s = device_busy_timeout_s
        self._devices = Devices(device_directory, link_directory=link_directory, link_timeout_s=link_timeout_s)
        self._lock = ChangeLock(self._refuse_suspended)
        self._index = PoolIndex()
        self._left: set[DatasetName] = set()
        """Temporary datasets that somebody still had open when they were done with."""
        self._opened: tuple[Lzc, Watch] | None = None
        self._owned_fd = -1
        self._chosen: Identities | None = None
        self._snapshots_together = Together(self._snapshot_now, key=lambda name: name.partition("@")[0])

    @property
    def name(self) -> str:
        """``zfs``."""
        return "zfs"

    @property
    def pool(self) -> PoolName:
        """The one pool this driver serves."""
        return self._pool

    # -- life --------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lock the pool, learn what is in it, remove what a crash left."""
        with self._lock:
            if self._opened is not None:
                return
            os.close(open_zfs_device())  # says clearly if there is no ZFS, before libzfs_core does
            lzc = Lzc(str(self._pool))
            root = survey.find_dataset(lzc, self._pool.root) if lzc.exists(str(self._pool)) else None
            if root is None:
                raise UnavailableError(f"pool {self._pool} is not imported")
            self._owned_fd = own(str(self._pool), root.guid)
            watch = Watch(lzc, self._pool, self._index)
            try:
                watch.start()
                self._opened = (lzc, watch)
                self._chosen = Identities(self._owned_fd, str(self._pool), self._ask_identities)
                self._repair()
            except BaseException:
                self._shut(watch)
                raise

    def close(self) -> None:
        """Stop watching and unlock."""
        with self._lock:
            if self._opened is not None:
                self._shut(self._opened[1])

    def _shut(self, watch: Watch) -> None:
        watch.stop()
        os.close(self._owned_fd)
        self._opened, self._owned_fd = None, -1

    def _repair(self) -> None:
        """Overridden where leftovers can come from."""

    @property
    def _lzc(self) -> Lzc:
        if self._opened is None:
            raise UnavailableError(f"the driver of pool {self._pool} is not open")
        lzc, watch = self._opened
        if not watch.is_pool_there and not lzc.is_imported():
            raise UnavailableError(f"pool {self._pool} is not imported")
        return lzc

    def _refuse_suspended(self) -> None:
        """UnavailableError if the pool is suspended: ZFS says so at once to each new call, while older ones hang."""
        if self._opened is not None:
            self._opened[0].program(programs.IDENTITY, [str(self._pool)])

    # -- reading -----------------------------------------------------------------------------------------------------

    def get(self, name: DatasetName) -> DatasetInfo:
        """The dataset, from the index."""
        return _visible(self._find(name))

    def list(self, root: DatasetName, *, kind: DatasetKind | None = None) -> Sequence[DatasetInfo]:
        """Datasets at and below ``root``, from the index."""
        self._find(root)
        return [_visible(info) for info in self._index.datasets(root, kind) if not is_hidden(info.name)]

    def get_snapshot(self, name: SnapshotName) -> SnapshotInfo:
        """The snapshot, from the index."""
        self._find(name.dataset)
        info = self._index.find_snapshot(name)
        if info is None:
            raise NotFoundError(f"{name} not found")
        return info

    def list_snapshots(self, root: DatasetName, *, recursive: bool = True) -> Sequence[SnapshotInfo]:
        """Snapshots at (and below) ``root``, from the index."""
        self._find(root)
        names = [info.name for info in self._index.datasets(root)] if recursive else [root]
        return [info for name in names if not is_hidden(name) for info in self._index.snapshots(name)]

    def clones(self, snapshot: SnapshotName) -> Sequence[DatasetName]:
        """Clones of the snapshot, from the index."""
        self.get_snapshot(snapshot)
        return [name for name in self._index.clones(snapshot) if not is_hidden(name)]

    def usage(self, name: DatasetName | SnapshotName) -> Usage:
        """Sizes that move, asked from ZFS."""
        if isinstance(name, SnapshotName):
            self.get_snapshot(name)
            program = programs.USAGE_OF_SNAPSHOT
        else:
            self._find(name)
            program = programs.USAGE
        entry = self._lzc.program(program, [str(name)]).get(str(name).encode())
        if entry is None:
            raise NotFoundError(f"{name} not found")
        return programs.usage_of(name, entry)

    def written(self, names: Sequence[SnapshotName]) -> Mapping[SnapshotName, int]:
        """What was written before each snapshot, asked from ZFS in batches and remembered: it cannot change."""
        lzc, spans = self._lzc, {}
        for dataset in dict.fromkeys(name.dataset for name in names):
            spans.update(self._spans(dataset))
        wanted = {name: spans[name] for name in names if name in spans}
        return self._index.written.of(wanted, lambda unknown: survey.read_written(lzc, unknown))

    def _spans(self, dataset: DatasetName) -> dict[SnapshotName, Span]:
        """The snapshots of a dataset, each with the one before; before the first of a clone comes its origin."""
        info = self._index.find(dataset)
        if info is None or is_hidden(dataset):
            return {}
        origin = None if info.origin is None else self._index.find_snapshot(info.origin)
        spans, guid_before = {}, 0 if origin is None else origin.guid
        for entry in self._index.snapshots(dataset):
            spans[entry.name] = Span(entry.guid, guid_before)
            guid_before = entry.guid
        return spans

    # -- for the classes above ---------------------------------------------------------------------------------------

    def _check_pool(self, name: DatasetName) -> None:
        if name.pool != self._pool:
            raise InvalidNameError(f"{name} is not in pool {self._pool}")

    def _find(self, name: DatasetName) -> DatasetInfo:
        self._check_pool(name)
        assert self._lzc is not None
        info = None if is_hidden(name) else self._index.find(name)
        if info is None:
            raise NotFoundError(f"{name} not found")
        return info

    def _volume(self, name: DatasetName) -> DatasetInfo:
        info = self._find(name)
        if info.kind is not DatasetKind.VOLUME:
            raise WrongKindError(f"{name} is not a volume")
        return info

    def _check_new(self, name: DatasetName) -> None:
        """A name for something new: of this pool and not one of the driver's own."""
        self._check_pool(name)
        if is_hidden(name):
            raise InvalidNameError(f"{name} is a name the driver keeps for itself")

    def _identities(self, names: Sequence[DatasetName | SnapshotName]) -> Mapping[str, programs.Identity]:
        """What ZFS chose for objects just made."""
        assert self._chosen is not None
        return self._chosen.of([str(name) for name in names])

    def _ask_identities(self, names: Sequence[str]) -> Mapping[str, programs.Identity]:
        answer = self._lzc.program(programs.IDENTITY, names)
        return {key.decode(): programs.identity_of(key.decode(), entry) for key, entry in answer.items()}

    def _snapshot_now(self, names: Sequence[str]) -> None:
        self._lzc.snapshot(names)

    def _learn(self, name: DatasetName, *, snapshots: bool = False) -> DatasetInfo:
        """Put a dataset into the index as it is now."""
        info = survey.find_dataset(self._lzc, name)
        if info is None:
            self._index.remove(name)
            raise NotFoundError(f"{name} not found")
        self._index.put(info)
        if snapshots:
            self._index.replace_snapshots(name, survey.snapshots(self._lzc, name))
        return info


def _visible(info: DatasetInfo) -> DatasetInfo:
    return survey.visible(info) if MARK in info.properties else info


def user_properties(properties: Mapping[str, str] | None) -> Mapping[str, str]:
    """None means none."""
    return properties or {}
