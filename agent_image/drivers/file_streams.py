"""Send streams of the file driver: a snapshot's file into a stream, a stream into a snapshot's file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from agent_image.drivers.base import DatasetKind, Readable, SendFlags, SnapshotInfo
from agent_image.drivers.file_contents import SNAPSHOT_MODE, VOLUME_MODE, same_bytes
from agent_image.drivers.file_pool import refuse_busy
from agent_image.drivers.file_properties import with_properties
from agent_image.drivers.file_records import Change, DatasetRecord, SnapshotRecord, new_id
from agent_image.drivers.file_snapshots import FileSnapshots
from agent_image.drivers.resuming import check_place, flags_of, token_for
from imaging import files
from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    ConflictError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    UnsupportedError,
    WrongKindError,
)
from imaging.names import SnapshotName
from imaging.sendstream.reader import StreamReader
from imaging.sendstream.records import BLOCK_SMALL_MAX_BYTES, DATA_OBJECT, Begin, HeaderType, RecordType
from imaging.sendstream.resume import ResumeToken
from imaging.sendstream.volume import BlockCompression, OlderImage, StreamHeader, VolumeState, apply_stream, make_stream

PEEK_BYTES = 64 << 10
"""Read at once to find the BEGIN that says what a stream builds on; usually enough in one go."""

SPACE_CHECK_BYTES = 8 << 20
"""A stream is checked against the space there is each time this much of it has come: no more than this is written in vain."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a receive found out at its beginning, and must find again at its end."""

    target: SnapshotName
    dataset: DatasetRecord | None = None
    """What gets one more snapshot; None: the stream makes the dataset."""
    base: SnapshotRecord | None = None
    """What the stream builds on."""
    origin: SnapshotRecord | None = None
    """What the new dataset becomes a clone of."""
    mtime_ns: int = 0
    """Of the dataset's private file: while it lasts nobody has written since ``base``."""
    room_bytes: int = 0

    @property
    def state(self) -> VolumeState | None:
        """The base as the codec wants it."""
        if self.base is None:
            return None
        return VolumeState(
            guid=self.base.guid,
            fromguid=0,
            volsize_bytes=self.base.volsize_bytes,
            volblocksize_bytes=self.base.volblocksize_bytes,
            creation_s=self.base.creation_s,
            toname=str(self.target.dataset),
        )


@dataclass(frozen=True, slots=True)
class _SendPlan:
    """What a send has to say."""

    base: SnapshotRecord | None
    flags: SendFlags
    resume_offset: int | None = None


class FileStreams(FileSnapshots):
    """Adds ``send`` and ``receive``."""

    # -- send --------------------------------------------------------------------------------------------------------

    def send(
        self,
        name: SnapshotName,
        fd: int,
        *,
        base: str | None = None,
        flags: SendFlags = SendFlags(),  # noqa: B008 -- frozen
        resume_token: str | None = None,
    ) -> None:
        """Write a send stream to a blocking descriptor."""
        with ExitStack() as opened:
            with self._locked() as catalog:
                snapshot = self._volume_snapshot(name)
                if resume_token is None:
                    plan = _SendPlan(self._base_of(name, snapshot, base) if base is not None else None, flags)
                else:
                    sent = catalog.snapshot_info(snapshot)
                    token = token_for(resume_token, sent, base=base, flags=flags)
                    check_place(token, sent, snapshot.volblocksize_bytes)
                    plan = self._resume(snapshot, token)
                image = self._open_pinned(snapshot, opened)
                old_image = self._open_pinned(plan.base, opened) if plan.base is not None else None
            header = _header(name, snapshot, plan.base, plan.flags)
            old = None if plan.base is None or old_image is None else OlderImage(old_image, plan.base.volsize_bytes)
            pieces = make_stream(image, snapshot.volsize_bytes, header, older=old, resume_offset=plan.resume_offset)
            with files.os_errors(f"cannot send {name}"):
                for piece in pieces:
                    _write_all(fd, piece)

    def _resume(self, snapshot: SnapshotRecord, token: ResumeToken) -> _SendPlan:
        if token.object != DATA_OBJECT:
            raise UnsupportedError(f"nearly all of {token.toname} has arrived: send the whole of it again")
        older = next((each for each in self._ancestry(snapshot) if each.guid == token.fromguid), None)
        if token.fromguid and older is None:
            raise NotFoundError(f"the base of {token.toname} with guid {token.fromguid} is gone")
        return _SendPlan(older, flags_of(token), token.offset)

    def _open_pinned(self, snapshot: SnapshotRecord, opened: ExitStack) -> int:
        opened.enter_context(self._pinned(snapshot))
        return opened.enter_context(self._contents.open(snapshot.content, snapshot.volsize_bytes))

    def _base_of(self, name: SnapshotName, snapshot: SnapshotRecord, base: str) -> SnapshotRecord:
        """The older snapshot that ``base`` names; it has to be one the snapshot grew out of."""
        if base.startswith("#"):
            return self._bookmarked(name, snapshot, base[1:])
        wanted = SnapshotName.parse(base) if "@" in base else name.dataset @ base
        older = self._volume_snapshot(wanted)
        if all(older is not each for each in self._ancestry(snapshot)):
            raise InvalidArgumentError(f"{wanted} is not an earlier snapshot that {name} grew out of")
        return older

    def _bookmarked(self, name: SnapshotName, snapshot: SnapshotRecord, bookmark: str) -> SnapshotRecord:
        dataset = self._dataset(name.dataset)
        found = self._catalog.find_bookmark(dataset, bookmark)
        if found is None:
            raise NotFoundError(f"bookmark not found: {name.dataset}#{bookmark}")
        if found.createtxg >= snapshot.createtxg:
            raise InvalidArgumentError(f"bookmark {name.dataset}#{bookmark} is not older than {name}")
        for older in self._ancestry(snapshot):
            if older.guid == found.guid:
                return older
        raise UnsupportedError(
            f"the snapshot of bookmark {name.dataset}#{bookmark} is gone, and the file driver has nothing else to compare {name} with"
        )

    def _ancestry(self, snapshot: SnapshotRecord) -> Iterator[SnapshotRecord]:
        """Snapshots this one grew out of, newest first."""
        older = self._catalog.before(snapshot)
        while older is not None:
            yield older
            older = self._catalog.before(older)

    # -- receive -----------------------------------------------------------------------------------------------------

    def receive(
        self,
        target: SnapshotName,
        source: Readable,
        *,
        origin: SnapshotName | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> SnapshotInfo:
        """Receive a volume stream into a file of its own, and name that file in a record once all of it was verified."""
        with self._locked():
            self._check_snapshot_name(target)
        peeked = _PeekedSource(source)
        fromguid = peeked.fromguid()
        made: list[str] = []
        try:
            with ExitStack() as opened:
                with self._locked():
                    plan = self._plan_receive(target, fromguid, origin, opened)
                state = self._apply(plan, peeked, made)
            return self._commit_received(plan, state, made, properties or {})
        finally:
            self._discard_made(made)

    def _plan_receive(
        self, target: SnapshotName, fromguid: int, origin: SnapshotName | None, opened: ExitStack
    ) -> _Plan:
        """Decide what the stream may become, or refuse."""
        existing = self._catalog.find(target.dataset)
        if existing is not None:
            return self._plan_next(target, existing, fromguid, origin, opened)
        if fromguid and origin is None:
            raise ConflictError(
                f"{target.dataset} does not exist, and the stream builds on a snapshot with guid {fromguid}"
            )
        above = self._place(target.dataset, Change(), parents=False)
        base = self._volume_snapshot(origin) if origin is not None else None
        if base is not None:
            opened.enter_context(self._pinned(base))
            if fromguid and base.guid != fromguid:
                raise ConflictError(f"the stream builds on a snapshot with guid {fromguid}, {origin} has {base.guid}")
        return _Plan(target, base=base if fromguid else None, origin=base, room_bytes=self._headroom(above))

    def _plan_next(
        self,
        target: SnapshotName,
        dataset: DatasetRecord,
        fromguid: int,
        origin: SnapshotName | None,
        opened: ExitStack,
    ) -> _Plan:
        if not fromguid or origin is not None:
            raise AlreadyExistsError(f"dataset already exists: {target.dataset}")
        if not dataset.is_volume:
            raise WrongKindError(f"not a volume: {target.dataset}")
        if self._catalog.find_snapshot(dataset, target.snapshot) is not None:
            raise AlreadyExistsError(f"snapshot already exists: {target}")
        base = self._fitting_base(dataset, fromguid)
        refuse_busy(f"cannot receive into {target.dataset}", self._device_users(dataset))
        opened.enter_context(self._pinned(base))
        mtime_ns = self._require_unchanged(dataset, base)
        return _Plan(target, dataset, base, mtime_ns=mtime_ns, room_bytes=self._headroom(dataset))

    def _fitting_base(self, dataset: DatasetRecord, fromguid: int) -> SnapshotRecord:
        name, newest = self._catalog.name_of(dataset), self._catalog.newest(dataset)
        if newest is not None and newest.guid == fromguid:
            return newest
        if any(s.guid == fromguid for s in self._catalog.snapshots(dataset)):
            raise ConflictError(f"{name} has newer snapshots than the one with guid {fromguid} the stream builds on")
        has = f"its newest snapshot has guid {newest.guid}" if newest is not None else "it has no snapshot"
        raise ConflictError(f"the stream builds on a snapshot with guid {fromguid}; {name} does not fit: {has}")

    def _require_unchanged(self, dataset: DatasetRecord, base: SnapshotRecord) -> int:
        """ConflictError if the volume was written to since its newest snapshot; its modification time if not."""
        settled = self._settled_content(dataset)
        mtime_ns = dataset.synced_mtime_ns
        same = settled == base.content and dataset.volsize_bytes == base.volsize_bytes
        if settled is None and dataset.volsize_bytes == base.volsize_bytes:
            mtime_ns = self._contents.mark(dataset.content)
            with (
                self._contents.open(dataset.content, dataset.volsize_bytes) as fd,
                self._contents.open(base.content, base.volsize_bytes) as base_fd,
            ):
                same = same_bytes(fd, base_fd)
        if not same:
            name = self._catalog.name_of(dataset)
            raise ConflictError(
                f"{name} was written to since {name}@{base.name}, the snapshot with guid {base.guid} the stream builds on"
            )
        return mtime_ns

    def _apply(self, plan: _Plan, source: _PeekedSource, made: list[str]) -> VolumeState:
        """Make the snapshot's file (and the dataset's own, if it has one); the file names go to ``made``."""
        with self._contents.new(mode=SNAPSHOT_MODE) as (content, fd):
            if plan.base is not None:
                with self._contents.open(plan.base.content, plan.base.volsize_bytes) as base_fd:
                    files.copy_file(base_fd, fd)
            state = apply_stream(_Metered(source, fd, plan), fd, plan.state)
        made.append(content)
        if plan.dataset is not None and plan.dataset.private:
            with self._contents.open(content, state.volsize_bytes) as fd:
                made.append(self._contents.copy_of(fd, state.volsize_bytes, mode=VOLUME_MODE))
        return state

    def _commit_received(
        self, plan: _Plan, state: VolumeState, made: list[str], properties: Mapping[str, str]
    ) -> SnapshotInfo:
        with self._locked() as catalog:
            change = Change()
            dataset = self._received_dataset(plan, state, made, change)
            snapshot = SnapshotRecord(
                id=new_id(),
                dataset=dataset.id,
                name=plan.target.snapshot,
                guid=state.guid,
                createtxg=self._next_txg,
                creation_s=state.creation_s,
                volsize_bytes=state.volsize_bytes,
                volblocksize_bytes=state.volblocksize_bytes,
                content=made[0],
            )
            change.put(with_properties(dataset, properties))
            change.put(snapshot)
            self._commit(change)
            self._contents.freeze(snapshot.content)
            if dataset.private:
                self._links.point(plan.target.dataset, self._contents.path(dataset.content))
            return catalog.snapshot_info(snapshot)

    def _received_dataset(self, plan: _Plan, state: VolumeState, made: list[str], change: Change) -> DatasetRecord:
        """The dataset after the receive, if everything is still as planned."""
        name = plan.target.dataset
        if plan.dataset is None:
            above = self._place(name, change, parents=False)
            self._admit_made(above, made, plan.target)
            dataset = self._new_dataset(above.id, name.leaf, DatasetKind.VOLUME)
            if plan.origin is not None and self._catalog.snapshot(plan.origin.id) is None:
                raise NotFoundError(f"the origin of {name} was destroyed while the stream came")
            origin = plan.origin.id if plan.origin is not None else ""
            return self._with_content(msgspec.structs.replace(dataset, origin=origin), state, made)
        if self._catalog.dataset(plan.dataset.id) is not plan.dataset or self._was_written(plan):
            raise ConflictError(f"{name} changed while the stream came")
        refuse_busy(f"cannot receive into {name}", self._device_users(plan.dataset))
        self._admit_made(plan.dataset, made, plan.target)
        return self._with_content(plan.dataset, state, made)

    def _was_written(self, plan: _Plan) -> bool:
        assert plan.dataset is not None
        assert plan.base is not None
        if self._catalog.newest(plan.dataset) is not plan.base:
            return True
        return plan.dataset.private and self._contents.mtime_ns(plan.dataset.content) != plan.mtime_ns

    def _with_content(self, dataset: DatasetRecord, state: VolumeState, made: list[str]) -> DatasetRecord:
        sized = msgspec.structs.replace(
            dataset,
            content=made[0],
            volsize_bytes=state.volsize_bytes,
            volblocksize_bytes=state.volblocksize_bytes,
        )
        return self._as_private(sized, made[1], made[0]) if len(made) > 1 else sized

    def _admit_made(self, dataset: DatasetRecord, made: list[str], target: SnapshotName) -> None:
        """Refuse what has been written if it is more than a quota or the pool has room for."""
        size_bytes = sum(map(self._contents.allocated, made))
        if size_bytes > self._headroom(dataset) + min(size_bytes, files.free_bytes(self._directory)):
            raise NoSpaceError(f"cannot receive {target}: no space left on device")

    def _discard_made(self, made: list[str]) -> None:
        with self._lock:
            self._discard(made)


class _PeekedSource:
    """A source whose first BEGIN can be looked at before anybody reads it."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._pieces: list[bytes] = []

    def fromguid(self) -> int:
        """Guid of the snapshot the stream builds on, 0 for a full one; told only when its checksum was right."""
        reader = StreamReader()
        while piece := self._source.read(PEEK_BYTES):
            self._pieces.append(piece)
            for frame in reader.feed(piece):
                if frame.type == RecordType.BEGIN:
                    begin = frame.record()
                    assert isinstance(begin, Begin)
                    if begin.header_type == HeaderType.PLAIN:
                        return begin.fromguid
        reader.finish()
        raise BadDataError("the package holds no stream")

    def read(self, size: int = -1, /) -> bytes:
        """What was looked at, then the rest."""
        return self._pieces.pop(0) if self._pieces else self._source.read(size)


class _Metered:
    """A source that stops when what it feeds outgrows its room."""

    def __init__(self, source: _PeekedSource, fd: int, plan: _Plan) -> None:
        self._source, self._fd, self._plan = source, fd, plan
        self._unchecked_bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next piece, or NoSpaceError."""
        piece = self._source.read(size)
        self._unchecked_bytes += len(piece)
        if self._unchecked_bytes >= SPACE_CHECK_BYTES:
            self._unchecked_bytes = 0
            if files.allocated_bytes(self._fd) > self._plan.room_bytes:
                raise NoSpaceError(f"cannot receive {self._plan.target}: no space left on device")
        return piece


def _header(
    name: SnapshotName, snapshot: SnapshotRecord, base: SnapshotRecord | None, flags: SendFlags
) -> StreamHeader:
    block_bytes = snapshot.volblocksize_bytes
    if not (flags.large_blocks or flags.raw):  # as ZFS does: without the feature large blocks come in pieces
        block_bytes = min(block_bytes, BLOCK_SMALL_MAX_BYTES)
    return StreamHeader(
        guid=snapshot.guid,
        toname=str(name),
        volblocksize_bytes=block_bytes,
        creation_s=snapshot.creation_s,
        fromguid=base.guid if base is not None else 0,
        clone=base is not None and base.dataset != snapshot.dataset,
        compression=BlockCompression.LZ4 if flags.compressed or flags.raw else BlockCompression.NONE,
    )


def _write_all(fd: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]
