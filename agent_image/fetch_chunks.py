"""A body whose chunks are known by digest: no byte is handed on before its chunk was found right.

A connection that breaks costs the chunk it was in; the next one starts behind the last chunk that was verified. Where one
connection is slower than the reader, several are tried, each with a chunk at a time, and kept if that is faster.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import requests
import urllib3

from agent_image.fetch_http import (
    CONTENT_RANGE,
    PIECE_BYTES,
    RESUMES_MAX,
    RETRYABLE_STATUS,
    CancelToken,
    FetchLimits,
    get_response,
    open_session,
    shut,
    status_error,
)
from agent_image.fetch_spool import BodyFacts, Spool
from imaging.digests import Digest
from imaging.errors import BadDataError, MistifyError, UnavailableError

RANGES_MAX = 4
"""Connections of one fetch: more gain little even over long distances."""

EXTRA_RANGES_MAX = 6
"""Connections beyond each fetch's first, of all fetches together; each may hold a chunk, so this bounds what the agent holds."""

PROBE_CHUNKS = 16
"""How many chunks show how fast a way is: long enough for a connection to reach its speed."""

WORTHWHILE = 1.2
"""Several connections are kept only if they are faster by a fifth: they cost the server and us more."""

WAITING_SHARE = 0.5
"""More than this share of the time spent waiting for bytes means that the network is what is slow."""

WAKE_S = 0.5
"""How often a thread that waits for another one looks whether it is still wanted."""

JOIN_TIMEOUT_S = 90.0
"""A helper whose connection was shut ends at once; one that is just connecting, after the connection's limits."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The chunks of a body: all of ``chunk_bytes`` but the last."""

    digest: Digest
    size_bytes: int
    chunk_bytes: int
    packed: bytes
    """sha256 of each, 32 bytes a chunk."""

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return len(self.packed) // 32

    def place(self, number: int) -> tuple[int, int]:
        """Offset and length of a chunk."""
        offset = number * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.size_bytes - offset)

    def is_right(self, number: int, data: bytes | bytearray) -> bool:
        """Whether this is the chunk."""
        return hashlib.sha256(data).digest() == self.packed[number * 32 : number * 32 + 32]


class RangeBudget:
    """How many connections beyond their first all fetches may have together."""

    def __init__(self, extra_max: int = EXTRA_RANGES_MAX) -> None:
        self._free = extra_max
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """As many as there are, at most ``wanted``."""
        with self._lock:
            granted = min(wanted, self._free)
            self._free -= granted
            return granted

    def give(self, count: int) -> None:
        """Give them back."""
        with self._lock:
            self._free += count


class _Connections:
    """The open responses of one body; another thread may shut them all."""

    def __init__(self) -> None:
        self._open: set[urllib3.HTTPResponse] = set()
        self._lock = threading.Lock()
        self.closed = False

    def add(self, raw: urllib3.HTTPResponse) -> None:
        with self._lock:
            self._open.add(raw)
            if self.closed:
                shut(raw)

    def remove(self, raw: urllib3.HTTPResponse) -> None:
        with self._lock:
            self._open.discard(raw)

    def shutdown(self) -> None:
        """Wake whoever waits for one of them."""
        with self._lock:
            for raw in self._open:
                shut(raw)


@dataclass(frozen=True, slots=True)
class ChunkSource:
    """What every connection of one body shares."""

    url: str
    chunks: ChunkMap
    limits: FetchLimits
    cancel: CancelToken
    headers: Mapping[str, str]
    deadline: float


class RangeReader:
    """One connection, used by one thread at a time: chunks that follow each other come over one response."""

    def __init__(self, source: ChunkSource, connections: _Connections, is_wanted: Callable[[], bool]) -> None:
        self._source = source
        self._connections = connections
        self._is_wanted = is_wanted
        self._session = open_session()
        self._raw: urllib3.HTTPResponse | None = None
        self._next = -1

    def chunk(self, number: int, last: int) -> bytearray:
        """A chunk, verified. A new request asks for everything up to the chunk ``last``.

        Tried again from the chunk's start while that may help: UnavailableError, or BadDataError if it is wrong twice.
        """
        failures = 0
        while True:
            try:
                return self._try(number, last)
            except MistifyError as err:
                self._drop()
                tries_max = 1 if isinstance(err, BadDataError) else RESUMES_MAX
                stopped = not self._is_wanted() or time.monotonic() > self._source.deadline
                if stopped or failures >= tries_max or not (err.retryable or isinstance(err, BadDataError)):
                    raise
                log.info("resuming a fetch", extra={"url": self._source.url, "chunk": number, "why": err.message})
                self._source.cancel.wait(self._source.limits.resume_delay_s * 2**failures)
                failures += 1

    def close(self) -> None:
        """Release the connection."""
        self._drop()
        self._session.close()

    def _drop(self) -> None:
        raw, self._raw, self._next = self._raw, None, -1
        if raw is not None:
            self._connections.remove(raw)
            raw.close()

    def _try(self, number: int, last: int) -> bytearray:
        if self._raw is None or self._next != number:
            self._drop()
            self._raw = self._ask(number, last)
        data = self._read(self._raw, self._source.chunks.place(number)[1])
        if not self._source.chunks.is_right(number, data):
            raise BadDataError(f"chunk {number} of {self._source.url} is not what the server says it is")
        self._next = number + 1
        if number == last:
            self._drop()
        return data

    def _ask(self, number: int, last: int) -> urllib3.HTTPResponse:
        source = self._source
        source.cancel.check()
        (start, _), (end, length) = source.chunks.place(number), source.chunks.place(last)
        asked = {"Range": f"bytes={start}-{end + length - 1}", "If-Range": f'"{source.chunks.digest}"'}
        response = get_response(self._session, source.url, dict(source.headers) | asked, source.limits)
        try:
            _check_answer(response, source, start)
        except MistifyError:
            response.close()
            raise
        raw: urllib3.HTTPResponse = response.raw
        self._connections.add(raw)
        return raw

    def _read(self, raw: urllib3.HTTPResponse, length: int) -> bytearray:
        data = bytearray()
        while len(data) < length:
            self._source.cancel.check()
            if time.monotonic() > self._source.deadline:
                total_s = self._source.limits.total_s
                raise UnavailableError(f"{self._source.url} was not fetched within {total_s:.0f} s")
            try:
                piece = raw.read1(min(PIECE_BYTES, length - len(data)), decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as err:
                self._source.cancel.check()
                raise UnavailableError(f"the connection broke while fetching {self._source.url}") from err
            if not piece:
                self._source.cancel.check()  # a connection that was shut ends like a complete one
                raise UnavailableError(f"the connection ended while fetching {self._source.url}")
            data += piece
        return data


def _check_answer(response: requests.Response, source: ChunkSource, start: int) -> None:
    status = response.status_code
    if status == requests.codes.ok:
        raise UnavailableError(f"{source.url} changed while it was fetched")
    if status in RETRYABLE_STATUS or status != requests.codes.partial_content:
        raise status_error(status, source.url)
    match = CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start or match[3] not in {"*", str(source.chunks.size_bytes)}:
        raise UnavailableError(f"{source.url} gave another range than was asked for")


class _Crew:
    """Several connections that fetch chunks ahead of the reader, each one at a time."""

    def __init__(self, source: ChunkSource, connections: _Connections, first: int, size: int) -> None:
        self._source = source
        self._connections = connections
        self._changed = threading.Condition()
        self._ready: dict[int, bytearray] = {}
        self._failure: BaseException | None = None
        self._next = self._wanted = first
        self._window = size + 1
        self._closed = False
        names = [f"fetch-range-{number}" for number in range(size)]
        self._threads = [threading.Thread(target=self._help, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def take(self, number: int) -> bytearray:
        """The next chunk; raises what a helper ran into."""
        with self._changed:
            self._wanted = number
            self._changed.notify_all()
            while number not in self._ready:
                if self._failure is not None:
                    raise self._failure
                self._source.cancel.check()
                self._changed.wait(WAKE_S)
            self._wanted = number + 1
            self._changed.notify_all()
            return self._ready.pop(number)

    def close(self) -> None:
        """End the helpers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._connections.shutdown()
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)

    def _claim(self) -> int | None:
        """The next chunk to fetch, once it is near enough to the reader; None when there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next < self._wanted + self._window)
            if self._closed or self._failure is not None or self._next >= self._source.chunks.count:
                return None
            self._next += 1
            return self._next - 1

    def _help(self) -> None:
        reader = RangeReader(self._source, self._connections, lambda: not self._closed and not self._connections.closed)
        try:
            while (number := self._claim()) is not None:
                data = reader.chunk(number, number)
                with self._changed:
                    self._ready[number] = data
                    self._changed.notify_all()
        except BaseException as err:  # noqa: BLE001 - handed to the reader, whatever it is
            with self._changed:
                self._failure = self._failure or err
                self._changed.notify_all()
        finally:
            reader.close()


class _Meter:
    """How fast chunks come, and how much of the time is spent waiting for them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Measure anew."""
        self.chunks, self._bytes, self._waited_s, self._since = 0, 0, 0.0, time.monotonic()

    def add(self, size_bytes: int, waited_s: float) -> None:
        """A chunk came."""
        self.chunks += 1
        self._bytes += size_bytes
        self._waited_s += waited_s

    @property
    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._since, 1e-6)

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self._bytes / self._elapsed_s

    @property
    def waiting_share(self) -> float:
        """Share of the time spent waiting for the network."""
        return self._waited_s / self._elapsed_s


class ChunkedBody:
    """A whole body as a blocking source of verified bytes; see the module's docstring. Read by one thread."""

    def __init__(
        self,
        url: str,
        chunks: ChunkMap,
        limits: FetchLimits,
        cancel: CancelToken,
        headers: Mapping[str, str],
        budget: RangeBudget,
        spool: Spool,
    ) -> None:
        self.url = url
        self.expected_bytes: int | None = chunks.size_bytes
        self.digest: Digest | None = chunks.digest
        self.type = ""
        deadline = time.monotonic() + limits.total_s
        self._source = ChunkSource(url, chunks, limits, cancel, dict(headers) | _IDENTITY, deadline)
        self._budget = budget
        self._spool = spool
        self._connections = _Connections()
        self._reader = RangeReader(self._source, self._connections, lambda: not self._connections.closed)
        self._crew: _Crew | None = None
        self._granted = 0
        self._alone_rate = 0.0
        self._decided = False
        self._meter = _Meter()
        self._number = 0
        self._rest = memoryview(b"")

    def __enter__(self) -> ChunkedBody:
        chunks = self._source.chunks
        facts = BodyFacts(
            url=self.url, etag=f'"{chunks.digest}"', size_bytes=chunks.size_bytes, digest=str(chunks.digest)
        )
        if self._spool.find(self.url) != facts:
            self._spool.begin(facts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ranges(self) -> int:
        """Connections at work."""
        return 1 + self._granted

    def wake(self) -> None:
        """From another thread: no more bytes are wanted; a ``read`` that waits for the network ends."""
        self._connections.closed = True
        self._connections.shutdown()

    def close(self) -> None:
        """Release everything; idempotent."""
        self._connections.closed = True
        self._dismiss()
        self._reader.close()

    def read(self, size: int = PIECE_BYTES, /) -> bytes:
        """Up to ``size`` bytes; empty at the end of the whole body."""
        if not self._rest:
            self._rest = memoryview(self._next_chunk())
        piece, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return piece

    def _next_chunk(self) -> bytes | bytearray:
        chunks, cancel = self._source.chunks, self._source.cancel
        cancel.check()
        if self._number >= chunks.count:
            return b""
        kept = self._kept_chunk()
        if kept:
            self._number += 1
            return kept
        self._choose(chunks.count - self._number)
        asked_at = time.monotonic()
        with cancel.closing(self._connections):
            crew = self._crew
            data = crew.take(self._number) if crew else self._reader.chunk(self._number, chunks.count - 1)
        self._meter.add(len(data), time.monotonic() - asked_at)
        self._spool.append(data)
        self._number += 1
        return data

    def _kept_chunk(self) -> bytes:
        """The next chunk, if an earlier attempt left it whole; what is kept behind one that is not right is forgotten."""
        offset, length = self._source.chunks.place(self._number)
        if self._spool.size_bytes <= offset:
            return b""
        data = self._spool.read(length)
        if self._source.chunks.is_right(self._number, data):
            return data
        self._spool.cut(offset)
        return b""

    def _choose(self, left: int) -> None:
        """After every so many chunks, look whether several connections are worth a try, or were worth it."""
        if self._decided or self._meter.chunks < PROBE_CHUNKS:
            return
        if self._crew is not None:
            self._decided = True
            if self._meter.rate < WORTHWHILE * self._alone_rate:
                self._dismiss()
        elif left >= PROBE_CHUNKS and self._meter.waiting_share > WAITING_SHARE:
            self._hire()
        self._meter.restart()

    def _hire(self) -> None:
        self._granted = self._budget.take(RANGES_MAX - 1)
        if self._granted:
            self._alone_rate = self._meter.rate
            self._reader.close()
            self._crew = _Crew(self._source, self._connections, self._number, self.ranges)

    def _dismiss(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()
        self._budget.give(self._granted)
        self._granted = 0


_IDENTITY = {"Accept-Encoding": "identity"}
