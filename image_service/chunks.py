"""Digests of a blob's chunks: a client verifies each before it uses it, and goes on after a break behind the last good one.

A chunk list depends on nothing but the blob, is computed once and kept (:class:`ChunkIndex`). While it is computed the whole blob is
verified too, so a list never vouches for damaged bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import msgspec

from image_service.derive_cache import PackedValues
from image_service.derive_work import Work
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError
from imaging.kv.base import KeyValue

CHUNK_MIN_BYTES = 1 << 20
"""Small enough for many in a hypervisor's memory at once, large enough that hashing and asking for each costs nothing."""

CHUNKS_MAX = 16 << 10
"""Chunks of larger blobs (over 16 GiB) are larger, so that their lists stay below 2 MB of JSON."""

CHUNK_MAX_BYTES = 4 << 20
"""But not larger than this: from 64 GiB on lists grow again (29 MB of JSON for 1 TiB, packed 8 MiB)."""

PREFIX = "chunks/"

DIGEST_BYTES = 32


def chunk_bytes_of(size_bytes: int) -> int:
    """The chunk size of a blob. Part of what is kept: a change needs another PREFIX."""
    chunk_bytes = CHUNK_MIN_BYTES
    while chunk_bytes < CHUNK_MAX_BYTES and size_bytes > chunk_bytes * CHUNKS_MAX:
        chunk_bytes *= 2
    return chunk_bytes


READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ChunkList:
    """The chunks of one blob: all of one size but the last."""

    digest: Digest
    size_bytes: int
    packed: bytes
    """The sha256 of each, 32 bytes a chunk."""

    @property
    def chunk_bytes(self) -> int:
        """The size of each but the last."""
        return chunk_bytes_of(self.size_bytes)

    def __iter__(self) -> Iterator[Chunk]:
        chunk_bytes = self.chunk_bytes
        for number, offset in enumerate(range(0, self.size_bytes, chunk_bytes)):
            own = self.packed[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            yield Chunk(offset=offset, length=min(chunk_bytes, self.size_bytes - offset), sha256=own.hex())

    def to_json(self) -> bytes:
        """As the wire has it: a list of ``{"offset", "length", "sha256"}``."""
        return msgspec.json.encode(list(self))


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk as the wire has it."""

    offset: int
    length: int
    sha256: str


class ChunkHasher:
    """Digests of the chunks of bytes that come by."""

    def __init__(self, chunk_bytes: int = CHUNK_MIN_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._done: list[bytes] = []
        self._current = hashlib.sha256()
        self._filled_bytes = 0
        self.size_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """The next piece, of any size."""
        view = memoryview(data)
        self.size_bytes += len(view)
        while view:
            piece = view[: self._chunk_bytes - self._filled_bytes]
            self._current.update(piece)
            self._filled_bytes += len(piece)
            view = view[len(piece) :]
            if self._filled_bytes == self._chunk_bytes:
                self._end_chunk()

    def finish(self, digest: Digest) -> ChunkList | None:
        """After the last piece of the blob ``digest``: its chunks; None if a blob of that size has larger ones."""
        if self._filled_bytes:
            self._end_chunk()
        if chunk_bytes_of(self.size_bytes) != self._chunk_bytes:
            return None
        return ChunkList(digest, self.size_bytes, b"".join(self._done))

    def _end_chunk(self) -> None:
        self._done.append(self._current.digest())
        self._current = hashlib.sha256()
        self._filled_bytes = 0


def compute(blobs: BlobStore, info: BlobInfo, work: Work) -> ChunkList:
    """Read and verify a blob; its chunks. BadDataError if it is damaged."""
    hasher = ChunkHasher(chunk_bytes_of(info.size_bytes))
    with blobs.open(info.digest, verify=True) as reader:
        while piece := reader.read(READ_BYTES):
            hasher.update(piece)
            work.step(len(piece))
    chunks = hasher.finish(info.digest)
    if chunks is None:
        raise BadDataError(f"the stored blob has another size than it had: {info.digest}")
    return chunks


class ChunkIndex:
    """Chunk lists in a KeyValue. Blocking; threads may share it."""

    def __init__(self, store: KeyValue) -> None:
        self._values = PackedValues(store, PREFIX)

    def find(self, info: BlobInfo) -> ChunkList | None:
        """The list of a blob, or None if it has to be computed."""
        count = -(-info.size_bytes // chunk_bytes_of(info.size_bytes))
        packed = self._values.find(info.digest.hex, count * DIGEST_BYTES)
        return None if packed is None else ChunkList(info.digest, info.size_bytes, packed)

    def save(self, chunks: ChunkList) -> None:
        """Keep a list."""
        self._values.save(chunks.digest.hex, chunks.packed)

    def sweep(self, wanted: Callable[[Digest], bool], derived: Collection[Digest]) -> int:
        """Remove the lists of blobs that neither a record nor the index of derived blobs names; how many."""
        removed = 0
        for name in self._values.names():
            digest = Digest("sha256", name)
            if digest not in derived and not wanted(digest):
                self._values.delete(name)
                removed += 1
        return removed
