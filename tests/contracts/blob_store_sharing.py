"""What a BlobStore promises to several processes that share it; part of the contract in :mod:`tests.contracts.blob_store`."""

from __future__ import annotations

import random

import pytest

from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import BusyError, InvalidArgumentError


def _content(size_bytes: int) -> bytes:
    return random.Random(7).randbytes(size_bytes)


def _add(store: BlobStore, data: bytes, ref: str) -> BlobInfo:
    with store.ingest(ref) as writer:
        writer.write(data)
        return writer.commit()


def _read(store: BlobStore, digest: Digest) -> bytes:
    with store.open(digest, verify=True) as reader:
        return reader.read()


class SharingContract:
    """Tests over the ``store`` fixture of the contract."""

    NO_GRACE_S = 0.0

    def test_find_ingest_tells_how_much_is_durable(self, store: BlobStore) -> None:
        assert store.find_ingest("ref") is None
        with store.ingest("ref") as writer:
            writer.write(_content(600_000))
            writer.checkpoint()
            found = store.find_ingest("ref")
            assert found is not None
            assert (found.ref, found.offset_bytes) == ("ref", 600_000)
            writer.commit()
        assert store.find_ingest("ref") is None

    def test_digest_of_a_writer_is_of_everything_written_also_before_a_break(self, store: BlobStore) -> None:
        data = _content(600_000)
        with store.ingest("ref") as writer:
            writer.write(data[:400_000])
        with store.ingest("ref") as writer:
            assert writer.digest() == Digest.of(data[: writer.offset_bytes])
            writer.write(data[writer.offset_bytes :])
            assert writer.digest() == Digest.of(data)
            writer.commit(digest=Digest.of(data))

    def test_abandoned_ingest_keeps_what_was_durable_and_can_be_resumed(self, store: BlobStore) -> None:
        writer = store.ingest("ref")
        writer.write(_content(400_000))
        writer.checkpoint()
        writer.abandon()
        writer.abandon()
        with pytest.raises(InvalidArgumentError):
            writer.write(b"more")
        with store.ingest("ref") as again:
            assert again.offset_bytes == 400_000
            again.abort()

    def test_blob_that_is_needed_after_the_leases_were_looked_at_stays(self, store: BlobStore) -> None:
        kept, gone = _add(store, b"kept", "one"), _add(store, b"gone", "two")
        asked: list[Digest] = []

        def needed(digest: Digest) -> bool:
            asked.append(digest)
            return digest == kept.digest

        with pytest.raises(BusyError, match="needed"):
            store.delete(kept.digest, needed=needed)
        report = store.collect([], grace_s=self.NO_GRACE_S, needed=needed)
        assert report.blobs == (gone.digest,)
        assert _read(store, kept.digest) == b"kept"
        store.lease("held", [kept.digest], ttl_s=60)
        asked.clear()
        with pytest.raises(BusyError, match="leased"):
            store.delete(kept.digest, needed=needed)
        assert asked == []

    def test_redirect_of_a_store_that_gives_none_is_none(self, store: BlobStore) -> None:
        assert store.redirect_url(_add(store, b"x", "one").digest) is None
