"""A load generator for HTTP calls over keep-alive connections; run as a process of its own: ``python -m bench.load``."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from typing import cast

import uvloop

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a run of the generator measured."""

    calls_per_s: float
    p50_ms: float
    p99_ms: float


class _Connection(asyncio.Protocol):
    """Sends one request, waits for its whole answer, sends the next, until told to stop."""

    def __init__(self, request: bytes, latencies: list[float], deadline: float) -> None:
        self.request = request
        self.latencies = latencies
        self.deadline = deadline
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class is no subclass of it
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if separator else None
        if length is None or len(body) < int(length[1]):
            return
        if not head.startswith(b"HTTP/1.1 200") or b'"error":null' not in body:
            raise RuntimeError(f"unexpected answer: {self._received[:300]!r}")
        now = time.perf_counter()
        self.latencies.append(now - self._sent_at)
        self._received = b""
        if now < self.deadline:
            self._send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if not self.done.done():
            self.done.set_result(None)


async def _run(port: int, path: str, body: bytes, connections: int, seconds: float) -> LoadResult:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    latencies: list[float] = []
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    protocols = [
        (
            await loop.create_connection(
                lambda: _Connection(head.encode() + body, latencies, started + seconds), "127.0.0.1", port
            )
        )[1]
        for _ in range(connections)
    ]
    await asyncio.wait_for(asyncio.gather(*(p.done for p in protocols)), seconds + 30)
    elapsed = time.perf_counter() - started
    cuts = statistics.quantiles(latencies, n=100)
    return LoadResult(len(latencies) / elapsed, cuts[49] * 1e3, cuts[98] * 1e3)


def main() -> None:
    """Arguments: port, path, body, connections, seconds; prints one JSON line."""
    port, path, body, connections, seconds = sys.argv[1:6]
    result = uvloop.run(_run(int(port), path, body.encode(), int(connections), float(seconds)))
    print(json.dumps([result.calls_per_s, result.p50_ms, result.p99_ms]))


if __name__ == "__main__":
    main()
