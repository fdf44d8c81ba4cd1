"""Chunk lists cover exactly the bytes of their blob, vouch for no damaged ones, and are computed once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from image_service.chunks import (
    CHUNK_MAX_BYTES,
    CHUNK_MIN_BYTES,
    CHUNKS_MAX,
    PREFIX,
    ChunkHasher,
    ChunkIndex,
    ChunkList,
    chunk_bytes_of,
)
from imaging.blobs.base import BlobInfo
from imaging.digests import Digest
from imaging.errors import BadDataError
from imaging.kv.base import delete
from imaging.kv.sqlite import SqliteKeyValue
from tests.fakes.derive_world import DeriveWorld, open_derive_world
from tests.fakes.disk_files import disk_bytes


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[DeriveWorld]:
    async with open_derive_world(tmp_path / "world") as world:
        yield world


def check(chunks: ChunkList, data: bytes) -> None:
    entries = msgspec.json.decode(chunks.to_json())
    offset = 0
    for entry in entries:
        assert set(entry) == {"offset", "length", "sha256"}
        assert entry["offset"] == offset
        piece = data[offset : offset + entry["length"]]
        assert hashlib.sha256(piece).hexdigest() == entry["sha256"]
        offset += entry["length"]
    assert offset == len(data)
    assert all(entry["length"] == CHUNK_MIN_BYTES for entry in entries[:-1])


@pytest.mark.parametrize(
    "size_bytes", [1, CHUNK_MIN_BYTES - 1, CHUNK_MIN_BYTES, CHUNK_MIN_BYTES + 1, 2 * CHUNK_MIN_BYTES + 5]
)
async def test_chunks_of_a_stored_blob_verify(world: DeriveWorld, size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    info = world.add("img", data)
    chunks = await world.deriver.get_chunks(info)
    check(chunks, data)
    assert await world.deriver.get_chunks(info) == chunks
    assert world.deriver.started == 1


async def test_chunks_of_a_derived_blob_are_known_when_it_is_made(world: DeriveWorld) -> None:
    world.add("img", disk_bytes(3, 600))
    info = await world.info("img", format="zvol")
    check(await world.deriver.get_chunks(info), world.read(info))
    assert world.deriver.started == 1


async def test_chunks_of_an_empty_blob_are_none(world: DeriveWorld) -> None:
    chunks = await world.deriver.get_chunks(world.add("img", b""))
    assert chunks.to_json() == b"[]"


def damage(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"damage")


async def test_chunks_of_a_damaged_blob_are_refused(world: DeriveWorld) -> None:
    info = world.add("img", disk_bytes(3))
    damage(Path(world.blobs.path(info.digest) or ""))
    with pytest.raises(BadDataError, match="damaged"):
        await world.deriver.get_chunks(info)
    assert world.store.chunks.find(info) is None


def test_hasher_does_not_care_how_bytes_come() -> None:
    data = random.Random(7).randbytes(2 * CHUNK_MIN_BYTES + 99)
    rng = random.Random(8)
    hasher, position = ChunkHasher(), 0
    while position < len(data):
        step = rng.randrange(1, CHUNK_MIN_BYTES * 2)
        hasher.update(data[position : position + step])
        position += step
    chunks = hasher.finish(Digest.of(data))
    assert chunks is not None
    check(chunks, data)


def test_chunks_of_larger_blobs_are_larger_within_a_bound() -> None:
    most = CHUNK_MIN_BYTES * CHUNKS_MAX
    sizes = [chunk_bytes_of(size) for size in (0, 1, most, most + 1, 2 * most, 2 * most + 1, 1 << 50)]
    assert sizes == [1 << 20, 1 << 20, 1 << 20, 2 << 20, 2 << 20, CHUNK_MAX_BYTES, CHUNK_MAX_BYTES]


def test_index_keeps_long_lists_in_pages_and_finds_only_whole_ones(tmp_path: Path) -> None:
    count = 40_000
    packed = random.Random(1).randbytes(32 * count)
    info = BlobInfo(Digest.of(b"large"), (count - 1) * CHUNK_MAX_BYTES + 1, 0.0)
    other = BlobInfo(Digest.of(b"other"), 5, 0.0)
    with SqliteKeyValue(tmp_path / "kv.db") as store:
        index = ChunkIndex(store)
        index.save(ChunkList(info.digest, info.size_bytes, packed))
        index.save(ChunkList(other.digest, 5, bytes(32)))
        found = index.find(info)
        assert found is not None
        assert found.packed == packed
        assert index.sweep(lambda digest: digest == info.digest, set()) == 1
        assert index.find(other) is None
        delete(store, store.list(PREFIX)[-1].key)
        assert index.find(info) is None
        assert index.sweep(lambda _: False, set()) == 1
        assert store.list(PREFIX) == []
