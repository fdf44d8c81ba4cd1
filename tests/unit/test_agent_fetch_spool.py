"""What is kept of a download: used again where it can be relied on, never where it cannot, and never in anybody's way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_image import fetch_spool
from agent_image.app import SPOOL_NAME
from agent_image.fetch import FetchOrder
from agent_image.fetch_chunks import ChunkedBody, RangeBudget
from agent_image.fetch_http import CancelToken
from agent_image.fetch_spool import BodyFacts, Spool, Spools
from imaging import files
from imaging.digests import Digest
from tests.fakes.agent_world import LIMITS, MIB, World, disk, open_world
from tests.fakes.chunk_server import ChunkServer
from tests.fakes.image_server import FakeImageServer
from tests.waiting import wait_until

BODY = disk(7, 2 * MIB)
HALF = 1_000_000
CHUNK = 64 << 10


@pytest.fixture
def server() -> Iterator[FakeImageServer]:
    with FakeImageServer() as server:
        yield server


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path, "img")


def keep(spool: Spool, url: str, data: bytes, **facts: Any) -> BodyFacts:
    """As if a fetch of ``data`` had died."""
    kept = BodyFacts(url=url, **facts)
    with spool:
        spool.begin(kept)
        spool.append(data)
    return kept


async def fetch(world: World, **order: str) -> bytes:
    record = await world.store.request_image(FetchOrder.checked("img", **order))
    return world.content(record.snapshot)


def starts(server: FakeImageServer) -> list[int]:
    """Where the downloads of the image began."""
    return [one.start for one in server.answered[server.path_of("img")]]


async def stopped_half_way(state_dir: Path, server: FakeImageServer, **behaviour: Any) -> int:
    """A fetch that is parked by a stop; how much is kept of it."""
    server.serve("img", BODY, hang_after=HALF, **behaviour)
    part = state_dir / SPOOL_NAME / "img.part"
    async with open_world(state_dir, server) as world:
        await world.store.request_image(FetchOrder.checked("img"), wait=False)
        await world.parts.changes(
            wait_until, lambda: part.exists() and part.stat().st_size == HALF, "half of the image to be kept"
        )
    return part.stat().st_size


async def test_fetch_after_a_stop_asks_for_the_rest_only(tmp_path: Path, server: FakeImageServer) -> None:
    kept = await stopped_half_way(tmp_path / "state", server, with_etag=True)
    server.serve("img", BODY, with_etag=True)
    async with open_world(tmp_path / "state", server) as world:
        assert await fetch(world) == BODY
    assert starts(server) == [0, kept]
    assert list((tmp_path / "state" / SPOOL_NAME).iterdir()) == []


@pytest.mark.parametrize("changed", [False, True])
async def test_fetch_that_can_not_go_on_starts_again(tmp_path: Path, server: FakeImageServer, *, changed: bool) -> None:
    """The server gives no ETag, or has another body by now."""
    await stopped_half_way(tmp_path / "state", server, with_etag=changed)
    body = disk(8, 2 * MIB) if changed else BODY
    server.serve("img", body, with_etag=changed)
    async with open_world(tmp_path / "state", server) as world:
        assert await fetch(world) == body
    assert starts(server)[-1] == 0


async def test_body_that_is_all_there_is_not_asked_for(tmp_path: Path, server: FakeImageServer) -> None:
    """Killed between the last byte and the mark."""
    url = server.serve("img", b"", status=500)
    async with open_world(tmp_path / "state", server) as world:
        keep(Spool(tmp_path / "state" / SPOOL_NAME, "img"), url, BODY, size_bytes=len(BODY), kind="container")
        assert await fetch(world) == BODY
        assert (await world.store.get_image("img")).type == "container"
    assert server.requests[server.path_of("img")] == 0


async def test_kept_bytes_that_are_damaged_cost_another_download(tmp_path: Path, server: FakeImageServer) -> None:
    digest = str(Digest.of(BODY))
    url = server.serve("img", BODY, with_etag=True, headers={"X-Image-Digest": digest})
    async with open_world(tmp_path / "state", server) as world:
        damaged = b"\xff" + BODY[1:]
        keep(Spool(tmp_path / "state" / SPOOL_NAME, "img"), url, damaged, size_bytes=len(BODY), digest=digest)
        assert await fetch(world) == BODY
    assert starts(server) == [0]


async def test_delete_of_a_pending_image_and_start_without_its_job_leave_nothing(
    tmp_path: Path, server: FakeImageServer
) -> None:
    directory = tmp_path / "state" / SPOOL_NAME
    await stopped_half_way(tmp_path / "state", server, with_etag=True)
    assert {path.name for path in directory.iterdir()} == {"img.part", "img.json"}
    for name in ("other.part", "other.json", ".tmp-1234"):
        (directory / name).write_bytes(b"x")
    async with open_world(tmp_path / "state", server) as world:
        assert {path.name for path in directory.iterdir()} == {"img.part", "img.json"}
        await world.store.delete_image("img")
        assert list(directory.iterdir()) == []


# -- what may be relied on -------------------------------------------------------------------------------------------


def test_kept_body_is_found_as_it_was_left(spool: Spool) -> None:
    facts = keep(spool, "http://a/x", b"abcdef", etag='"1"', size_bytes=9, kind="kvm")
    assert spool.find("http://a/x") == facts
    assert (spool.size_bytes, spool.read(4), spool.read(4), spool.read(4)) == (6, b"abcd", b"ef", b"")
    spool.append(b"ghi")
    assert spool.find("http://a/x") == facts
    assert spool.read(100) == b"abcdefghi"


def test_kept_body_of_another_url_is_not_found(spool: Spool) -> None:
    keep(spool, "http://a/x", b"abc")
    assert spool.find("http://a/y") is None
    assert spool.size_bytes == 0


@pytest.mark.parametrize("digest", ["", str(Digest.of(b"abc"))])
def test_kept_body_of_another_run_of_the_machine_needs_a_digest(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    """Nothing was synced: only a digest tells whether the bytes are what they were."""
    keep(spool, "http://a/x", b"abc", digest=digest)
    other = tmp_path / "boot_id"
    other.write_text("another\n")
    monkeypatch.setattr(files, "BOOT_ID_PATH", other)
    assert (spool.find("http://a/x") is not None) == bool(digest)


@pytest.mark.parametrize("text", [b"", b"{", b'{"facts":{"url":"http://a/x"}}', b"\x00" * 100])
def test_damaged_facts_are_as_good_as_none(spool: Spool, tmp_path: Path, text: bytes) -> None:
    keep(spool, "http://a/x", b"abc")
    (tmp_path / "img.json").write_bytes(text)
    assert spool.find("http://a/x") is None


def test_little_room_keeps_nothing_and_frees_what_was_kept(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with spool:
        spool.begin(BodyFacts(url="http://a/x"))
        spool.append(b"abc")
        monkeypatch.setattr(fetch_spool, "FREE_MIN_BYTES", 1 << 60)
        spool.append(b"def")
        assert list(tmp_path.iterdir()) == []
        spool.append(b"ghi")
        spool.begin(BodyFacts(url="http://a/x"))
        assert list(tmp_path.iterdir()) == []
    assert spool.find("http://a/x") is None


def test_body_that_leaves_no_room_for_its_volume_is_not_kept(spool: Spool, tmp_path: Path) -> None:
    spool.begin(BodyFacts(url="http://a/x", size_bytes=1 << 59))
    assert list(tmp_path.iterdir()) == []


def test_place_that_can_not_be_written_keeps_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"a file where the directory should be")
    with Spool(blocked / "below", "img") as spool:
        spool.begin(BodyFacts(url="http://a/x"))
        spool.append(b"abc")
        assert spool.size_bytes == 0
        assert spool.read(10) == b""


def test_keep_only_without_a_directory_is_fine(tmp_path: Path) -> None:
    Spools(tmp_path / "absent").keep_only({"img"})
    assert list(tmp_path.iterdir()) == []


# -- by chunks -------------------------------------------------------------------------------------------------------


def read_chunked(server: ChunkServer, spool: Spool) -> bytes:
    with spool:
        made = ChunkedBody(server.url, server.chunks, LIMITS, CancelToken(), {}, RangeBudget(0), spool)
        with made as body:
            return b"".join(iter(lambda: body.read(10_000), b""))


@pytest.mark.parametrize(
    ("kept_bytes", "damaged_at", "start"),
    [(5 * CHUNK, None, 5 * CHUNK), (5 * CHUNK + 9, None, 5 * CHUNK), (5 * CHUNK, 3 * CHUNK + 1, 3 * CHUNK)],
)
def test_chunks_that_are_kept_and_right_are_not_asked_for(
    spool: Spool, kept_bytes: int, damaged_at: int | None, start: int
) -> None:
    data = random.Random(5).randbytes(10 * CHUNK + 7)
    kept = bytearray(data[:kept_bytes])
    if damaged_at is not None:
        kept[damaged_at] ^= 1
    with ChunkServer(data, CHUNK) as server:
        digest = str(server.digest)
        keep(spool, server.url, bytes(kept), etag=f'"{digest}"', size_bytes=len(data), digest=digest)
        assert read_chunked(server, spool) == data
        assert server.asked == [(start, len(data))]
        assert read_chunked(server, spool) == data
        assert len(server.asked) == 1


def test_chunks_of_another_version_are_asked_for_anew(spool: Spool) -> None:
    data = random.Random(6).randbytes(3 * CHUNK)
    with ChunkServer(data, CHUNK) as server:
        digest = str(Digest.of(b"an older version"))
        keep(spool, server.url, data[:CHUNK], etag=f'"{digest}"', size_bytes=len(data), digest=digest)
        assert read_chunked(server, spool) == data
        assert server.asked == [(0, len(data))]
