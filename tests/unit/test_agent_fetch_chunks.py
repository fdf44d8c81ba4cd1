"""Bytes by verified chunks: nothing wrong is handed on, a break costs one chunk, several connections only where they help."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from agent_image import fetch_chunks
from agent_image.fetch_chunks import EXTRA_RANGES_MAX, RANGES_MAX, ChunkedBody, RangeBudget
from agent_image.fetch_http import CancelToken, FetchLimits
from agent_image.fetch_spool import Spool
from imaging.errors import BadDataError, ConflictError, MistifyError, NotFoundError, UnavailableError
from tests.fakes.chunk_server import ChunkServer
from tests.waiting import wait_until

CHUNK = 64 << 10
LIMITS = FetchLimits(connect_s=10, stall_s=20, total_s=120, resume_delay_s=0.001)


def some_bytes(chunks: int, more: int = 0) -> bytes:
    return random.Random(chunks).randbytes(chunks * CHUNK + more)


@contextmanager
def opened(
    server: ChunkServer, cancel: CancelToken | None = None, budget: RangeBudget | None = None
) -> Iterator[ChunkedBody]:
    with TemporaryDirectory() as directory, Spool(Path(directory), "img") as spool, server:
        made = ChunkedBody(
            server.url, server.chunks, LIMITS, cancel or CancelToken(), {}, budget or RangeBudget(), spool
        )
        with made as body:
            yield body


def read_all(body: ChunkedBody, size: int = 10_000) -> bytes:
    return b"".join(iter(lambda: body.read(size), b""))


def read_until_error(body: ChunkedBody) -> tuple[bytes, MistifyError | None]:
    handed = b""
    try:
        while piece := body.read(5000):
            handed += piece
    except MistifyError as err:
        return handed, err
    return handed, None


@pytest.mark.parametrize(("chunks", "more"), [(0, 1), (1, 0), (3, 7), (20, 0)])
def test_body_without_faults_is_one_request(chunks: int, more: int) -> None:
    data = some_bytes(chunks, more)
    server = ChunkServer(data, CHUNK)
    with opened(server, budget=RangeBudget(0)) as body:
        assert body.expected_bytes == len(data)
        assert read_all(body) == data
        assert body.read() == b""
    assert server.asked == [(0, len(data))]


def test_body_that_breaks_goes_on_behind_the_last_verified_chunk() -> None:
    data = some_bytes(10, 5)
    server = ChunkServer(data, CHUNK, break_after=[CHUNK * 3 + 17, 0, CHUNK - 1, CHUNK * 2])
    with opened(server, budget=RangeBudget(0)) as body:
        assert read_all(body) == data
    assert [start for start, _ in server.asked] == [0, 3 * CHUNK, 3 * CHUNK, 3 * CHUNK, 5 * CHUNK]


def test_body_refused_for_a_while_is_asked_for_again() -> None:
    data = some_bytes(3)
    server = ChunkServer(data, CHUNK, statuses=[503, 500, 429])
    with opened(server) as body:
        assert read_all(body) == data
    assert len(server.asked) == 4


def test_wrong_byte_costs_its_chunk_and_is_never_handed_on() -> None:
    data = some_bytes(6)
    server = ChunkServer(data, CHUNK, flip=[2 * CHUNK + 9])
    with opened(server, budget=RangeBudget(0)) as body:
        assert read_all(body) == data
    assert [start for start, _ in server.asked] == [0, 2 * CHUNK]


def test_chunk_that_stays_wrong_ends_the_body_before_it() -> None:
    data = some_bytes(6)
    place = 2 * CHUNK + 9
    server = ChunkServer(data, CHUNK, flip=[place, place, place])
    with opened(server, budget=RangeBudget(0)) as body:
        handed, error = read_until_error(body)
    assert isinstance(error, BadDataError)
    assert "chunk 2 of" in error.message
    assert handed == data[: 2 * CHUNK]


@pytest.mark.parametrize(
    ("faults", "kind", "words"),
    [
        ({"ignore_ranges": True}, UnavailableError, "changed while"),
        ({"shift": 1}, UnavailableError, "another range"),
        ({"statuses": [404]}, NotFoundError, "received 404"),
        ({"statuses": [503] * 9}, UnavailableError, "received 503"),
        ({"break_after": [0] * 9}, UnavailableError, "the connection (broke|ended)"),
    ],
)
def test_server_that_does_not_recover_ends_the_body(
    faults: dict[str, object], kind: type[MistifyError], words: str
) -> None:
    with opened(ChunkServer(some_bytes(3), CHUNK, **faults)) as body, pytest.raises(kind, match=words):
        body.read()


def test_cancel_wakes_a_body_that_waits() -> None:
    server, cancel = ChunkServer(some_bytes(4), CHUNK, hang_after=2 * CHUNK), CancelToken()
    with opened(server, cancel) as body:
        assert len(body.read(CHUNK)) == CHUNK
        assert len(body.read(CHUNK)) == CHUNK
        caught: list[BaseException] = []
        reader = threading.Thread(target=lambda: caught.append(_error_of(body)))
        reader.start()
        cancel.cancel()
        reader.join(30)
        assert not reader.is_alive()
    assert isinstance(caught[0], ConflictError), caught


def _error_of(body: ChunkedBody) -> BaseException:
    with pytest.raises(MistifyError) as caught:
        body.read()
    return caught.value


# -- several connections ---------------------------------------------------------------------------------------------


def slow_server(chunks: int, **faults: object) -> ChunkServer:
    """Each connection is slow by itself, so that several are faster."""
    return ChunkServer(some_bytes(chunks), CHUNK, pause_s=0.01, piece_bytes=16 << 10, **faults)


def test_several_connections_are_used_where_one_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_chunks, "PROBE_CHUNKS", 4)
    server, budget = slow_server(60), RangeBudget()
    with opened(server, budget=budget) as body:
        most, pieces = 1, []
        while piece := body.read(CHUNK):
            pieces.append(piece)
            most = max(most, body.ranges)
        assert b"".join(pieces) == server.body
        assert most == RANGES_MAX
    assert 1 < server.together <= RANGES_MAX + 1  # the first connection may still be ending
    assert budget.take(100) == EXTRA_RANGES_MAX


def test_several_connections_that_are_no_faster_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_chunks, "PROBE_CHUNKS", 4)
    monkeypatch.setattr(fetch_chunks, "WORTHWHILE", 1e9)
    server, budget = slow_server(40), RangeBudget()
    with opened(server, budget=budget) as body:
        assert read_all(body) == server.body
        assert body.ranges == 1
        assert budget.take(100) == EXTRA_RANGES_MAX
    assert server.asked[-1][1] == len(server.body)
    assert server.asked[-1][1] - server.asked[-1][0] > CHUNK


def test_one_connection_stays_where_no_more_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_chunks, "PROBE_CHUNKS", 4)
    server = slow_server(20)
    with opened(server, budget=RangeBudget(0)) as body:
        assert read_all(body) == server.body
    assert len(server.asked) == 1


def test_several_connections_recover_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_chunks, "PROBE_CHUNKS", 4)
    breaks = [100 * CHUNK] + [CHUNK, CHUNK // 2] * 5
    server = slow_server(50, break_after=breaks, flip=[30 * CHUNK + 1])
    with opened(server) as body:
        assert read_all(body) == server.body


def test_several_connections_tell_what_one_ran_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_chunks, "PROBE_CHUNKS", 4)
    place = 30 * CHUNK
    server, budget = slow_server(50, flip=[place] * 3), RangeBudget()
    with opened(server, budget=budget) as body:
        handed, error = read_until_error(body)
    assert isinstance(error, BadDataError)
    assert "chunk 30 of" in error.message
    assert server.body.startswith(handed)
    assert len(handed) <= place
    assert budget.take(100) == EXTRA_RANGES_MAX


def test_body_closed_in_the_middle_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_chunks, "PROBE_CHUNKS", 4)
    server = slow_server(80)
    with opened(server) as body:
        while body.ranges == 1:
            assert body.read(CHUNK)
    wait_until(lambda: not helpers(), "helpers to end")


def helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-range")]
