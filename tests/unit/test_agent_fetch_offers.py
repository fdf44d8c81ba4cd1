"""Which form of an image is taken when the image service refuses, is busy, or answers nonsense."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_image import fetch_service
from agent_image.fetch import FetchOrder
from imaging.digests import Digest
from imaging.errors import BadDataError
from imaging.sendstream.volume import StreamHeader, make_stream_from
from tests.fakes.agent_world import MIB, World, disk, open_world
from tests.fakes.image_server import FakeImageServer

BODY = disk(7, 2 * MIB)
ZVOL = "?format=zvol"


@pytest.fixture
def server() -> Iterator[FakeImageServer]:
    with FakeImageServer() as server:
        yield server


@pytest.fixture
async def world(tmp_path: Path, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("agent_image.workers.BACKOFF_S", 0.01)
    async with open_world(tmp_path / "state", server) as world:
        yield world


def stream() -> bytes:
    header = StreamHeader(guid=4711, toname="volume@image", volblocksize_bytes=16 << 10)
    return b"".join(make_stream_from(io.BytesIO(BODY), header))


def serve_image(server: FakeImageServer, stored: bytes = BODY, **facts: Any) -> None:
    """The image's record and stored bytes; no chunks."""
    record = {"id": "img", "status": "complete", "type": "kvm", "format": "raw", "digest": str(Digest.of(stored))}
    server.serve("/images/img", json.dumps(record | facts).encode())
    server.serve("img", stored)


def serve_form(server: FakeImageServer, chunks: bytes, body: bytes, query: str = ZVOL, **behaviour: Any) -> None:
    digest = {"X-Image-Digest": str(Digest.of(body))}
    server.serve(f"/images/img/chunks{query}", chunks, headers=digest, **behaviour)
    server.serve(f"/images/img/download{query}", body, headers=digest)


def listed(body: bytes) -> list[dict[str, Any]]:
    return [{"offset": 0, "length": len(body), "sha256": hashlib.sha256(body).hexdigest()}]


async def fetch(world: World, **order: str) -> tuple[bytes, int, str]:
    """Content, guid and type of the image."""
    record = await world.store.request_image(FetchOrder.checked("img", **order))
    return world.content(record.snapshot), world.driver.get_snapshot(record.snapshot_name).guid, record.type


async def test_form_without_an_end_to_its_list_is_verified_as_a_whole(
    world: World, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_service, "LIST_MAX_BYTES", 100)
    serve_image(server)
    serve_form(server, b"[" + b" " * 200 + b"]", stream())
    assert await fetch(world) == (BODY, 4711, "kvm")
    assert server.requests["/images/img/download"] == 0


async def test_form_that_is_being_made_is_waited_for(
    world: World, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_service, "LIST_MAX_BYTES", 100)
    serve_image(server)
    serve_form(server, b" " * 200, stream(), failures=[503, 429])
    assert (await fetch(world))[1] == 4711
    assert server.requests[f"/images/img/chunks{ZVOL}"] == 3


async def test_form_that_takes_for_ever_is_passed_over(
    world: World, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_service, "PATIENCE_S", 0.0)
    serve_image(server)
    serve_form(server, b"[]", stream(), status=503)
    assert (await fetch(world))[0] == BODY


@pytest.mark.parametrize("status", [400, 404, 405, 422, 500, 501, 507])
async def test_form_that_is_refused_is_passed_over(world: World, server: FakeImageServer, status: int) -> None:
    serve_image(server)
    serve_form(server, b"[]", stream(), status=status)
    content, guid, kind = await fetch(world)
    assert (content, kind) == (BODY, "kvm")
    assert guid != 4711
    assert server.requests["/images/img/download"] == 1


NONSENSE: Sequence[bytes] = [
    b"<html>",
    b"[]",
    b'{"chunks": []}',
    b'[{"offset": 0}]',
    json.dumps([listed(BODY)[0] | {"sha256": "zz"}]).encode(),
    json.dumps([listed(BODY)[0] | {"offset": 1}]).encode(),
    json.dumps([listed(BODY)[0] | {"length": 1 << 40}]).encode(),
    json.dumps([listed(BODY)[0] | {"length": -1}]).encode(),
    json.dumps(listed(BODY) * 2).encode(),
]


@pytest.mark.parametrize("chunks", NONSENSE)
async def test_list_that_makes_no_sense_is_passed_over(world: World, server: FakeImageServer, chunks: bytes) -> None:
    serve_image(server)
    serve_form(server, chunks, stream())
    assert (await fetch(world))[0] == BODY


def serve_packed(server: FakeImageServer, packed: bytes, **headers: str) -> None:
    facts = {"X-Image-Digest": str(Digest.of(stream())), "Content-Type": "application/octet-stream"}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    server.serve(f"/images/img/chunks{ZVOL}", packed, headers=facts | names)
    server.serve(f"/images/img/download{ZVOL}", stream(), headers=facts)


async def test_packed_list_is_used_however_long_one_in_json_would_be(
    world: World, server: FakeImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_service, "JSON_MAX_BYTES", 0)
    serve_image(server)
    body, size = stream(), 1 << 20
    packed = b"".join(hashlib.sha256(body[at : at + size]).digest() for at in range(0, len(body), size))
    serve_packed(server, packed, X_Blob_Size=str(len(body)), X_Chunk_Size=str(size))
    assert await fetch(world) == (BODY, 4711, "kvm")
    assert server.requests[f"/images/img/chunks{ZVOL}"] == 1


@pytest.mark.parametrize(
    ("size", "chunk"),
    [("", ""), ("3000000", "-1"), ("3000000", "0"), ("x", "1"), ("1", str(1 << 30)), ("5000000", "1048576")],
)
async def test_packed_list_that_makes_no_sense_is_passed_over(
    world: World, server: FakeImageServer, size: str, chunk: str
) -> None:
    serve_image(server)
    serve_packed(server, bytes(32), X_Blob_Size=size, X_Chunk_Size=chunk)
    content, guid, _ = await fetch(world)
    assert (content, guid == 4711) == (BODY, False)


@pytest.mark.parametrize(
    "record",
    [
        b"not json",
        b"[]",
        b'{"id": "other", "status": "complete"}',
        b'{"id": "img", "status": "pending"}',
        b"x" * (2 << 20),
    ],
)
async def test_server_that_is_no_image_service_is_a_plain_source(
    world: World, server: FakeImageServer, record: bytes
) -> None:
    server.serve("/images/img", record)
    server.serve("img", BODY)
    assert (await fetch(world))[0] == BODY
    assert server.requests[f"/images/img/chunks{ZVOL}"] == 0


async def test_source_elsewhere_is_not_asked_anything(world: World, server: FakeImageServer) -> None:
    with FakeImageServer() as other:
        source = other.serve("img", BODY)
        assert (await fetch(world, source=source))[0] == BODY
        assert dict(other.requests) == {"/images/img/download": 1}
    assert not server.requests


async def test_digest_that_is_asked_for_is_never_met_by_a_derived_form(world: World, server: FakeImageServer) -> None:
    serve_image(server)
    serve_form(server, json.dumps(listed(stream())).encode(), stream())
    with pytest.raises(BadDataError, match="not the image that was asked for"):
        await fetch(world, digest=str(Digest.of(stream())))
    assert server.requests[f"/images/img/chunks{ZVOL}"] == 0


async def test_chunks_of_other_bytes_than_the_record_names_are_passed_over(
    world: World, server: FakeImageServer
) -> None:
    serve_image(server)
    serve_form(server, json.dumps(listed(b"other")).encode(), b"other", query="")
    server.serve("img", BODY)
    assert (await fetch(world))[0] == BODY
