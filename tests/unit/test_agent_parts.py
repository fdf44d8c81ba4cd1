"""Small parts of the agent: locks, space, stages, the image server's address, raw disks as streams, the old table."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_image.fetch_content import stream_snapshot
from agent_image.fetch_pipe import ReadAhead
from agent_image.fetch_raw import stream_of_raw
from agent_image.fetch_server import DEFAULT_PORT, ImageServer, check_source
from agent_image.guests_space import SpaceLedger, thick_volume_bytes
from agent_image.records_kvite import read
from agent_image.store_locks import SubtreeLocks
from agent_image.web_splice import Splicer, make_pipe
from imaging.errors import BadDataError, InvalidArgumentError, NoSpaceError, TooLargeError, UnavailableError
from imaging.names import DatasetName, PoolName
from imaging.sendstream.volume import apply_stream
from tests.waiting import wait_until

A, AB, C = (DatasetName.parse(text) for text in ("p/a", "p/a/b", "p/c"))


# -- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "blocks"),
    [
        (([A], []), ([A], []), True),
        (([A], []), ([AB], []), True),
        (([AB], []), ([A], []), True),
        (([A], []), ([C], []), False),
        (([], [A]), ([], [A]), False),
        (([], [A]), ([AB], []), True),
        (([C], [A]), ([AB], [C]), True),
    ],
)
async def test_locks_writers_exclude_overlapping_subtrees(
    first: tuple[list[DatasetName], list[DatasetName]],
    second: tuple[list[DatasetName], list[DatasetName]],
    *,
    blocks: bool,
) -> None:
    locks = SubtreeLocks()
    entered = asyncio.Event()

    async def enter() -> None:
        async with locks.hold(*second[0], reads=second[1]):
            entered.set()

    async with locks.hold(*first[0], reads=first[1]):
        task = asyncio.create_task(enter())
        for _ in range(10):
            await asyncio.sleep(0)
        assert entered.is_set() is not blocks
    await asyncio.wait_for(task, 30)


async def test_locks_cancelled_waiter_and_holder_leave_nothing_held() -> None:
    locks = SubtreeLocks()

    async def hold_for_ever() -> None:
        async with locks.hold(A):
            await asyncio.Event().wait()

    holder, waiter = asyncio.create_task(hold_for_ever()), asyncio.create_task(hold_for_ever())
    for _ in range(10):
        await asyncio.sleep(0)
    for task in (waiter, holder):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(30), locks.hold(A):
        assert waiter.cancelled()


async def test_locks_many_tasks_never_overlap_and_all_get_their_turn() -> None:
    locks = SubtreeLocks()
    inside: list[DatasetName] = []
    turns = 0

    async def work(name: DatasetName) -> None:
        nonlocal turns
        async with locks.hold(name):
            assert not [other for other in inside if other.is_within(name) or name.is_within(other)]
            inside.append(name)
            await asyncio.sleep(0)
            inside.remove(name)
            turns += 1

    await asyncio.gather(*(work(name) for name in [A, AB, C] * 30))
    assert turns == 90


# -- space -----------------------------------------------------------------------------------------------------------


def test_space_promise_shrinks_as_it_is_taken() -> None:
    left = [100]
    ledger = SpaceLedger(lambda: left[0])
    with ledger.promise(60) as promise:
        with pytest.raises(NoSpaceError, match=r"^no space left on device$"):
            ledger.check(50)
        ledger.check(40)
        left[0] -= 30
        promise.taken(30)
        ledger.check(40)
        with pytest.raises(NoSpaceError), ledger.promise(41):
            pass
        promise.taken(1000)
        ledger.check(70)
    ledger.check(70)
    with pytest.raises(NoSpaceError):
        ledger.check(71)


def test_thick_volume_bytes_is_what_zfs_reserves() -> None:
    assert (
        thick_volume_bytes(1 << 30, 8192) == 1_109_393_408
    )  # refreservation of a 1 GiB volume on one disk, shown as 1.03G
    assert thick_volume_bytes(10 << 20, 8192) > 10 << 20


# -- stages ----------------------------------------------------------------------------------------------------------


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=50), max_size=20),
    sizes=st.lists(st.integers(min_value=-1, max_value=60).filter(bool), min_size=1, max_size=10),
    peek=st.integers(min_value=0, max_value=100),
)
def test_read_ahead_gives_the_same_bytes_in_any_pieces(pieces: list[bytes], sizes: list[int], peek: int) -> None:
    class Source:
        def __init__(self) -> None:
            self.left = list(pieces)

        def read(self, _size: int = -1, /) -> bytes:
            return self.left.pop(0) if self.left else b""

    whole = b"".join(pieces)
    found = b""
    with ReadAhead(Source(), "test", ahead_max_bytes=64) as stage:
        assert stage.peek(peek) == whole[:peek]
        for turn in range(10_000):
            size = sizes[turn % len(sizes)]
            piece = stage.read(size)
            assert size < 0 or len(piece) <= size
            if not piece:
                break
            found += piece
        assert stage.read() == b""
    assert found == whole


def test_read_ahead_holds_no_more_than_it_may() -> None:
    taken = 0

    class Endless:
        def read(self, size: int = -1, /) -> bytes:
            nonlocal taken
            taken += size
            return bytes(size)

    with ReadAhead(Endless(), "test", piece_bytes=10, ahead_max_bytes=100) as stage:
        wait_until(lambda: taken >= 100, "the stage to fill up")
        assert stage.read(10) == bytes(10)
    assert taken <= 130


def test_read_ahead_error_of_the_source_comes_after_what_was_read() -> None:
    class Breaks:
        calls = 0

        def read(self, _size: int = -1, /) -> bytes:
            self.calls += 1
            if self.calls > 2:
                raise UnavailableError("broke")
            return b"x"

    with ReadAhead(Breaks(), "test") as stage:
        assert stage.peek(1) == b"x"
        assert stage.read() + stage.read() == b"xx"
        with pytest.raises(UnavailableError, match="broke"):
            stage.read()
        assert isinstance(stage.failure, UnavailableError)


# -- raw disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size_bytes", [1, 512, 16 << 10, (1 << 20) + 512, 5 << 20])
def test_stream_of_raw_makes_the_same_disk_padded_to_blocks(size_bytes: int, *, known: bool) -> None:
    body = (os.urandom(100_000) + bytes(300_000))[:size_bytes].ljust(size_bytes, b"\7")
    stream = stream_of_raw(
        io.BytesIO(body),
        "p/images/x@image",
        size_bytes=size_bytes if known else None,
        size_max_bytes=1 << 30,
    )
    with tempfile.TemporaryFile() as file:
        apply_stream(stream, file.fileno(), None)
        file.seek(0)
        found = file.read()
    assert found[:size_bytes] == body
    assert not found[size_bytes:].strip(b"\0")
    assert len(found) % (16 << 10) == 0


def test_stream_of_raw_too_large_or_empty_is_refused() -> None:
    def make(body: bytes, size_bytes: int | None) -> bytes:
        source = io.BytesIO(body)
        stream = stream_of_raw(source, "p/x@i", size_bytes=size_bytes, size_max_bytes=100)
        return b"".join(iter(stream.read, b""))

    for size_bytes in (101, None):
        with pytest.raises(TooLargeError):
            make(bytes(101), size_bytes)
    with pytest.raises(BadDataError):
        make(b"", None)


def test_stream_snapshot_of_something_else_is_none() -> None:
    for body in (b"", b"x", bytes(1000)):
        with ReadAhead(io.BytesIO(body), "test") as stage:
            assert stream_snapshot(stage) is None


# -- the image server ------------------------------------------------------------------------------------------------


def _no_lookup(_host: str) -> None:
    raise AssertionError("the DNS was asked")


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("images.example:8080", "http://images.example:8080"),
        ("http://images.example:8080/", "http://images.example:8080"),
        ("https://images.example:443", "https://images.example:443"),
        ("10.0.0.1", f"http://10.0.0.1:{DEFAULT_PORT}"),
        ("[::1]", f"http://[::1]:{DEFAULT_PORT}"),
        ("[::1]:99", "http://[::1]:99"),
        ("localhost", f"http://localhost:{DEFAULT_PORT}"),
    ],
)
def test_image_server_with_port_or_literal_asks_no_dns(address: str, base: str) -> None:
    assert ImageServer(address, lookup=_no_lookup).base_url() == base


@pytest.mark.parametrize(
    ("lookup", "base"),
    [
        (lambda _host: ("node7.example", 20123), "http://node7.example:20123"),
        (lambda _host: None, f"http://images.example:{DEFAULT_PORT}"),
    ],
)
def test_image_server_without_port_follows_its_srv_record(
    lookup: Callable[[str], tuple[str, int] | None], base: str
) -> None:
    assert ImageServer("images.example", lookup=lookup).url("i", "") == f"{base}/images/i/download"


@pytest.mark.parametrize("address", ["", "ftp://x", "x:99999", "x:y", "http://x/path", "user@x:1", "x y:1", "[::1"])
def test_image_server_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgumentError):
        ImageServer(address)


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("", "http://s:1/images/i/download"),
        ("a/b.img", "http://s:1/a/b.img"),
        ("/a/b.img?x=1", "http://s:1/a/b.img?x=1"),
        ("../../a", "http://s:1/a"),
        ("http://other:2/x", "http://other:2/x"),
        ("https://other/x", "https://other/x"),
    ],
)
def test_image_server_source_becomes_a_url(source: str, url: str) -> None:
    server = ImageServer("s:1", token="t")
    assert server.url("i", source) == url
    assert bool(server.headers_for(url)) is url.startswith("http://s:1/")


@pytest.mark.parametrize(
    "source", ["file:///etc/passwd", "gopher://x", "//evil/x", "http:///x", "http://x:0/", "a b", "a\nb", "x" * 5000]
)
def test_check_source_of_another_kind_is_refused(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a valid source"):
        check_source(source)


# -- the old table and the splicer -----------------------------------------------------------------------------------


def test_old_table_that_is_no_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / ".images.db"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(BadDataError, match="not an image table"):
        read(path, PoolName.parse("mistify"))


@pytest.mark.parametrize("framed", [True, False])
def test_splicer_moves_everything_and_frames_it(*, framed: bool) -> None:
    body = os.urandom(3_000_000)
    read_fd, write_fd = make_pipe()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    received: list[bytes] = []

    def produce() -> None:
        with os.fdopen(write_fd, "wb") as pipe:
            pipe.write(body)

    def consume() -> None:
        received.extend(iter(lambda: theirs.recv(65536), b""))

    threads = [threading.Thread(target=produce), threading.Thread(target=consume)]
    for thread in threads:
        thread.start()
    try:
        assert Splicer(read_fd, ours, framed=framed).run() == len(body)
    finally:
        ours.close()
        for thread in threads:
            thread.join(60)
        theirs.close()
        os.close(read_fd)
    found = b"".join(received)
    assert (_unframe(found) if framed else found) == body


def _unframe(data: bytes) -> bytes:
    out, at = [], 0
    while at < len(data):
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        out.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
        assert data[at - 2 : at] == b"\r\n"
    return b"".join(out)


def test_splicer_client_that_goes_away_is_unavailable() -> None:
    read_fd, write_fd = make_pipe()
    ours, theirs = socket.socketpair()
    theirs.close()
    try:
        os.write(write_fd, b"x")
        with pytest.raises(UnavailableError, match="went away"):
            Splicer(read_fd, ours, framed=True).run()
    finally:
        ours.close()
        os.close(read_fd)
        os.close(write_fd)
