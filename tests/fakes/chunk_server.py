"""A server of one body by ranges, with faults on order: breaks, wrong bytes, refusals, slow connections."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from agent_image.fetch_chunks import ChunkMap
from imaging.digests import Digest
from tests.fakes.http_fake import FakeHandler, FakeHttp

_RANGE = re.compile(r"bytes=(\d+)-(\d+)\Z")


@dataclass
class Faults:
    """What goes wrong; one entry a request, in the order they come."""

    statuses: list[int] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)
    """End the connection after so many bytes."""
    flip: list[int] = field(default_factory=list)
    """Give a wrong byte at this place of the body, once each."""
    ignore_ranges: bool = False
    shift: int = 0
    """Answer with a range that begins so much later."""
    hang_after: int | None = None
    """Send so many bytes, then nothing until the server is closed."""
    pause_s: float = 0.0
    """Between pieces of a connection: makes several of them faster than one."""
    piece_bytes: int = 64 << 10


class ChunkServer(FakeHttp):
    """Serves ``body`` at ``url``; ``asked`` has the ranges in the order they came."""

    def __init__(self, body: bytes, chunk_bytes: int, **faults: Any) -> None:
        super().__init__(_Handler)
        self.body = body
        self.digest = Digest.of(body)
        packed = [hashlib.sha256(body[at : at + chunk_bytes]).digest() for at in range(0, len(body), chunk_bytes)]
        self.chunks = ChunkMap(self.digest, len(body), chunk_bytes, b"".join(packed))
        self.faults = Faults(**faults)
        self.asked: list[tuple[int, int]] = []
        self.together = 0
        """The most requests answered at the same time."""
        self._answering = 0

    @property
    def url(self) -> str:
        return f"http://{self.address}/images/img/download"

    def note(self, change: int) -> None:
        with self.lock:
            self._answering += change
            self.together = max(self.together, self._answering)


class _Handler(FakeHandler[ChunkServer]):
    def answer(self) -> None:
        fake = self.fake
        fake.note(1)
        try:
            with contextlib.suppress(OSError):
                self._answer(fake)
        finally:
            fake.note(-1)

    def _answer(self, fake: ChunkServer) -> None:
        match = _RANGE.match(self.headers.get("Range", ""))
        start, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(fake.body))
        with fake.lock:
            fake.asked.append((start, end))
            status = fake.faults.statuses.pop(0) if fake.faults.statuses else 0
            stop = fake.faults.break_after.pop(0) if fake.faults.break_after else None
        if status:
            self._head(status, 0, {})
            return
        tag = f'"{fake.digest}"'
        whole = fake.faults.ignore_ranges or match is None or self.headers.get("If-Range", tag) != tag
        if whole:
            start, end = 0, len(fake.body)
        place = {"Content-Range": f"bytes {start + fake.faults.shift}-{end - 1}/{len(fake.body)}", "ETag": tag}
        self._head(200 if whole else 206, end - start, {} if whole else place)
        self._send(fake, start, end, stop)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, fake: ChunkServer, start: int, end: int, stop: int | None) -> None:
        faults = fake.faults
        limit = end if stop is None else min(end, start + stop)
        for at in range(start, limit, faults.piece_bytes):
            if faults.pause_s and fake.closing.wait(faults.pause_s):
                return
            if faults.hang_after is not None and at - start >= faults.hang_after:
                fake.closing.wait()
                return
            self.wfile.write(self._piece(fake, at, min(limit, at + faults.piece_bytes)))
        if limit < end:
            self.close_connection = True

    def _piece(self, fake: ChunkServer, at: int, end: int) -> bytes:
        piece = bytearray(fake.body[at:end])
        with fake.lock:
            for place in {one for one in fake.faults.flip if at <= one < end}:
                fake.faults.flip.remove(place)
                piece[place - at] ^= 1
        return bytes(piece)
