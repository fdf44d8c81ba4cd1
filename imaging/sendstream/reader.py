"""Bytes to records, without input or output: feed pieces of any size, get the records whose checksums hold.

A record is handed out only when the checksum that covers all of it was found right. A record's own checksum covers its header;
its payload is covered by the record after it. So each record waits for the header of the next one, and BEGIN is never seen by
anybody before the record after it was checked. Records whose 32 checksum bytes are zero (old senders) are covered by END alone,
as the format allows; whoever applies records before END must be able to throw the result away in any case.

The checksum runs over whole pieces at once (see :mod:`imaging.sendstream.checksum`), so pieces of some 100 KiB are fast.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple, TypeAlias

import numpy as np

from imaging.errors import BadDataError, MistifyError, UnsupportedError
from imaging.sendstream import backend
from imaging.sendstream.checksum import Buffer, Fletcher4, pack_state
from imaging.sendstream.records import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    MAGIC,
    RECORD_CLASSES,
    SEALED_BYTES,
    Begin,
    HeaderType,
    Record,
    RecordType,
    parse,
    payload_size,
)

_TYPE = struct.Struct("<I")
_BIG_ENDIAN_MAGIC = MAGIC.to_bytes(8, "big")
_BULK_TYPES = (RecordType.WRITE, RecordType.FREE)
_END_USED_BYTES = 40
"""What a package's first END uses; the rest is covered by no checksum and has to be zero."""


class Frame(NamedTuple):
    """A checked record: its header, its payload, and where it stands in the stream.

    ``header`` and ``payload`` are views of the bytes that were fed: do not change those while frames are in use.
    """

    type: int
    header: memoryview
    payload: memoryview
    offset: int
    number: int

    def record(self) -> Record:
        """The header's fields."""
        return parse(self.header)

    @property
    def where(self) -> str:
        """``record 17 (WRITE) at byte 26760``, for messages."""
        return _where(self.number, self.type, self.offset)


class WriteRun(NamedTuple):
    """Several checked WRITE records that differ only in their place: plain blocks of one size, side by side."""

    first: Frame
    view: memoryview
    """All of the records."""
    blocks: int

    @property
    def stride(self) -> int:
        """Bytes from record to record."""
        return len(self.view) // self.blocks

    def frames(self) -> Iterator[Frame]:
        """The records one by one."""
        stride, (kind, _, _, offset, number) = self.stride, self.first
        for index in range(self.blocks):
            start, end = index * stride, (index + 1) * stride
            header, payload = self.view[start : start + HEADER_BYTES], self.view[start + HEADER_BYTES : end]
            yield Frame(kind, header, payload, offset + start, number + index)


Checked: TypeAlias = Frame | WriteRun


def single_frames(checked: Checked) -> Iterator[Frame]:
    """The records one by one."""
    return checked.frames() if isinstance(checked, WriteRun) else iter((checked,))


def _where(number: int, record_type: int, offset: int) -> str:
    name = RecordType(record_type).name if record_type < len(RECORD_CLASSES) else f"type {record_type}"
    return f"record {number} ({name}) at byte {offset}"


class _Phase(Enum):
    START = "the BEGIN of a stream or package"
    PACKAGE_HEAD = "the END of the package's header"
    BETWEEN = "the BEGIN of a stream or the package's END"
    BODY = "a record or END"
    DONE = "nothing"


class StreamReader:
    """Splits a stream or package into checked records.

    Life: ``feed`` any number of times, then ``finish``. After an error the reader must not be used further.

    Errors: BadDataError (damaged, cut off, malformed, bytes after END; says what and where), UnsupportedError (big endian).
    """

    def __init__(self) -> None:
        self._fletcher = Fletcher4()
        self._pieces: list[Buffer] = []
        self._held_bytes = 0
        self._need_bytes = HEADER_BYTES
        self._phase = _Phase.START
        self._in_package = False
        self._base = 0  # stream offset of the first held byte
        self._number = 0  # of the next record
        self._open: tuple[int, memoryview, int, int] | None = None  # type, header, payload size, offset
        self._pending: Frame | None = None  # complete, but not covered by a checksum yet
        # Of the piece being walked: where the unsummed part starts, which checksums to compare, and the first one's record.
        self._mark = 0
        self._checks: list[int] = []
        self._first_checked = 0
        self._ready: list[Checked] = []
        self._native = backend.native

    @property
    def done(self) -> bool:
        """Whether the last END was seen."""
        return self._phase is _Phase.DONE

    def feed(self, data: Buffer) -> list[Frame]:
        """Add a piece; the records that are certain now, in order."""
        return [frame for item in self.feed_runs(data) for frame in single_frames(item)]

    def feed_runs(self, data: Buffer) -> list[Checked]:
        """The same records, but like ones may come together: much faster where whole runs can be looked at."""
        view = memoryview(data)
        ready: list[Checked] = []
        while view:
            if self._phase is _Phase.DONE:
                raise BadDataError(f"data after the end of the stream at byte {self._base}")
            if not self._held_bytes and len(view) >= self._need_bytes:
                return ready + self._walk(view)
            # Complete what was held, and nothing more: what follows is walked where it is.
            piece, view = view[: self._need_bytes - self._held_bytes], view[self._need_bytes - self._held_bytes :]
            self._pieces.append(piece)
            self._held_bytes += len(piece)
            if self._held_bytes == self._need_bytes:
                ready += self._walk(memoryview(b"".join(self._pieces)))
        return ready

    def finish(self) -> None:
        """The input ended; BadDataError if the stream did not."""
        if self._phase is _Phase.DONE:
            return
        end = self._base + self._held_bytes
        if end == 0:
            raise BadDataError("the stream is empty")
        if self._open is not None:
            inside = f"inside {_where(self._number, self._open[0], self._open[3])}"
        else:
            inside = f"inside record {self._number}" if self._held_bytes else f"before record {self._number}"
        raise BadDataError(f"the stream is truncated at byte {end}, {inside}: expected {self._phase.value}")

    # -- walking one buffer --------------------------------------------------------------------------------------------

    def _walk(self, view: memoryview) -> list[Checked]:
        self._mark, self._checks, self._first_checked, self._ready = 0, [], 0, []
        position = self._take_records(view)
        self._settle(view, position)
        rest = view[position:]
        if self._phase is _Phase.DONE and len(rest):
            raise BadDataError(f"data after the end of the stream at byte {self._base + position}")
        self._base += position
        self._pieces = [bytes(rest)] if len(rest) else []
        self._held_bytes = len(rest)
        return self._ready

    def _take_records(self, view: memoryview) -> int:
        """Take whole headers and payloads; where the rest starts, of which ``_need_bytes`` are wanted."""
        position, size = 0, len(view)
        while self._phase is not _Phase.DONE:
            if self._open is None:
                if self._native is not None and self._phase is _Phase.BODY:
                    position = self._take_sound(view, position)
                if size - position < HEADER_BYTES:
                    self._need_bytes = HEADER_BYTES
                    break
                self._take_header(view, position)
                position += HEADER_BYTES
                continue
            record_type, header, payload_bytes, offset = self._open
            if size - position < payload_bytes:
                self._need_bytes = payload_bytes
                break
            payload = view[position : position + payload_bytes]
            position += payload_bytes
            self._open = None
            self._complete(Frame(record_type, header, payload, offset, self._number))
        return position

    def _take_sound(self, view: memoryview, position: int) -> int:
        """Take whole WRITE and FREE records as long as nothing is wrong with them; where the first other one starts."""
        assert self._native is not None
        while len(view) - position >= HEADER_BYTES and view[position] in _BULK_TYPES:
            self._settle(view, position)
            self._fletcher.state, end, runs = self._native.walk(self._fletcher.state, view, position)
            if end == position:
                break
            for start, count, stride in runs:
                self._add_run(view[start : start + count * stride], count, stride, self._base + start)
            self._mark = position = end
        return position

    def _add_run(self, records: memoryview, count: int, stride: int, offset: int) -> None:
        """All but the last are covered by a checksum, and so is what came before them."""
        if self._pending is not None:
            self._ready.append(self._pending)
        (record_type,) = _TYPE.unpack_from(records)
        first = Frame(record_type, records[:HEADER_BYTES], records[HEADER_BYTES:stride], offset, self._number)
        certain, last = count - 1, len(records) - stride
        self._pending = first
        if certain:
            self._ready.append(first if certain == 1 else WriteRun(first, records[:last], certain))
            header, payload = records[last : last + HEADER_BYTES], records[last + HEADER_BYTES :]
            self._pending = Frame(record_type, header, payload, offset + last, self._number + certain)
        self._number += count

    def _take_header(self, view: memoryview, position: int) -> None:
        header = view[position : position + HEADER_BYTES]
        (record_type,) = _TYPE.unpack_from(header)
        offset = self._base + position
        turns = self._phase is not _Phase.BODY or record_type in {RecordType.BEGIN, RecordType.END}
        if turns:
            self._settle(view, position)
        try:
            if turns:
                self._turn(record_type, header)
            payload_bytes = payload_size(record_type, header)
        except MistifyError as err:
            self._distrust(view, position)
            raise type(err)(f"{err.message}: {_where(self._number, record_type, offset)}") from err
        if self._phase is _Phase.BODY and record_type != RecordType.BEGIN:
            if not self._checks:
                self._first_checked = self._number
            self._checks.append(position + SEALED_BYTES)
        if self._pending is not None:
            self._ready.append(self._pending)
            self._pending = None
        self._open = (record_type, header, payload_bytes, offset)

    def _complete(self, frame: Frame) -> None:
        self._number += 1
        if frame.type == RecordType.END:
            self._ready.append(frame)
            self._leave()
        else:
            self._pending = frame

    def _leave(self) -> None:
        """An END is complete: say what may follow."""
        if self._phase is _Phase.BETWEEN or not self._in_package:
            self._phase = _Phase.DONE
        else:
            self._phase = _Phase.BETWEEN

    # -- the order of BEGIN and END --------------------------------------------------------------------------------------

    def _turn(self, record_type: int, header: memoryview) -> None:
        """Records that begin or end something, or stand where something must begin or end; all before is settled."""
        if record_type == RecordType.BEGIN:
            self._begin(header)
        elif record_type != RecordType.END:
            raise BadDataError(f"expected {self._phase.value}")
        elif self._phase is _Phase.BODY:
            self._require_state(header)
        elif self._phase is _Phase.PACKAGE_HEAD:
            self._require_state(header)
            _require_zero(header, _END_USED_BYTES)
        elif self._phase is _Phase.BETWEEN:
            _require_zero(header, 8)
        else:
            raise BadDataError(f"expected {self._phase.value}")

    def _begin(self, header: memoryview) -> None:
        if self._phase not in {_Phase.START, _Phase.BETWEEN}:
            raise BadDataError(f"BEGIN where {self._phase.value} is expected")
        if bytes(header[8:16]) == _BIG_ENDIAN_MAGIC:
            raise UnsupportedError("the stream is big endian")
        begin = parse(header)
        assert isinstance(begin, Begin)
        if begin.magic != MAGIC:
            raise BadDataError("not a ZFS send stream")
        if begin.header_type == HeaderType.PACKAGE and self._phase is _Phase.START:
            self._phase, self._in_package = _Phase.PACKAGE_HEAD, True
        elif begin.header_type == HeaderType.PLAIN:
            self._phase = _Phase.BODY
        else:
            raise BadDataError(f"unexpected header type {begin.header_type}")
        self._fletcher.reset()

    # -- checksums --------------------------------------------------------------------------------------------------------

    def _settle(self, view: memoryview, end: int) -> None:
        """Sum what was not yet, up to ``end``, and compare the records' checksums on the way."""
        positions, start = self._checks, self._mark
        states = self._fletcher.trace(view[start:end], [position - start for position in positions])
        if positions:
            self._compare(view, positions, states)
        self._mark, self._checks, self._first_checked = end, [], 0

    def _require_state(self, end: memoryview) -> None:
        """END's body states the checksum of everything before it."""
        if bytes(end[8 : 8 + CHECKSUM_BYTES]) != pack_state(self._fletcher.state):
            raise BadDataError("checksum mismatch of the whole stream")

    def _compare(
        self, view: memoryview, positions: list[int], states: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
    ) -> None:
        words = np.frombuffer(view, "<u4", len(view) // 4)
        at = np.asarray(positions)[:, None] // 4 + np.arange(CHECKSUM_BYTES // 4)
        stated = np.ascontiguousarray(words[at]).view("<u8")
        wrong = (stated != states).any(axis=1) & stated.any(axis=1)
        if wrong.any():
            first = int(wrong.argmax())
            header = positions[first] - SEALED_BYTES
            (record_type,) = _TYPE.unpack_from(view, header)
            number = self._first_checked + first
            raise BadDataError(f"checksum mismatch: {_where(number, record_type, self._base + header)}")

    def _distrust(self, view: memoryview, position: int) -> None:
        """A header makes no sense: say so only if its checksum holds, otherwise that is what is wrong."""
        if self._phase is _Phase.BODY:
            self._first_checked = self._number - len(self._checks)
            self._checks.append(position + SEALED_BYTES)
            self._settle(view, position + HEADER_BYTES)


def _require_zero(header: memoryview, start: int) -> None:
    if any(header[start:]):
        raise BadDataError("bytes that must be zero are not")
