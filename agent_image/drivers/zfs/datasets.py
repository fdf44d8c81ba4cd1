"""Filesystems and volumes of the zfs driver: making, changing, destroying."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from agent_image.drivers.base import DatasetInfo, DatasetKind
from agent_image.drivers.zfs import programs
from agent_image.drivers.zfs.command import SET_TIMEOUT_S, run_zfs
from agent_image.drivers.zfs.core import ZfsCore, user_properties
from agent_image.drivers.zfs.devices import is_passing
from agent_image.drivers.zfs.errors import Operation
from agent_image.drivers.zfs.hidden import PREFIX, Purpose, is_hidden, is_ours
from agent_image.drivers.zfs.properties import Changes, check, check_volblocksize, reservation, round_up
from imaging.errors import (
    BusyError,
    InternalError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    WrongKindError,
)
from imaging.names import DatasetName, SnapshotName

log = logging.getLogger(__name__)

BUSY_POLL_S = 0.05
SEND_TAG_PREFIX = "mistify.send:"
"""Holds of running sends."""
COMPRESSION_LZ4 = 15
"""ZIO_COMPRESS_LZ4; what new volumes always had, whatever the pool's default is."""
SHOWN_MAX = 5
"""Dependants a message names; the error carries all."""


def refuse_busy(what: str, dependants: Sequence[str]) -> None:
    """Raise BusyError if there are dependants."""
    if dependants:
        more = f" and {len(dependants) - SHOWN_MAX} more" if len(dependants) > SHOWN_MAX else ""
        raise BusyError(f"{what}: needed by {', '.join(dependants[:SHOWN_MAX])}{more}", dependants)


class ZfsDatasets(ZfsCore):
    """Adds the calls on datasets."""

    # -- creating ----------------------------------------------------------------------------------------------------

    def create_filesystem(
        self, name: DatasetName, *, properties: Mapping[str, str] | None = None, parents: bool = False
    ) -> DatasetInfo:
        """Create a filesystem; it is never mounted by us."""
        changes = check(user_properties(properties), is_volume=False)
        with self._place(name, parents=parents):
            self._lzc.create(str(name), volume=False, properties=changes.for_creation())
            return self._made(name, DatasetKind.FILESYSTEM, changes)

    def create_volume(
        self,
        name: DatasetName,
        size_bytes: int,
        *,
        thin: bool = False,
        volblocksize_bytes: int | None = None,
        properties: Mapping[str, str] | None = None,
        parents: bool = False,
    ) -> DatasetInfo:
        """Create a volume, compressed; a thick one reserves its size and what its block pointers need."""
        block_bytes = check_volblocksize(volblocksize_bytes or self._volblocksize_default_bytes)
        size_bytes = round_up(size_bytes, block_bytes, name)
        changes = check(user_properties(properties), is_volume=True)
        fixed = {"volsize": size_bytes, "volblocksize": block_bytes, "compression": COMPRESSION_LZ4}
        values = changes.for_creation() | fixed
        if not thin:
            values["refreservation"] = reservation(size_bytes, block_bytes)
        with self._place(name, parents=parents):
            self._lzc.create(str(name), volume=True, properties=values)
            return self._made(
                name, DatasetKind.VOLUME, changes, volsize_bytes=size_bytes, volblocksize_bytes=block_bytes
            )

    def clone(
        self,
        snapshot: SnapshotName,
        target: DatasetName,
        *,
        properties: Mapping[str, str] | None = None,
        parents: bool = False,
    ) -> DatasetInfo:
        """A writable dataset that starts as ``snapshot``."""
        origin, taken = self._find(snapshot.dataset), self.get_snapshot(snapshot)
        changes = check(user_properties(properties), is_volume=origin.kind is DatasetKind.VOLUME)
        with self._place(target, parents=parents):
            self._lzc.clone(str(target), str(snapshot), changes.for_creation())
            return self._made(
                target,
                origin.kind,
                changes,
                origin=snapshot,
                volsize_bytes=taken.volsize_bytes,
                volblocksize_bytes=origin.volblocksize_bytes,
            )

    def _made(self, name: DatasetName, kind: DatasetKind, changes: Changes, **fixed: object) -> DatasetInfo:
        """Put what was just created into the index."""
        identity = self._identities([name]).get(str(name))
        if identity is None:
            raise NotFoundError(f"{name} was destroyed by somebody else as soon as it was made")
        info = DatasetInfo(
            name=name,
            kind=kind,
            guid=identity.guid,
            createtxg=identity.createtxg,
            creation_s=identity.creation_s,
            properties=changes.applied_to({}),
        )
        info = replace(info, **fixed)  # type: ignore[arg-type]
        self._index.put(info)
        return info

    @contextlib.contextmanager
    def _place(self, name: DatasetName, *, parents: bool) -> Iterator[None]:
        """Make missing parents for the block, which alone among those that create does not share the lock then."""
        self._check_new(name)
        with contextlib.ExitStack() as held:
            held.enter_context(self._lock.shared())
            if parents and self._missing_parents(name):
                held.close()
                held.enter_context(self._lock)
            self._check_parent(name)
            with self._parents(name) if parents else contextlib.nullcontext():
                try:
                    yield
                except BaseException:
                    self._forget_failed(name)
                    raise

    @contextlib.contextmanager
    def _parents(self, name: DatasetName) -> Iterator[None]:
        """Make missing parents; they go again if the block raises."""
        made: list[DatasetName] = []
        try:
            for parent in self._missing_parents(name):
                self._lzc.create(str(parent), volume=False, properties={})
                self._made(parent, DatasetKind.FILESYSTEM, Changes())
                made.append(parent)
            yield
        except BaseException:
            for parent in reversed(made):
                self._lzc.destroy(str(parent))
                self._index.remove(parent)
            raise

    def _check_parent(self, name: DatasetName) -> None:
        """Nothing lies below a volume; the kernel of 2.1 refuses only some of the calls that would."""
        ancestors = (self._index.find(DatasetName(name.parts[:length])) for length in range(1, len(name.parts)))
        if any(info is not None and info.kind is DatasetKind.VOLUME for info in ancestors):
            raise WrongKindError(f"the parent of {name} is not a filesystem")

    def _forget_failed(self, name: DatasetName) -> None:
        """ZFS makes a dataset, fails to set a property (a reservation), and destroys it: others may have seen it meanwhile."""
        if not self._lzc.exists(str(name)):
            self._index.remove(name)

    def _missing_parents(self, name: DatasetName) -> list[DatasetName]:
        """Ancestors that are not there, topmost first."""
        ancestors = [DatasetName(name.parts[:length]) for length in range(1, len(name.parts))]
        return [ancestor for ancestor in ancestors if self._index.find(ancestor) is None]

    # -- changing ----------------------------------------------------------------------------------------------------

    def set_properties(self, name: DatasetName, properties: Mapping[str, str | None]) -> None:
        """Set or remove properties. What ZFS may refuse (quota) comes first, the user's own last, all of them at once."""
        with self._lock:
            info = self._find(name)
            changes = check(properties, is_volume=info.kind is DatasetKind.VOLUME)
            self._set_native(name, changes)
            if changes.user:
                self._set_user(name, changes.user)
            self._index.put(replace(info, properties=changes.applied_to(info.properties)))

    def _set_native(self, name: DatasetName, changes: Changes) -> None:
        assignments = []
        if changes.quota_bytes is not None:
            assignments.append(f"quota={changes.quota_bytes or 'none'}")
        if changes.readonly in {"on", "off"}:
            assignments.append(f"readonly={changes.readonly}")
        if assignments:
            self._zfs_set(name, assignments)
        if changes.readonly == "inherit":
            run_zfs(
                ["inherit", "readonly", str(name)], operation=Operation.SET, subject=str(name), timeout_s=SET_TIMEOUT_S
            )

    def _zfs_set(self, name: DatasetName, assignments: Sequence[str]) -> None:
        """``zfs set``: neither an assignment nor a dataset's name can begin with a dash."""
        run_zfs(["set", *assignments, str(name)], operation=Operation.SET, subject=str(name), timeout_s=SET_TIMEOUT_S)

    def _set_user(self, name: DatasetName, user: Mapping[str, str | None]) -> None:
        arguments = [str(name)]
        for key, value in user.items():
            arguments += ["inherit", key, ""] if value is None else ["set", key, value]
        failed = self._lzc.program(programs.SET_USER_PROPERTIES, arguments, sync=True).get(b"failed")
        if failed != 0:
            raise InternalError(f"cannot set properties of {name}: ZFS says {failed}")

    def resize(self, name: DatasetName, size_bytes: int) -> DatasetInfo:
        """Change a volume's size, and the reservation of a thick one with it."""
        with self._lock:
            info = self._volume(name)
            block_bytes = info.volblocksize_bytes or self._volblocksize_default_bytes
            size_bytes = round_up(size_bytes, block_bytes, name)
            usage = self.usage(name)
            assignments = [f"volsize={size_bytes}"]
            if usage.refreservation_bytes:
                wanted = reservation(size_bytes, block_bytes)
                if wanted - usage.refreservation_bytes > usage.available_bytes:
                    raise NoSpaceError(f"cannot resize {name}: no space left on device")
                assignments.append(f"refreservation={wanted}")
            self._resize_whole(info, assignments, usage.refreservation_bytes)
            resized = replace(info, volsize_bytes=size_bytes)
            self._index.put(resized)
            return resized

    def _resize_whole(self, info: DatasetInfo, assignments: Sequence[str], reserved_bytes: int) -> None:
        """ZFS sets one property after the other: if it refuses one, set back what it may have taken."""
        try:
            self._zfs_set(info.name, assignments)
        except MistifyError:
            back = [f"volsize={info.volsize_bytes}", f"refreservation={reserved_bytes or 'none'}"]
            with contextlib.suppress(MistifyError):
                self._zfs_set(info.name, back[: len(assignments)])
            raise

    def rename(self, name: DatasetName, target: DatasetName) -> None:
        """Rename a dataset with everything below."""
        with self._lock:
            self._find(name)
            self._check_new(target)
            if name == self._pool.root:
                raise InvalidArgumentError(f"the root of pool {name} cannot be renamed")
            if target != name and target.is_within(name):
                raise InvalidArgumentError(f"{name} cannot move below itself: {target}")
            self._check_parent(target)
            self._lzc.rename(str(name), str(target))
            self._index.rename(name, target)
            self._devices.forget()

    def promote(self, name: DatasetName) -> None:
        """Swap a clone with its origin."""
        with self._lock:
            info = self._find(name)
            if info.origin is None:
                raise InvalidArgumentError(f"{name} is not a clone")
            self._lzc.promote(str(name))
            former = info.origin.dataset
            moved = {entry.name for entry in self._index.snapshots(former)}
            clones = {clone for snapshot in moved for clone in self._index.clones(snapshot)}
            for changed in sorted({name, former} | clones):
                self._learn(changed, snapshots=changed in {name, former})

    # -- destroying --------------------------------------------------------------------------------------------------

    def destroy(self, name: DatasetName, *, recursive: bool = False) -> None:
        """Destroy a dataset; checks everything that could stand in the way before it begins."""
        if self._find(name).name == self._pool.root:
            raise InvalidArgumentError(f"the root of pool {name} cannot be destroyed")
        self._destroy_left()
        volumes = [info.name for info in self._index.datasets(name, DatasetKind.VOLUME)]
        if recursive:
            self._wait_unheld(volumes, f"cannot destroy {name}")
        before = self._count(name)
        try:
            self._while_busy(lambda: self._destroy_now(name, recursive=recursive), name, volumes)
        except BusyError as err:
            gone = before - self._count(name)
            if gone:  # somebody opened a device after the look: ZFS has no way to take back what went before
                raise BusyError(f"{err.message}; {gone} of {before} parts are destroyed", err.dependants) from err
            raise

    def _count(self, name: DatasetName) -> int:
        """Datasets and snapshots at and below."""
        datasets = self._index.datasets(name)
        return len(datasets) + sum(len(self._index.snapshots(info.name)) for info in datasets)

    def _destroy_now(self, name: DatasetName, *, recursive: bool) -> None:
        with self._lock:
            doomed = [info.name for info in self._index.datasets(self._find(name).name)]
            refuse_busy(f"cannot destroy {name}", self._dependants(doomed, recursive=recursive))
            if len(doomed) == 1 and not self._index.snapshots(name):
                self._destroy_one(name)
                return
            snapshots = [entry.name for dataset in doomed for entry in self._index.snapshots(dataset)]
            if snapshots and not any(self._index.clones(snapshot) for snapshot in snapshots):
                self._destroy_snapshots_now(snapshots)
            while doomed:
                self._destroy_next(doomed)

    def _destroy_next(self, doomed: list[DatasetName]) -> None:
        """Destroy one that nothing left needs: no children, no clones of its snapshots."""
        for dataset in reversed(doomed):
            snapshots = [entry.name for entry in self._index.snapshots(dataset)]
            if not self._index.children(dataset) and not any(self._index.clones(snapshot) for snapshot in snapshots):
                if snapshots:
                    self._destroy_snapshots_now(snapshots)
                self._destroy_found(dataset, is_top=dataset == doomed[0])
                doomed.remove(dataset)
                return
        raise BusyError(f"cannot destroy {doomed[0]}: its parts need each other", [str(name) for name in doomed])

    def _destroy_found(self, name: DatasetName, *, is_top: bool) -> None:
        """Destroy one of several; what somebody else destroyed a moment ago is what was wanted."""
        try:
            self._destroy_one(name)
        except NotFoundError:
            if is_top:
                raise
            self._index.remove(name)

    def _destroy_snapshots_now(self, snapshots: Sequence[SnapshotName]) -> None:
        self._lzc.destroy_snapshots([str(snapshot) for snapshot in snapshots])
        self._index.remove_snapshots(snapshots)

    def _destroy_one(self, name: DatasetName) -> None:
        info = self._index.find(name)
        try:
            self._lzc.destroy(str(name))
        except BusyError:  # ZFS says so of a dataset with snapshots, too: somebody may have taken one a moment ago
            self._learn(name, snapshots=True)
            raise
        self._index.remove(name)
        if info is not None and info.origin is not None:
            self._settle(info.origin)

    def _settle(self, snapshot: SnapshotName) -> None:
        """A snapshot marked for deferred destruction goes with its last clone or hold: look whether it did."""
        if self._index.find_snapshot(snapshot) is not None and not self._lzc.exists(str(snapshot)):
            self._index.remove_snapshots([snapshot])

    def _dependants(self, doomed: Sequence[DatasetName], *, recursive: bool) -> list[str]:
        top = doomed[0]
        snapshots = [entry.name for dataset in doomed for entry in self._index.snapshots(dataset)]
        if not recursive:
            return [self._described(child) for child in self._index.children(top)] + [str(name) for name in snapshots]
        going = set(doomed)
        hidden = [self._described(dataset) for dataset in doomed if is_hidden(dataset)]
        return hidden + [user for snapshot in snapshots for user in self._users_if_there(snapshot, going)]

    def _users_if_there(self, snapshot: SnapshotName, going: set[DatasetName] | None = None) -> list[str]:
        """What needs a snapshot that shall go; nothing if somebody else destroyed it a moment ago, which is what was wanted."""
        try:
            return self._snapshot_users(snapshot, going)
        except NotFoundError:
            self._index.remove_snapshots([snapshot])
            return []

    def _snapshot_users(self, snapshot: SnapshotName, going: set[DatasetName] | None = None) -> list[str]:
        """What needs a snapshot: holds, and clones other than those that go with it."""
        tags = self._lzc.holds(str(snapshot))
        held = [f"{snapshot} held by {tag}" for tag in tags if not tag.startswith(SEND_TAG_PREFIX)]
        if len(held) < len(tags):
            held.append(f"{snapshot} is being sent")
        return held + [self._described(clone) for clone in self._index.clones(snapshot) if clone not in (going or ())]

    def _described(self, name: DatasetName) -> str:
        """A dependant as callers can understand it."""
        info = self._index.find(name)
        if name.leaf.startswith(f"{PREFIX}{Purpose.VIEW}") and info is not None:
            return f"{info.origin} is being read"
        return f"a stream is being received below {name.parent}" if is_hidden(name) else str(name)

    # -- temporary datasets ------------------------------------------------------------------------------------------

    def _destroy_temporary(self, name: DatasetName) -> None:
        """Destroy it once udev let go; what cannot be destroyed now goes before the next destruction, or at the next start."""
        try:
            self._while_busy(lambda: self._destroy_temporary_now(name), name, [name])
        except NotFoundError:  # another thread was first
            self._left.discard(name)
        except MistifyError:
            self._left.add(name)
            log.warning("zfs_temporary_left", extra={"dataset": str(name)}, exc_info=True)
        else:
            self._left.discard(name)

    def _destroy_temporary_now(self, name: DatasetName) -> None:
        with self._lock:
            snapshots = [entry.name for entry in self._index.snapshots(name)]
            if snapshots:
                self._destroy_snapshots_now(snapshots)
            self._destroy_one(name)

    def _destroy_left(self) -> None:
        """What could not be destroyed when it was done with must not stand in anybody's way."""
        for name in sorted(self._left):
            try:
                is_there = is_ours(self._learn(name, snapshots=True))  # the pool may have been away since
            except NotFoundError:
                is_there = False
            if is_there:
                self._destroy_temporary(name)
            else:
                self._left.discard(name)

    # -- devices somebody holds --------------------------------------------------------------------------------------

    def _while_busy(self, call: Callable[[], None], name: DatasetName, volumes: Sequence[DatasetName]) -> None:
        """Call again while all that is in the way is udev's look at a device; then say who holds it.

        The time for one device: as long as parts of ``name`` go, it begins anew.
        """
        left, deadline, tick = -1, 0.0, threading.Event()
        while True:
            try:
                call()
            except BusyError as err:
                if err.dependants:
                    raise
                if left != (left := self._count(name)):
                    deadline = time.monotonic() + self._device_busy_timeout_s
                holders = self._holders(volumes)
                if any(not is_passing(holder) for holder in holders) or time.monotonic() > deadline:
                    raise BusyError(f"{name} is in use by {', '.join(holders) or 'the kernel'}", holders) from err
                tick.wait(BUSY_POLL_S)
            else:
                return

    def _wait_unheld(self, volumes: Sequence[DatasetName], what: str) -> None:
        """Wait until nobody has the devices open; BusyError says who has."""
        deadline, tick = time.monotonic() + self._device_busy_timeout_s, threading.Event()
        while holders := self._holders(volumes):
            if any(not is_passing(holder) for holder in holders) or time.monotonic() > deadline:
                refuse_busy(what, holders)
            tick.wait(BUSY_POLL_S)

    def _holders(self, volumes: Sequence[DatasetName]) -> list[str]:
        return self._devices.holders(str(volume) for volume in volumes)
