"""A web server images are fetched from: honest, slow, short, lying, moved, or changed in between, as the test says.

Each path has a :class:`Source`; the server notes the headers of every request and how many bytes it sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

PIECE_BYTES = 64 << 10
WAIT_TIMEOUT_S = 60.0


@dataclass
class Source:
    """What one path answers."""

    content: bytes = b""
    etag: str | None = "auto"
    """``auto`` is the content's digest; None sends none."""
    last_modified: str | None = None
    ranges: bool = True
    """False answers 200 to a Range request."""
    chunked: bool = False
    """No Content-Length."""
    announce: int | None = None
    """A Content-Length that is not true."""
    status: int = 200
    location: str = ""
    break_after: list[int] = field(default_factory=list)
    """For each request in turn: drop the connection after so many bytes."""
    hold_after: int | None = None
    """Send so many bytes, then wait for ``go``."""
    go: threading.Event = field(default_factory=threading.Event)
    endless: bool = False
    content_range: str | None = None
    """A Content-Range that is not true."""
    failures: list[int] = field(default_factory=list)
    """Statuses to answer before the first good answer."""
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    """Body bytes of each answer, in the order they ended."""
    holding: threading.Event = field(default_factory=threading.Event)
    """Set when a request waits for ``go``."""

    @property
    def tag(self) -> str | None:
        """The ETag as sent."""
        return f'"{hashlib.sha256(self.content).hexdigest()}"' if self.etag == "auto" else self.etag


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SourceServer

    def do_GET(self) -> None:
        source = self.server.sources.get(self.path.partition("?")[0])
        self.close_connection = True
        if source is None:
            self.send_error(404)
            return
        with self.server.lock:
            source.requests.append(dict(self.headers))
            failure = source.failures.pop(0) if source.failures else None
            limit = source.break_after.pop(0) if source.break_after else None
        if failure is not None or source.status != 200:
            self._refuse(source, failure or source.status)
            return
        self._send(source, limit)

    def _refuse(self, source: Source, status: int) -> None:
        self.send_response(status)
        if source.location:
            self.send_header("Location", source.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, source: Source, limit: int | None) -> None:
        offset = self._offset(source)
        if offset and offset >= len(source.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(source.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = source.content[offset:]
        self.send_response(206 if offset else 200)
        if source.tag:
            self.send_header("ETag", source.tag)
        if source.last_modified:
            self.send_header("Last-Modified", source.last_modified)
        if offset:
            total = len(source.content)
            self.send_header("Content-Range", source.content_range or f"bytes {offset}-{total - 1}/{total}")
        if source.chunked or source.endless:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) if source.announce is None else source.announce))
        self.end_headers()
        sent = 0
        try:
            for piece in self._pieces(source, body, limit):
                self._write(source, piece)
                sent += len(piece)
            if source.chunked and limit is None:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.log_message("the client went away after %d bytes", sent)
        finally:
            with self.server.lock:
                source.sent.append(sent)

    def _offset(self, source: Source) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if not match or not source.ranges or (condition and condition not in (source.tag, source.last_modified)):
            return 0
        return int(match[1])

    def _pieces(self, source: Source, body: bytes, limit: int | None) -> Iterator[bytes]:
        while source.endless:
            yield b"e" * PIECE_BYTES
        end = len(body) if limit is None else min(limit, len(body))
        start = 0
        if source.hold_after is not None and not source.go.is_set():
            start = min(source.hold_after, end)
            if start:
                yield body[:start]
            source.holding.set()
            source.go.wait(WAIT_TIMEOUT_S)
        for at in range(start, end, PIECE_BYTES):
            yield body[at : min(at + PIECE_BYTES, end)]

    def _write(self, source: Source, piece: bytes) -> None:
        if source.chunked or source.endless:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self.wfile.write(piece)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Kept for the failure message instead of printed."""
        self.server.log.append(format % args)


class SourceServer(http.server.ThreadingHTTPServer):
    """Serves :class:`Source` objects on a free port of 127.0.0.1."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sources: dict[str, Source] = {}
        self.lock = threading.Lock()
        self.log: list[str] = []

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, path: str, source: Source) -> str:
        """Serve ``source`` at ``path``; the whole URL."""
        self.sources[path] = source
        return self.url + path


@contextlib.contextmanager
def start_source_server() -> Iterator[SourceServer]:
    """A running server."""
    with SourceServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            for source in server.sources.values():
                source.go.set()
            server.shutdown()
            thread.join()
