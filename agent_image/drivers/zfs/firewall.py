"""Bytes from outside on their way into the kernel: through the validator into a pipe that ``lzc_receive`` reads.

No byte reaches the kernel before the record it belongs to was checked, and the last END only when everything was. If anything
is wrong the pipe is closed without END: the kernel sees a stream that ends early and keeps nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from agent_image.drivers.base import Readable
from agent_image.drivers.zfs.descriptors import keep_only
from imaging.errors import BadDataError, MistifyError, UnavailableError, UnsupportedError, from_os_error
from imaging.sendstream.reader import StreamReader
from imaging.sendstream.records import HEADER_BYTES, Begin, HeaderType, RecordType, parse, payload_size
from imaging.sendstream.state import VolumeState
from imaging.sendstream.validator import Policy, StreamValidator

PIPE_BYTES = 1 << 20
"""What an unprivileged process may ask for; the kernel's default of 64 KiB costs a switch per record."""
READ_BYTES = 1 << 20
"""What is done once per piece costs nothing then, and the pipe holds one piece while the next is checked."""
PARTS_MAX = 1024
"""IOV_MAX of Linux."""
PACKAGE_LIST_MAX_BYTES = 16 << 20
"""The list of a package of one volume has some hundred bytes a snapshot."""
STALL_TIMEOUT_S = 600.0
"""How long the kernel may take nothing: a transaction group of a badly overloaded pool takes tens of seconds."""

log = logging.getLogger(__name__)


class PeekedSource:
    """A source whose first header was looked at already."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._head = b""

    def fromguid(self) -> int:
        """What the stream says it builds on; not covered by a checksum yet, but BadDataError if this is no stream at all."""
        begin = self._begin(0)
        if begin.header_type == HeaderType.PACKAGE:  # its list, its END, then the BEGIN of the first stream
            size = payload_size(RecordType.BEGIN, self._head)
            if size > PACKAGE_LIST_MAX_BYTES:
                raise UnsupportedError(f"the list of the package has {size} bytes, more than {PACKAGE_LIST_MAX_BYTES}")
            begin = self._begin(2 * HEADER_BYTES + size)
        return begin.fromguid

    def _begin(self, offset: int) -> Begin:
        end = offset + HEADER_BYTES
        while len(self._head) < end:
            data = self._source.read(end - len(self._head))
            if not data:
                break
            self._head += data
        reader = StreamReader()
        reader.feed(self._head)
        if len(self._head) < end:
            reader.finish()
        begin = parse(self._head[offset:end])
        if not isinstance(begin, Begin):
            raise BadDataError(f"no stream begins at byte {offset}")
        return begin

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes."""
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._source.read(size)


class _Checked:
    """The bytes of a source that may pass, piece by piece. Of a package, its one stream: the kernel takes only those."""

    def __init__(self, source: Readable, base: VolumeState | None) -> None:
        self._source = source
        self._validator = StreamValidator(base, Policy(base_known=True))
        self._streams = 0
        self._end = b""
        self._inside = False

    def pieces(self) -> Iterator[list[memoryview]]:
        while data := self._source.read(READ_BYTES):
            parts = self._unwrapped(self._validator.feed_views(data))
            if parts:
                yield parts
        parts = self._unwrapped([memoryview(self._validator.finish())])
        yield [*parts, memoryview(self._end)]

    @property
    def guid(self) -> int:
        """Of the snapshot that was sent; after the last piece."""
        return self._validator.summaries[-1].guid

    def _unwrapped(self, parts: list[memoryview]) -> list[memoryview]:
        """Whole records of a package without its wrapping; the stream's END waits for the package's."""
        if not self._validator.is_package:
            return parts
        records, out, position = b"".join(parts), [], 0
        while position < len(records):
            record_type = int.from_bytes(records[position : position + 4], "little")
            size = HEADER_BYTES + payload_size(record_type, records, position)
            out.append(memoryview(self._take(record_type, records[position : position + size])))
            position += size
        return out

    def _take(self, record_type: int, record: bytes) -> bytes:
        if record_type == RecordType.BEGIN:
            return self._take_begin(record)
        if record_type != RecordType.END:
            return record
        if self._inside:
            self._inside, self._end = False, record
        return b""

    def _take_begin(self, record: bytes) -> bytes:
        begin = parse(record[:HEADER_BYTES])
        if isinstance(begin, Begin) and begin.header_type == HeaderType.PACKAGE:
            return b""
        if self._streams:
            raise UnsupportedError("a package of several streams cannot be received, only one stream at a time")
        self._streams, self._inside = 1, True
        return record


def pour(
    source: Readable, base: VolumeState | None, receive: Callable[[int], None], *, keeps: Collection[int] = ()
) -> int:
    """Validate ``source`` and give what may pass to ``receive``, which is called in a thread with a pipe; the stream's guid.

    Of our other descriptors the thread has those it ``keeps``. Raises what is wrong with the source or the stream, else what
    ``receive`` raises.
    """
    checked = _Checked(source, base)
    pieces = checked.pieces()
    first = next(pieces)  # the kernel is not bothered with what is no stream
    with _pipe() as (read_end, write_end):
        receiving = _start(receive, read_end, keeps)
        try:
            try:
                for parts in itertools.chain([first], pieces):
                    _write(write_end, parts)
            finally:
                write_end.close()  # ends the kernel's wait, whatever happened
        except BrokenPipeError as err:
            _result(receiving)
            raise UnavailableError("the kernel stopped reading the stream") from err
        except BaseException:
            _wait_for_refusal(receiving)
            raise
        _result(receiving)
    return checked.guid


def _start(receive: Callable[[int], None], read_end: _End, keeps: Collection[int]) -> Future[None]:
    """Run ``receive`` in a thread that nobody has to wait for: a pool that hangs must not hang its caller for ever.

    The thread has descriptors of its own, or our sudden death would leave it in the kernel for ever: no signal reaches a receive that
    waits for its pipe, and the end we write to is closed only when the last thread that shares it has gone.
    """
    future: Future[None] = Future()
    is_alone = threading.Event()
    read_fd = read_end.fd

    def run() -> None:
        error: BaseException | None = None
        try:
            keep_only({read_fd, *keeps})
            is_alone.set()
            receive(read_fd)
        except BaseException as err:  # noqa: BLE001 - it travels to the caller
            error = err
        if is_alone.is_set():
            os.close(read_fd)  # the last there is: a writer that still writes learns that nobody reads
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
        is_alone.set()

    threading.Thread(target=run, name="zfs-receive", daemon=True).start()
    is_alone.wait()
    read_end.close()
    return future


class _End:
    """One end of a pipe, closed once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[_End, _End]]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    ends = _End(read_fd), _End(write_fd)
    try:
        with contextlib.suppress(OSError):  # more than this machine allows: slower, not wrong
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(write_fd, False)  # ours; the kernel's end must block
        yield ends
    finally:
        for end in ends:
            end.close()


def _write(write_end: _End, parts: Sequence[memoryview]) -> None:
    waiting = deque(part for part in parts if len(part))
    while waiting:
        try:
            written = os.writev(write_end.fd, list(itertools.islice(waiting, PARTS_MAX)))
        except BlockingIOError:
            _wait_writable(write_end)
            continue
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.popleft())
        if written:
            waiting[0] = waiting[0][written:]


def _wait_writable(write_end: _End) -> None:
    poll = select.poll()
    poll.register(write_end.fd, select.POLLOUT)
    if not poll.poll(STALL_TIMEOUT_S * 1000):
        raise UnavailableError(f"the kernel took nothing of the stream for {STALL_TIMEOUT_S:.0f} s")


def _result(receiving: Future[None]) -> None:
    try:
        receiving.result(STALL_TIMEOUT_S)
    except FutureTimeoutError as err:
        raise UnavailableError(f"the kernel did not finish receiving within {STALL_TIMEOUT_S:.0f} s") from err
    except OSError as err:
        raise from_os_error(err, "cannot read the pipe of a stream") from err


def _wait_for_refusal(receiving: Future[None]) -> None:
    """The kernel got no END, so it must fail, and has dropped what it had when this returns. How it says so is not the caller's matter."""
    try:
        _result(receiving)
    except MistifyError as err:
        log.debug("zfs_receive_abandoned", extra={"reason": err.code})
    except Exception:
        log.warning("zfs_receive_failed_unexpectedly", exc_info=True)
