"""Fetches against a server that misbehaves: what is terminal, what is tried again, what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_image.fetch import FetchOrder
from agent_image.fetch_http import CancelToken, FetchLimits, HttpBody
from agent_image.fetch_spool import Spool
from agent_image.jobs import JobState
from agent_image.records import ImageStatus
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    ConflictError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    TooLargeError,
    UnavailableError,
    UnsupportedError,
)
from imaging.names import DatasetName, SnapshotName
from tests.fakes.agent_world import MIB, World, disk, open_world
from tests.fakes.image_server import FakeImageServer
from tests.waiting import wait_until

BODY = disk(7, 2 * MIB)

EMPTY_POOL = ["mistify", "mistify/guests", "mistify/images"]


@pytest.fixture
def server() -> Iterator[FakeImageServer]:
    with FakeImageServer() as server:
        yield server


@pytest.fixture
async def world(tmp_path: Path, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("agent_image.workers.BACKOFF_S", 0.01)
    async with open_world(tmp_path / "state", server) as world:
        yield world


async def fetch(world: World, image_id: str = "img", **order: str) -> bytes:
    record = await world.store.request_image(FetchOrder.checked(image_id, **order))
    return world.content(record.snapshot)


# -- what passes after another attempt -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_fetch_server_fails_for_a_while_is_tried_again(
    world: World, server: FakeImageServer, status: int
) -> None:
    server.serve("img", BODY, failures=[status, status])
    assert await fetch(world) == BODY
    assert server.requests[server.path_of("img")] == 3


async def test_fetch_connection_resets_without_ranges_starts_again(world: World, server: FakeImageServer) -> None:
    server.serve("img", BODY, reset_after=[100_000, 1_500_000])
    assert await fetch(world) == BODY
    assert server.requests[server.path_of("img")] == 3


async def test_fetch_connection_resets_with_ranges_goes_on_where_it_was(world: World, server: FakeImageServer) -> None:
    server.serve("img", gzip.compress(BODY, 0), with_etag=True, reset_after=[100_000, 1_500_000])
    assert await fetch(world) == BODY
    path = server.path_of("img")
    assert (server.requests[path], server.ended[path]) == (3, 1)
    ranges = [headers.get("Range") for headers in server.seen_headers]
    assert ranges[0] is None
    assert all(found is not None for found in ranges[1:]), ranges


async def test_fetch_503_for_ever_gives_up_with_the_last_reason(world: World, server: FakeImageServer) -> None:
    server.serve("img", BODY, status=503)
    with pytest.raises(UnavailableError, match="expected 200, received 503"):
        await fetch(world)
    assert server.requests[server.path_of("img")] == 5
    assert world.datasets() == EMPTY_POOL


# -- what does not pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        ({"status": 404}, NotFoundError, "expected 200, received 404"),
        ({"status": 403}, NotPermittedError, "expected 200, received 403"),
        ({"status": 418}, InvalidArgumentError, "expected 200, received 418"),
        ({"status": 204}, InvalidArgumentError, "expected 200, received 204"),
        ({"headers": {"X-Image-Digest": "sha256:" + "1" * 64}}, BadDataError, "not the image that was asked for"),
        ({"headers": {"ETag": '"sha256:' + "1" * 64 + '"'}}, BadDataError, "not the image that was asked for"),
        ({"content_type": "text/html"}, BadDataError, "is not an image"),
        ({"content_type": "application/json"}, BadDataError, "is not an image"),
        ({"body": b"<!DOCTYPE html><html>expired</html>"}, BadDataError, "page of text"),
        ({"body": b""}, BadDataError, "empty"),
        ({"body": gzip.compress(b"")}, BadDataError, "empty"),
        ({"body": gzip.compress(BODY)[:-100]}, BadDataError, "cut off"),
        ({"body": gzip.compress(BODY) + b"junk"}, BadDataError, "damaged|cut off"),
        ({"body": b"QFI\xfb" + BODY}, UnsupportedError, "qcow2"),
        ({"body": gzip.compress(b"QFI\xfb" + BODY)}, UnsupportedError, "qcow2"),
        ({"redirect": "/images/img/download"}, BadDataError, "redirects"),
        ({"redirect": "file:///etc/passwd"}, InvalidArgumentError, "not a valid http URL"),
    ],
)
async def test_fetch_what_can_not_pass_is_terminal_and_leaves_nothing(
    world: World, server: FakeImageServer, behaviour: dict[str, Any], kind: type[MistifyError], words: str
) -> None:
    server.serve("img", **({"body": BODY} | behaviour))
    with pytest.raises(kind, match=words):
        await fetch(world)
    assert server.requests[server.path_of("img")] == (6 if "redirects" in words else 1)
    assert world.datasets() == EMPTY_POOL
    assert await world.store.list_images(pending=True) == []


@pytest.mark.parametrize("behaviour", [{"announce": len(BODY) + 5}, {"end_after": 1 << 20}])
async def test_fetch_shorter_than_announced_is_never_an_image(
    world: World, server: FakeImageServer, behaviour: dict[str, Any]
) -> None:
    server.serve("img", BODY, **behaviour)
    with pytest.raises(UnavailableError, match=r"img/download"):
        await fetch(world)
    assert server.requests[server.path_of("img")] == 5
    assert world.datasets() == EMPTY_POOL


async def test_fetch_longer_than_announced_is_cut_where_the_server_said(world: World, server: FakeImageServer) -> None:
    server.serve("img", BODY, announce=MIB)
    assert await fetch(world) == BODY[:MIB]


async def test_fetch_expected_digest_of_another_kind_is_verified(world: World, server: FakeImageServer) -> None:
    server.serve("img", BODY)
    with pytest.raises(BadDataError):
        await fetch(world, digest="sha512:" + "0" * 128)
    assert await fetch(world, digest=f"sha512:{hashlib.sha512(BODY).hexdigest()}") == BODY


async def test_fetch_redirect_is_followed(world: World, server: FakeImageServer) -> None:
    server.serve("/elsewhere", BODY)
    server.serve("img", redirect="/elsewhere")
    assert await fetch(world) == BODY


async def test_fetch_redirected_elsewhere_does_not_take_the_token_there(
    tmp_path: Path, server: FakeImageServer
) -> None:
    with FakeImageServer() as other:
        server.serve("img", redirect=other.serve("/mirror/img", BODY))
        async with open_world(tmp_path / "state", server, image_service_token="sesame") as world:
            assert await fetch(world) == BODY
        [asked] = other.seen_headers
    assert "sesame" not in str(asked)
    assert all(headers["Authorization"] == "Bearer sesame" for headers in server.seen_headers)


async def test_fetch_of_unknown_length_grows_the_volume(world: World, server: FakeImageServer) -> None:
    body = disk(3, 150 * MIB + 512)
    server.serve("img", body, without_length=True)
    found = await fetch(world)
    assert found[: len(body)] == body
    assert not found[len(body) :].strip(b"\0")
    assert len(found) < len(body) + 64 * 1024


@pytest.mark.parametrize("packed", [False, True])
async def test_fetch_larger_than_the_pool_is_no_space(tmp_path: Path, server: FakeImageServer, *, packed: bool) -> None:
    body = bytes(range(1, 256)) * 4112 * 16
    server.serve("img", gzip.compress(body, 1) if packed else body)
    async with open_world(tmp_path / "state", server, pool_bytes=8 * MIB) as world:
        with pytest.raises(NoSpaceError):
            await fetch(world)
        assert server.requests[server.path_of("img")] == 1
        assert world.datasets() == EMPTY_POOL


async def test_fetch_bomb_ends_at_the_limit(tmp_path: Path, server: FakeImageServer) -> None:
    server.serve("img", gzip.compress(bytes(64 * MIB)))
    limits = FetchLimits(image_max_bytes=16 * MIB, total_s=120)
    async with open_world(tmp_path / "state", server, limits=limits) as world:
        with pytest.raises(TooLargeError, match="larger than"):
            await fetch(world)
        assert world.datasets() == EMPTY_POOL


async def test_fetch_that_hangs_ends_at_the_stall_limit(
    tmp_path: Path, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_image.workers.ATTEMPTS_MAX", 1)
    server.serve("img", BODY, hang_after=100_000)
    async with open_world(tmp_path / "state", server, limits=FetchLimits(stall_s=0.3, total_s=120)) as world:
        with pytest.raises(UnavailableError, match="the connection broke after 100000 bytes"):
            await fetch(world)


async def test_fetch_that_drips_ends_at_the_total_limit(
    tmp_path: Path, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_image.workers.ATTEMPTS_MAX", 1)
    server.serve("img", BODY, piece_bytes=16, pause_s=0.02)
    async with open_world(tmp_path / "state", server, limits=FetchLimits(stall_s=60, total_s=0.5)) as world:
        with pytest.raises(UnavailableError, match="was not fetched within"):
            await fetch(world)


# -- cancel, stop, restart -------------------------------------------------------------------------------------------


def test_cancel_wakes_a_reader_that_waits_for_the_network(tmp_path: Path, server: FakeImageServer) -> None:
    url = server.serve("img", BODY, hang_after=1000)
    cancel = CancelToken()
    with HttpBody(url, FetchLimits(stall_s=300), cancel, {}, Spool(tmp_path, "img")) as body:
        taken = 0
        while taken < 1000:
            taken += len(body.read(1000))
        threading.Timer(0.1, cancel.cancel).start()
        with pytest.raises(ConflictError, match="cancelled"):
            body.read(1000)


async def test_stop_parks_the_job_and_the_next_start_finishes_it(tmp_path: Path, server: FakeImageServer) -> None:
    server.serve("img", BODY, hang_after=500_000)
    async with open_world(tmp_path / "state", server) as world:
        pending = await world.store.request_image(FetchOrder.checked("img", kind="kvm"), wait=False)
        assert pending.status in {ImageStatus.PENDING, ImageStatus.DOWNLOADING}
        waiter = asyncio.ensure_future(fetch(world))
        await asyncio.to_thread(wait_until, lambda: server.requests[server.path_of("img")], "the fetch to begin")
        await world.parts.fetches.stop()
        with pytest.raises(UnavailableError, match="goes on when it starts again"):
            await waiter
        assert [job.state for job in world.parts.queue.list()] == [JobState.WAITING]
        assert world.datasets() == EMPTY_POOL
    server.serve("img", BODY)
    async with open_world(tmp_path / "state", server) as world:
        assert await fetch(world) == BODY
        assert (await world.store.get_image("img")).type == "kvm"


async def test_restart_adopts_an_image_that_had_arrived(tmp_path: Path, server: FakeImageServer) -> None:
    """Killed between the mark and the rename: the bytes are not fetched again."""
    server.serve("img", BODY)
    async with open_world(tmp_path / "state", server) as world:
        await fetch(world)
        record = await world.store.get_image("img")
        world.driver.rename(DatasetName.parse("mistify/images/img"), DatasetName.parse("mistify/images/.incoming-img"))
        world.parts.records.delete("img")
        world.parts.queue.enqueue("image/img", {"id": "img"}, now_s=0.0)
    async with open_world(tmp_path / "state", server) as world:
        assert await fetch(world) == BODY
        assert await world.store.get_image("img") == record
    assert server.requests[server.path_of("img")] == 1


async def test_delete_while_waiting_for_a_worker_takes_the_job_away(tmp_path: Path, server: FakeImageServer) -> None:
    server.serve("first", BODY, hang_after=1000)
    server.serve("second", BODY)
    async with open_world(tmp_path / "state", server, fetchers=1) as world:
        await world.store.request_image(FetchOrder.checked("first"), wait=False)
        await world.store.request_image(FetchOrder.checked("second"), wait=False)
        gone = await world.store.delete_image("second")
        assert (gone.id, gone.status) == ("second", ImageStatus.PENDING)
        await world.store.delete_image("first")
        assert await world.store.list_images(pending=True) == []
        assert server.requests[server.path_of("second")] == 0
        assert world.datasets() == EMPTY_POOL


async def test_published_image_is_readonly_and_carries_its_mark(world: World, server: FakeImageServer) -> None:
    server.serve("img", BODY, headers={"X-Image-Type": "container"})
    await fetch(world)
    info = world.driver.get(DatasetName.parse("mistify/images/img"))
    assert info.properties["readonly"] == "on"
    assert info.properties["mistify:image"] == "img"
    assert info.properties["mistify:type"] == "container"
    assert info.properties["mistify:digest"] == str(Digest.of(BODY))
    assert info.properties["mistify:created-by"].startswith("mistify-agent-image ")
    assert world.driver.get_snapshot(SnapshotName.parse("mistify/images/img@image")).volsize_bytes == len(BODY)
    with pytest.raises(NotPermittedError):
        world.write(info.name, b"x")


@pytest.mark.parametrize("said", ["x" * 65, "k\tvm", "caf\u00a0e"])
async def test_type_that_is_none_is_not_believed(world: World, server: FakeImageServer, said: str) -> None:
    server.serve("img", BODY, headers={"X-Image-Type": said})
    await fetch(world)
    assert (await world.store.get_image("img")).type == ""


@pytest.mark.parametrize("kind", ["x" * 65, "k\nvm", "\ud800"])
def test_order_of_a_type_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a type of image"):
        FetchOrder.checked("img", kind=kind)


def test_source_with_a_password_is_asked_with_it_and_never_shown(tmp_path: Path) -> None:
    with FakeImageServer() as server:
        url = server.serve("/private", b"x", status=404).replace("http://", "http://operator:sesame@")
        body = HttpBody(url, FetchLimits(), CancelToken(), {}, Spool(tmp_path, "img"))
        with pytest.raises(NotFoundError, match="received 404") as refused, body:
            pass
        [asked] = server.seen_headers
    assert asked["Authorization"].startswith("Basic ")
    assert "sesame" not in f"{body.url} {refused.value.message}"
    assert body.url.endswith("/private")
