"""A pipe to an HTTP client: chunk frames written around pieces that the kernel moves, on a thread of its own.

The event loop never touches the bytes, so other requests stay fast while a stream runs flat out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios

from imaging.errors import UnavailableError

PIPE_BYTES = 1 << 20
"""What an unprivileged process may ask for; the producer runs this far ahead."""

STALL_TIMEOUT_S = 300.0
"""A client that takes nothing for so long is gone; the snapshot it holds is let go."""

LOOK_UP_S = 1.0
"""How often a thread that waits for the producer looks whether it is still wanted."""

_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_MORE


def make_pipe() -> tuple[int, int]:
    """Read and write end of a pipe as large as we may have."""
    read_fd, write_fd = os.pipe()
    try:
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except PermissionError:  # over the user's limit of pipe memory: the default size works, only slower
        return read_fd, write_fd
    return read_fd, write_fd


class Splicer:
    """Moves everything from a pipe to a socket that somebody else owns. Closes neither."""

    def __init__(self, pipe_fd: int, client: socket.socket, *, framed: bool) -> None:
        self._pipe = pipe_fd
        self._client = client
        self._framed = framed
        self._stopped = False
        self._writable = select.poll()
        self._writable.register(client, select.POLLOUT)
        self._readable = select.poll()
        self._readable.register(pipe_fd, select.POLLIN)

    def stop(self) -> None:
        """From another thread: end ``run`` with an error soon."""
        self._stopped = True
        with contextlib.suppress(OSError):  # not connected any more
            self._client.shutdown(socket.SHUT_RDWR)

    def run(self) -> int:
        """Blocking: move until the pipe's writers are gone; how many bytes. UnavailableError if the client is."""
        moved_bytes = 0
        try:
            while size_bytes := self._available():
                if self._framed:
                    self._send(b"%x\r\n" % size_bytes)
                self._splice(size_bytes)
                if self._framed:
                    self._send(b"\r\n")
                moved_bytes += size_bytes
        except OSError as err:
            raise UnavailableError("the client went away while a snapshot was sent to it") from err
        return moved_bytes

    def _available(self) -> int:
        """Bytes that wait in the pipe, at least one; 0 at its end."""
        while not self._readable.poll(LOOK_UP_S * 1000):
            if self._stopped:
                raise ConnectionAbortedError(errno.ECONNABORTED, "stopped")
        count: int = struct.unpack("i", fcntl.ioctl(self._pipe, termios.FIONREAD, b"\0\0\0\0"))[0]
        return count

    def _splice(self, size_bytes: int) -> None:
        while size_bytes:
            try:
                size_bytes -= os.splice(self._pipe, self._client.fileno(), size_bytes, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                self._wait_writable()

    def _send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self._client.send(data, socket.MSG_MORE | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait_writable()

    def _wait_writable(self) -> None:
        if not self._writable.poll(STALL_TIMEOUT_S * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "the client takes no data")
