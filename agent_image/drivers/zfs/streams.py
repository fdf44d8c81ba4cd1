"""Sending and receiving of the zfs driver."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence

from agent_image.drivers.base import DatasetInfo, DatasetKind, Readable, SendFlags, SnapshotInfo
from agent_image.drivers.resuming import check_place, flags_of, token_for
from agent_image.drivers.zfs import programs
from agent_image.drivers.zfs.core import user_properties
from agent_image.drivers.zfs.datasets import SEND_TAG_PREFIX
from agent_image.drivers.zfs.firewall import PIPE_BYTES, PeekedSource, pour
from agent_image.drivers.zfs.hidden import MARK, Purpose, is_ours, new_name
from agent_image.drivers.zfs.ownership import open_zfs_device
from agent_image.drivers.zfs.packages import head_of
from agent_image.drivers.zfs.properties import Changes, check
from agent_image.drivers.zfs.snapshots import ZfsSnapshots
from imaging.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    UnavailableError,
    WrongKindError,
)
from imaging.names import DatasetName, SnapshotName, is_snapshot_part
from imaging.sendstream.package import package_end
from imaging.sendstream.resume import ResumeToken
from imaging.sendstream.state import VolumeState

TAG_BYTES = 8
PLAIN = SendFlags()

log = logging.getLogger(__name__)


class ZfsStreams(ZfsSnapshots):
    """Adds send and receive."""

    # -- send --------------------------------------------------------------------------------------------------------

    def send(
        self,
        name: SnapshotName,
        fd: int,
        *,
        base: str | None = None,
        flags: SendFlags = PLAIN,
        resume_token: str | None = None,
    ) -> None:
        """Let the kernel write a stream to ``fd``; the snapshots it reads are held until it ends."""
        sent = self.get_snapshot(name)
        _check_blocking(fd)
        if resume_token is not None:
            token = token_for(resume_token, sent, base=base, flags=flags)
            check_place(token, sent, self._volume(name.dataset).volblocksize_bytes or self._volblocksize_default_bytes)
            self._send_rest(sent, fd, token)
            return
        source = None if base is None else self._base_name(name, base)
        with self._held(name, source), _writable_by_kernel(fd) as target:
            if flags.properties:
                self._send_package(sent, source, target, _kernel_flags(flags))
            else:
                self._lzc.send(str(name), source, target, _kernel_flags(flags))

    def _send_rest(self, sent: SnapshotInfo, fd: int, token: ResumeToken) -> None:
        """What comes from the token's place on; of a package the stream alone, as the zfs program does."""
        source = self._base_of_guid(sent.name, token.fromguid) if token.fromguid else None
        with self._held(sent.name, source), _writable_by_kernel(fd) as target:
            place = (token.object, token.offset)
            self._lzc.send(str(sent.name), source, target, _kernel_flags(flags_of(token)), resume=place)

    def _send_package(self, sent: SnapshotInfo, source: str | None, target: int, flags: Sequence[str]) -> None:
        """The stream with its properties around it. What the kernel would refuse is found out before the first byte."""
        self._lzc.check_send(str(sent.name), source, flags)
        dataset = self.get(sent.name.dataset)
        native = self._lzc.program(programs.NATIVE_PROPERTIES, [str(dataset.name)]).get(str(dataset.name).encode(), {})
        origin_guid = 0 if dataset.origin is None else self.get_snapshot(dataset.origin).guid
        head = head_of(sent, dataset, native, base=source, origin_guid=origin_guid)
        _write_all(target, head, sent.name)
        self._lzc.send(str(sent.name), source, target, flags)
        _write_all(target, package_end(), sent.name)

    def _base_of_guid(self, name: SnapshotName, guid: int) -> str:
        """The snapshot or bookmark with this guid that ``name`` may have grown out of."""
        dataset: DatasetName | None = name.dataset
        while dataset is not None:
            found = [str(entry.name) for entry in self._index.snapshots(dataset) if entry.guid == guid]
            marks = [] if found else self._lzc.bookmark_guids(str(dataset)).items()
            found += [f"{dataset}#{mark}" for mark, marked_guid in marks if marked_guid == guid]
            if found:
                return found[0]
            info = self._index.find(dataset)
            dataset = None if info is None or info.origin is None else info.origin.dataset
        raise NotFoundError(f"the base of {name} with guid {guid} is gone")

    def _base_name(self, name: SnapshotName, base: str) -> str:
        """The full name of a base; a snapshot must be there."""
        if base.startswith("#") and is_snapshot_part(base[1:]):
            return f"{name.dataset}{base}"
        snapshot = SnapshotName.parse(base if "@" in base else f"{name.dataset}@{base}")
        return str(self.get_snapshot(snapshot).name)

    @contextlib.contextmanager
    def _held(self, name: SnapshotName, source: str | None) -> Iterator[None]:
        """Hold what a send reads for the block. The kernel lets go when the descriptor is closed, be it by our death."""
        names = [name] if source is None or "#" in source else [name, SnapshotName.parse(source)]
        cleanup_fd = open_zfs_device()
        try:
            for held in names:
                self._lzc.hold(str(held), f"{SEND_TAG_PREFIX}{secrets.token_hex(TAG_BYTES)}", cleanup_fd)
            yield
        finally:
            os.close(cleanup_fd)
            for held in names:
                self._settle(held)

    # -- receive -----------------------------------------------------------------------------------------------------

    def receive(
        self,
        target: SnapshotName,
        source: Readable,
        *,
        origin: SnapshotName | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> SnapshotInfo:
        """Receive a stream through the firewall, new datasets under a hidden name that is changed at the end."""
        self._check_new(target.dataset)
        SnapshotName.parse(str(target))
        changes = check(user_properties(properties), is_volume=True)
        peeked = PeekedSource(source)
        fromguid = peeked.fromguid()
        existing = self._index.find(target.dataset)
        if existing is not None:
            return self._receive_next(target, peeked, self._next_base(target, existing, fromguid, origin), changes)
        if fromguid and origin is None:
            raise ConflictError(f"{target.dataset} does not exist, and the stream builds on guid {fromguid}")
        base = None if origin is None else self._state_of(origin, fromguid)
        return self._receive_new(target, peeked, base if fromguid else None, origin, changes)

    def _next_base(
        self, target: SnapshotName, existing: DatasetInfo, fromguid: int, origin: SnapshotName | None
    ) -> VolumeState:
        """The newest snapshot of what is there, which the stream must build on."""
        if not fromguid or origin is not None:
            raise AlreadyExistsError(f"{target.dataset} exists already")
        if existing.kind is not DatasetKind.VOLUME:
            raise WrongKindError(f"{target.dataset} is not a volume")
        if self._index.find_snapshot(target) is not None:
            raise AlreadyExistsError(f"{target} exists already")
        entries = self._index.snapshots(target.dataset)
        if not entries:
            raise ConflictError(f"{target.dataset} has no snapshot, and the stream builds on guid {fromguid}")
        return self._state_of(entries[-1].name, fromguid)

    def _state_of(self, name: SnapshotName, fromguid: int) -> VolumeState:
        """A snapshot as base of a stream; ConflictError says what the stream wants."""
        info, dataset = self.get_snapshot(name), self._volume(name.dataset)
        if fromguid and info.guid != fromguid:
            raise ConflictError(f"the stream builds on guid {fromguid}, but {name} has guid {info.guid}")
        return VolumeState(
            guid=info.guid,
            fromguid=0,
            volsize_bytes=info.volsize_bytes or 0,
            volblocksize_bytes=dataset.volblocksize_bytes or 0,
            creation_s=info.creation_s,
            toname=str(name),
        )

    def _receive_next(
        self, target: SnapshotName, source: Readable, base: VolumeState, changes: Changes
    ) -> SnapshotInfo:
        """An increment onto an existing volume; the kernel shows the snapshot when it is whole."""
        self._wait_unheld([target.dataset], f"cannot receive into {target.dataset}")
        lzc = self._lzc
        guid = pour(
            source,
            base,
            lambda fd: lzc.receive(str(target), fd, origin=None, properties={}),
            keeps=lzc.library_fds,
        )
        self._devices.flush(str(target.dataset))
        with self._lock:
            self._learn(target.dataset, snapshots=True)
            if changes != Changes():
                self.set_properties(target.dataset, changes.as_given())
        return self._received(target, guid)

    def _receive_new(
        self,
        target: SnapshotName,
        source: Readable,
        base: VolumeState | None,
        origin: SnapshotName | None,
        changes: Changes,
    ) -> SnapshotInfo:
        if target.dataset.parent is None or self._index.find(target.dataset.parent) is None:
            raise NotFoundError(f"the parent of {target.dataset} does not exist")
        self._check_parent(target.dataset)
        temporary, mark = new_name(target.dataset, Purpose.RECEIVE)
        self._index.put(_placeholder(temporary, origin))
        try:
            guid = pour(
                source,
                base,
                lambda fd: self._lzc.receive(
                    f"{temporary}@{target.snapshot}",
                    fd,
                    origin=None if origin is None else str(origin),
                    properties=changes.for_creation() | mark,
                ),
                keeps=self._lzc.library_fds,
            )
            self._check_guid(temporary @ target.snapshot, guid)
            self._publish(temporary, target.dataset)
        except BaseException:
            self._discard(temporary, mark[MARK])
            raise
        return self._received(target, guid)

    def _check_guid(self, name: SnapshotName, guid: int) -> None:
        """What arrived is what was sent, before anybody sees it."""
        identity = self._identities([name]).get(str(name))
        if identity is None or identity.guid != guid:
            raise ConflictError(f"what was received is not the stream's snapshot with guid {guid}")

    def _publish(self, temporary: DatasetName, target: DatasetName) -> None:
        with self._lock:
            self._lzc.rename(str(temporary), str(target))
            self._index.remove(temporary)
            self._devices.forget()
            self._learn(target, snapshots=True)

    def _received(self, target: SnapshotName, guid: int) -> SnapshotInfo:
        info = self.get_snapshot(target)
        if info.guid != guid:
            raise ConflictError(f"{target} was replaced by somebody else")
        return info

    # -- leftovers ---------------------------------------------------------------------------------------------------

    def _discard(self, temporary: DatasetName, identity: str) -> None:
        """Destroy a temporary dataset of ours, if it is there at all and carries our mark."""
        try:
            info = self._learn(temporary, snapshots=True)
            if info.properties.get(MARK) == identity:
                self._destroy_temporary(temporary)
        except NotFoundError:
            log.debug("zfs_temporary_absent", extra={"dataset": str(temporary)})
        except MistifyError:  # the pool went away
            self._left.add(temporary)
            log.warning("zfs_temporary_left", extra={"dataset": str(temporary)}, exc_info=True)
        self._index.remove(temporary)

    def _repair(self) -> None:
        """Remove temporary datasets of a process that died; only what is marked ours beyond doubt."""
        for info in self._index.datasets(self._pool.root):
            if is_ours(info):
                log.info("zfs_leftover_removed", extra={"dataset": str(info.name)})
                self._destroy_temporary(info.name)


def _placeholder(name: DatasetName, origin: SnapshotName | None) -> DatasetInfo:
    """A dataset that is on its way, so that what it needs is not destroyed under it."""
    return DatasetInfo(name, DatasetKind.VOLUME, guid=0, createtxg=0, creation_s=0, origin=origin)


def _kernel_flags(flags: SendFlags) -> list[str]:
    """Pyzfs's words; properties are around the stream, not in it."""
    wanted = {
        "compress": flags.compressed,
        "large_blocks": flags.large_blocks,
        "embedded_data": flags.embedded,
        "raw": flags.raw,
    }
    return [flag for flag, is_wanted in wanted.items() if is_wanted]


def _check_blocking(fd: int) -> None:
    try:
        if os.get_blocking(fd):
            return
    except OSError as err:
        raise InvalidArgumentError("not an open descriptor") from err
    raise InvalidArgumentError("a stream is sent to a blocking descriptor only")


@contextlib.contextmanager
def _writable_by_kernel(fd: int) -> Iterator[int]:
    """The descriptor itself, or for kinds the kernel of 2.1 cannot write to (devices), a pipe that is copied there."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        yield fd
        return
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    copier = threading.Thread(target=_drain, args=(read_end, fd), name="zfs-send", daemon=True)
    copier.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        copier.join()


def _write_all(fd: int, data: bytes, name: SnapshotName) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as err:
        raise UnavailableError(f"the reader of {name} went away") from err


def _drain(read_end: int, target: int) -> None:
    """Copy until the end; a target that fails shows to the kernel as a reader that went away."""
    try:
        while data := os.read(read_end, PIPE_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    except OSError as err:
        log.info("zfs_send_target_failed", extra={"errno": err.errno})
    finally:
        os.close(read_end)
