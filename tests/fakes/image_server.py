"""An image server that misbehaves on demand: slow, short, lying, resumable, redirecting. It counts what clients really took."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.http_fake import FakeHandler, FakeHttp

_RANGE = re.compile(r"bytes=(\d+)-\Z")

DEPARTURE_TIMEOUT_S = 30.0
"""How long the server waits for a client to say goodbye after the last byte."""


@dataclass
class Served:
    """One path: what is sent, and what goes wrong."""

    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    failures: list[int] = field(default_factory=list)
    """Statuses to answer with first, one a request."""
    status: int = 200
    redirect: str | None = None
    announce: int | None = None
    """A Content-Length that is a lie."""
    without_length: bool = False
    with_etag: bool = False
    """A strong ETag, and ranges are honoured."""
    reset_after: list[int] = field(default_factory=list)
    """One a request: reset the connection after so many bytes."""
    end_after: int | None = None
    """Close in good order after so many bytes, whatever was announced."""
    hang_after: int | None = None
    """Send so many bytes, then nothing until the server is closed."""
    piece_bytes: int = 64 << 10
    pause_s: float = 0.0
    """Between pieces."""


@dataclass
class Answered:
    """One body that was begun."""

    start: int
    """Offset of its first byte: not 0 for a range."""
    completed: bool = False
    """Whether it was read to its end: the client closed in good order. One that dies with bytes unread resets."""


class FakeImageServer(FakeHttp):
    """Serves ``/images/ID/download`` and any other path it is given."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(_Handler, port)
        self._served: dict[str, Served] = {}
        self.requests: Counter[str] = Counter()
        """Requests by path."""
        self.ended: Counter[str] = Counter()
        """Bodies whose last byte was handed to the network, by path."""
        self.answered: defaultdict[str, list[Answered]] = defaultdict(list)
        """Bodies that were begun, by path, in their order."""
        self._at_work = 0
        self.seen_headers: list[dict[str, str]] = []
        """Of requests for what is served."""

    @property
    def url(self) -> str:
        """http://HOST:PORT."""
        return f"http://{self.address}"

    @staticmethod
    def path_of(image_id: str) -> str:
        """Where the agent looks for an image without a source."""
        return f"/images/{image_id}/download"

    def serve(self, path_or_id: str, body: bytes = b"", **behaviour: Any) -> str:
        """Serve a body under a path (with a slash first) or as an image; the URL."""
        path = path_or_id if path_or_id.startswith("/") else self.path_of(path_or_id)
        self._served[path] = Served(body, **behaviour)
        return f"{self.url}{path}"

    def find(self, path: str) -> Served | None:
        """What is served under a path."""
        return self._served.get(path)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self._at_work == 0

    def at_work(self, change: int) -> None:
        """A request begins (1) or ends (-1)."""
        with self.lock:
            self._at_work += change

    def note(self, counter: Counter[str], path: str) -> None:
        """Count one."""
        with self.lock:
            counter[path] += 1


class _Handler(FakeHandler[FakeImageServer]):
    def answer(self) -> None:
        fake = self.fake
        fake.at_work(1)
        try:
            self._answer(fake)
        finally:
            fake.at_work(-1)

    def _answer(self, fake: FakeImageServer) -> None:
        self.close_connection = True
        fake.note(fake.requests, self.path)
        served = fake.find(self.path)
        if served is not None:
            fake.seen_headers.append(dict(self.headers))
        if served is None:
            self._refuse(404)
        elif served.failures:
            self._refuse(served.failures.pop(0))
        elif served.redirect is not None:
            self._refuse(302, {"Location": served.redirect})
        elif served.status != 200:
            self._refuse(served.status)
        else:
            with contextlib.suppress(OSError):
                self._send_body(fake, served)

    def _refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def _send_body(self, fake: FakeImageServer, served: Served) -> None:
        start = self._send_head(served)
        answered = Answered(start)
        fake.answered[self.path].append(answered)
        reset_after = served.reset_after.pop(0) if served.reset_after else None
        stop = min(
            limit for limit in (len(served.body), reset_after, served.end_after, served.hang_after) if limit is not None
        )
        if not self._send_pieces(fake, served, start, stop):
            return
        if reset_after is not None:
            self._reset()
        elif served.hang_after is not None:
            fake.closing.wait()
        elif stop == len(served.body):
            self._finish(fake, answered)

    def _send_head(self, served: Served) -> int:
        etag = f'"{hashlib.sha256(served.body).hexdigest()}"'
        match = _RANGE.match(self.headers.get("Range", ""))
        ranged = served.with_etag and match is not None and self.headers.get("If-Range", etag) == etag
        start = int(match[1]) if ranged and match is not None else 0
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Type", served.content_type)
        length = len(served.body) - start if served.announce is None else served.announce
        if not served.without_length:
            self.send_header("Content-Length", str(length))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(served.body) - 1}/{len(served.body)}")
        if served.with_etag:
            self.send_header("ETag", etag)
        for name, value in served.headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        return start

    def _send_pieces(self, fake: FakeImageServer, served: Served, start: int, stop: int) -> bool:
        """Whether everything went out before the server was closed."""
        for offset in range(start, stop, served.piece_bytes):
            if served.pause_s and fake.closing.wait(served.pause_s):
                return False
            self.wfile.write(served.body[offset : min(stop, offset + served.piece_bytes)])
        return True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _finish(self, fake: FakeImageServer, answered: Answered) -> None:
        fake.note(fake.ended, self.path)
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DEPARTURE_TIMEOUT_S)
        if self.connection.recv(1) == b"":
            answered.completed = True
