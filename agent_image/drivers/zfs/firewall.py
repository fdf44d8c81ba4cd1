"""Bytes from outside on their way into the kernel: through the validator into a pipe that ``lzc_receive`` reads.

No byte reaches the kernel before the record it belongs to was checked, and the last END only when everything was. If anything
is wrong the pipe is closed without END: the kernel sees a stream that ends early and keeps nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

from agent_image.drivers.base import Readable
from imaging.errors import MistifyError, UnavailableError, UnsupportedError, from_os_error
from imaging.sendstream.reader import StreamReader
from imaging.sendstream.records import HEADER_BYTES, Begin, HeaderType, parse
from imaging.sendstream.state import VolumeState
from imaging.sendstream.validator import Policy, StreamValidator

PIPE_BYTES = 1 << 20
"""What an unprivileged process may ask for; the kernel's default of 64 KiB costs a switch per record."""
READ_BYTES = 256 << 10
"""Large enough for the checksum's arrays, small enough to keep the pipe busy while the next piece is checked."""
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
        while len(self._head) < HEADER_BYTES:
            data = self._source.read(HEADER_BYTES - len(self._head))
            if not data:
                break
            self._head += data
        reader = StreamReader()
        reader.feed(self._head)
        if len(self._head) < HEADER_BYTES:
            reader.finish()
        begin = parse(self._head)
        if not isinstance(begin, Begin) or begin.header_type == HeaderType.PACKAGE:
            raise UnsupportedError("a package of streams cannot be received, only a single stream")
        return begin.fromguid

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes."""
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._source.read(size)


def pour(source: Readable, base: VolumeState | None, receive: Callable[[int], None]) -> int:
    """Validate ``source`` and give what may pass to ``receive``, which is called in a thread with a pipe; the stream's guid.

    Raises what is wrong with the source or the stream, else what ``receive`` raises.
    """
    validator = StreamValidator(base, Policy(base_known=True))
    first = _first_bytes(source, validator)  # the kernel is not bothered with what is no stream
    with _pipe() as (read_end, write_end), ThreadPoolExecutor(1, thread_name_prefix="zfs-receive") as executor:
        receiving = executor.submit(_receive, receive, read_end)
        try:
            try:
                _copy(first, source, validator, write_end)
            finally:
                write_end.close()  # ends the kernel's wait, whatever happened
        except BrokenPipeError as err:
            _result(receiving)
            raise UnavailableError("the kernel stopped reading the stream") from err
        except BaseException:
            _wait_for_refusal(receiving)
            raise
        _result(receiving)
    return validator.summaries[-1].guid


def _first_bytes(source: Readable, validator: StreamValidator) -> bytes:
    while data := source.read(READ_BYTES):
        passed = validator.feed(data)
        if passed:
            return passed
    return validator.finish()


def _receive(receive: Callable[[int], None], read_end: _End) -> None:
    try:
        receive(read_end.fd)
    finally:
        read_end.close()  # a writer that still writes learns that nobody reads


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


def _copy(first: bytes, source: Readable, validator: StreamValidator, write_end: _End) -> None:
    _write(write_end, first)
    while data := source.read(READ_BYTES):
        _write(write_end, validator.feed(data))
    _write(write_end, validator.finish())


def _write(write_end: _End, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(write_end.fd, view) :]
        except BlockingIOError:
            _wait_writable(write_end)


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
    """The kernel got no END, so it must fail, and has dropped what it had when this returns."""
    try:
        _result(receiving)
    except MistifyError as err:
        log.debug("zfs_receive_abandoned", extra={"reason": err.code})
