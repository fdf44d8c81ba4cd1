"""The contract of every BlobStore. A store runs it like this:

    class TestMyStore(BlobStoreContract):
        @pytest.fixture
        def make(self, tmp_path: Path) -> Callable[[], BlobStore]:
            return lambda: MyStore(tmp_path)

        @pytest.fixture
        def damage(self, ...) -> Callable[[Digest], None]:
            ...  # flip a byte of the stored blob behind the store's back

``make`` opens the same store each time; the suite closes one handle before it opens the next.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, BusyError, InvalidArgumentError, NotFoundError, TooLargeError, UnavailableError
from tests.contracts.blob_store_sharing import SharingContract

Make = Callable[[], BlobStore]
Damage = Callable[[Digest], None]

HOUR_S = 3600.0
EMPTY = Digest.of(b"")
ABSENT = Digest.of(b"never stored")
THREADS = 6

SIZES_BYTES = [0, 1, 255 << 10, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, (1 << 20) + 17]
"""Around what an implementation may gather before it writes."""


def content(size_bytes: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def add(store: BlobStore, data: bytes, ref: str = "adding") -> BlobInfo:
    with store.ingest(ref) as writer:
        writer.write(data)
        return writer.commit()


def read(store: BlobStore, digest: Digest, *, offset_bytes: int = 0, verify: bool = False) -> bytes:
    with store.open(digest, offset_bytes=offset_bytes, verify=verify) as reader:
        return reader.read()


class BlobStoreContract(SharingContract):
    """Subclass and give ``make`` and ``damage`` fixtures."""

    NO_GRACE_S = 0.0
    """A store whose clock is coarse or another machine's lowers this below zero."""

    @pytest.fixture
    def store(self, make: Make) -> Iterator[BlobStore]:
        store = make()
        yield store
        store.close()

    # -- a blob's life ---------------------------------------------------------------------------------------------------

    def test_store_satisfies_the_protocol(self, store: BlobStore) -> None:
        assert isinstance(store, BlobStore)

    @pytest.mark.parametrize("size_bytes", SIZES_BYTES)
    def test_commit_any_size_reads_back_identical(self, store: BlobStore, size_bytes: int) -> None:
        data = content(size_bytes)
        info = add(store, data)
        assert (info.digest, info.size_bytes) == (Digest.of(data), size_bytes)
        assert store.info(info.digest) == info
        assert read(store, info.digest) == data
        assert read(store, info.digest, verify=True) == data
        store.verify(info.digest)

    @pytest.mark.parametrize("piece_bytes", [1, 1000, 65_536, 300_000])
    def test_write_in_any_pieces_gives_the_same_blob(self, store: BlobStore, piece_bytes: int) -> None:
        data = content(3000 if piece_bytes == 1 else 700_000)
        with store.ingest("ref") as writer:
            for start in range(0, len(data), piece_bytes):
                writer.write(memoryview(data)[start : start + piece_bytes])
                assert writer.offset_bytes == min(start + piece_bytes, len(data))
            assert writer.commit(digest=Digest.of(data), size_bytes=len(data)).digest == Digest.of(data)
        assert read(store, Digest.of(data)) == data

    def test_write_reused_buffer_is_copied_in_time(self, store: BlobStore) -> None:
        buffer = bytearray(1000)
        with store.ingest("ref") as writer:
            for number in range(3):
                buffer[:] = bytes([number]) * 1000
                writer.write(buffer)
            info = writer.commit()
        assert read(store, info.digest) == b"\0" * 1000 + b"\1" * 1000 + b"\2" * 1000

    def test_ingest_is_invisible_until_commit(self, store: BlobStore) -> None:
        data = content(600_000)
        with store.ingest("ref") as writer:
            writer.write(data)
            writer.checkpoint()
            assert list(store.list()) == []
            with pytest.raises(NotFoundError):
                store.info(Digest.of(data))
            with pytest.raises(NotFoundError), store.open(Digest.of(data)):
                pass
            assert [info.ref for info in store.ingests()] == ["ref"]
            writer.commit()
        assert [info.digest for info in store.list()] == [Digest.of(data)]
        assert list(store.ingests()) == []

    def test_commit_wrong_digest_is_bad_data_and_the_ingest_is_gone(self, store: BlobStore) -> None:
        with store.ingest("ref") as writer:
            writer.write(b"what came")
            with pytest.raises(BadDataError, match=Digest.of(b"what came").hex):
                writer.commit(digest=Digest.of(b"what was promised"))
        assert list(store.list()) == []
        assert list(store.ingests()) == []
        with store.ingest("ref") as writer:
            assert writer.offset_bytes == 0
            writer.abort()

    @pytest.mark.parametrize("claimed", [8, 10, 0])
    def test_commit_wrong_size_is_bad_data_and_the_ingest_is_gone(self, store: BlobStore, claimed: int) -> None:
        with store.ingest("ref") as writer:
            writer.write(b"what came")
            with pytest.raises(BadDataError, match="9 bytes"):
                writer.commit(digest=Digest.of(b"what came"), size_bytes=claimed)
        assert list(store.list()) == []
        assert list(store.ingests()) == []

    def test_commit_what_is_there_is_success(self, store: BlobStore) -> None:
        first, second = add(store, b"same", "one"), add(store, b"same", "two")
        assert (first.digest, first.size_bytes) == (second.digest, second.size_bytes)
        assert len(list(store.list())) == 1
        assert list(store.ingests()) == []

    def test_writer_after_its_end_refuses_everything(self, store: BlobStore) -> None:
        for end in ("commit", "abort", "close"):
            writer = store.ingest(end)
            getattr(writer, end)()
            for call in (lambda w=writer: w.write(b"x"), writer.commit, writer.checkpoint, writer.restart):
                with pytest.raises(InvalidArgumentError):
                    call()
            writer.abort()
            writer.close()

    # -- resuming --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("cut", [1, 100_000, 256 << 10, 600_000])
    def test_resume_after_close_and_reopen_goes_on_where_it_was(self, make: Make, cut: int) -> None:
        data = content(700_000)
        store = make()
        with store.ingest("ref") as writer:
            writer.write(data[:cut])
        assert [(info.ref, info.offset_bytes) for info in store.ingests()] == [("ref", cut)]
        store.close()
        store = make()
        try:
            assert [(info.ref, info.offset_bytes) for info in store.ingests()] == [("ref", cut)]
            with store.ingest("ref") as writer:
                assert writer.offset_bytes == cut
                writer.write(data[cut:])
                assert writer.commit(digest=Digest.of(data)).size_bytes == len(data)
            assert read(store, Digest.of(data)) == data
        finally:
            store.close()

    def test_checkpoint_tells_the_offset_that_is_durable(self, store: BlobStore) -> None:
        with store.ingest("ref") as writer:
            assert writer.checkpoint() == 0
            writer.write(b"12345")
            assert writer.checkpoint() == 5
            assert [info.offset_bytes for info in store.ingests()] == [5]
            writer.abort()

    def test_restart_forgets_what_was_written(self, store: BlobStore) -> None:
        with store.ingest("ref") as writer:
            writer.write(content(600_000))
            writer.checkpoint()
            writer.write(b"more")
            writer.restart()
            assert writer.offset_bytes == 0
            writer.write(b"new")
            assert writer.commit().digest == Digest.of(b"new")

    def test_one_ref_has_one_writer_at_a_time(self, store: BlobStore) -> None:
        with store.ingest("ref"):
            with pytest.raises(BusyError):
                store.ingest("ref")
            with pytest.raises(BusyError):
                store.abort("ref")
        store.ingest("ref").close()

    def test_abort_forgets_and_unknown_is_success(self, store: BlobStore) -> None:
        store.abort("never heard of")
        with store.ingest("ref") as writer:
            writer.write(b"data")
        store.abort("ref")
        store.abort("ref")
        assert list(store.ingests()) == []
        with store.ingest("ref") as writer:
            assert writer.offset_bytes == 0
            writer.write(b"data")
            writer.abort()
        assert list(store.ingests()) == []

    @pytest.mark.parametrize("ref", ["", "x" * 1025, "lone\ud800surrogate"])
    def test_bad_ref_is_refused(self, store: BlobStore, ref: str) -> None:
        with pytest.raises(InvalidArgumentError):
            store.ingest(ref)

    @pytest.mark.parametrize("ref", ["../../escape", "/etc/passwd", "a/b", ".", "nul\0", "日本", "x" * 1024])
    def test_any_other_ref_stays_inside(self, store: BlobStore, ref: str) -> None:
        with store.ingest(ref) as writer:
            writer.write(b"data")
        assert [info.ref for info in store.ingests()] == [ref]
        assert add(store, b"data", ref).digest == Digest.of(b"datadata")

    def test_max_bytes_refuses_the_piece_and_keeps_the_offset(self, store: BlobStore) -> None:
        with store.ingest("ref", max_bytes=10) as writer:
            writer.write(b"12345678")
            for piece in (b"123", content(600_000)):
                with pytest.raises(TooLargeError):
                    writer.write(piece)
            assert writer.offset_bytes == 8
            writer.write(b"90")
            assert writer.commit().digest == Digest.of(b"1234567890")

    # -- reading ---------------------------------------------------------------------------------------------------------

    def test_absent_blob_is_not_found(self, store: BlobStore) -> None:
        for call in (store.info, store.path, store.delete, store.verify):
            with pytest.raises(NotFoundError, match=ABSENT.hex):
                call(ABSENT)
        with pytest.raises(NotFoundError), store.open(ABSENT):
            pass

    @pytest.mark.parametrize("digest", [Digest.of(b"x", "sha512"), Digest("sha256", "../../../etc/passwd")])
    def test_other_digest_is_refused(self, store: BlobStore, digest: Digest) -> None:
        with pytest.raises(InvalidArgumentError):
            store.info(digest)

    def test_open_at_any_offset_gives_the_rest(self, store: BlobStore) -> None:
        data = content(300_000)
        digest = add(store, data).digest
        for offset in (0, 1, 4096, 299_999, 300_000):
            assert read(store, digest, offset_bytes=offset) == data[offset:]
        for offset in (-1, 300_001):
            with pytest.raises(InvalidArgumentError), store.open(digest, offset_bytes=offset):
                pass
        with pytest.raises(InvalidArgumentError), store.open(digest, offset_bytes=1, verify=True):
            pass

    def test_path_has_exactly_the_blob_or_is_none(self, store: BlobStore) -> None:
        data = content(10_000)
        path = store.path(add(store, data).digest)
        if path is not None:
            with open(path, "rb") as file:  # noqa: PTH123  a store hands out a string
                assert file.read() == data

    def test_list_is_in_digest_order(self, store: BlobStore) -> None:
        added = [add(store, b"%d" % number) for number in range(20)]
        assert list(store.list()) == sorted(added, key=lambda info: info.digest)

    def test_reader_outlives_the_blob(self, store: BlobStore) -> None:
        data = content(600_000)
        digest = add(store, data).digest
        with store.open(digest) as reader:
            head = reader.read(1000)
            store.delete(digest)
            assert head + reader.read() == data

    # -- damage ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size_bytes", [1, 5000, 3_000_000])
    def test_verifying_reader_never_hands_out_the_end_of_a_damaged_blob(
        self, store: BlobStore, damage: Damage, size_bytes: int
    ) -> None:
        digest = add(store, content(size_bytes)).digest
        damage(digest)
        received = 0
        with pytest.raises(BadDataError, match=digest.hex), store.open(digest, verify=True) as reader:  # noqa: PT012
            while piece := reader.read(1000):
                received += len(piece)
        assert received < size_bytes
        with pytest.raises(NotFoundError):
            store.info(digest)

    def test_verify_quarantines_a_damaged_blob_and_a_new_commit_heals(self, store: BlobStore, damage: Damage) -> None:
        data = content(100_000)
        digest = add(store, data).digest
        store.verify(digest)
        damage(digest)
        with pytest.raises(BadDataError, match=digest.hex):
            store.verify(digest)
        assert list(store.list()) == []
        add(store, data)
        store.verify(digest)
        assert read(store, digest) == data

    # -- leases and collecting -------------------------------------------------------------------------------------------

    def test_collect_removes_what_nothing_keeps(self, store: BlobStore) -> None:
        kept, leased, loose = (add(store, text).digest for text in (b"kept", b"leased", b"loose"))
        store.lease("work", [leased], ttl_s=HOUR_S)
        with store.ingest("left behind") as writer:
            writer.write(b"12345")
        report = store.collect([kept, ABSENT], grace_s=self.NO_GRACE_S)
        assert (report.blobs, report.refs, report.freed_bytes) == ((loose,), ("left behind",), 10)
        assert report.complete
        assert {info.digest for info in store.list()} == {kept, leased}
        assert list(store.ingests()) == []

    def test_collect_young_things_are_kept(self, store: BlobStore) -> None:
        digest = add(store, b"young").digest
        store.ingest("young too").close()
        report = store.collect([], grace_s=HOUR_S)
        assert (report.blobs, report.refs, report.freed_bytes, report.kept) == ((), (), 0, 2)
        assert store.info(digest).digest == digest

    def test_collect_dry_run_tells_the_same_and_removes_nothing(self, store: BlobStore) -> None:
        for number in range(5):
            add(store, b"%d" % number)
        with store.ingest("ref") as writer:
            writer.write(b"12345")
        told = store.collect([Digest.of(b"3")], grace_s=self.NO_GRACE_S, dry_run=True)
        assert len(told.blobs) == 4
        assert len(list(store.list())) == 5
        assert len(store.ingests()) == 1
        assert store.collect([Digest.of(b"3")], grace_s=self.NO_GRACE_S) == told

    def test_collect_in_bounded_steps_gets_everything(self, store: BlobStore) -> None:
        for number in range(7):
            add(store, b"%d" % number)
        removed: list[Digest] = []
        for _ in range(10):
            report = store.collect([], grace_s=self.NO_GRACE_S, limit=3)
            assert len(report.blobs) <= 3
            removed += report.blobs
            if report.complete:
                break
        assert len(set(removed)) == 7
        assert list(store.list()) == []

    def test_collect_spares_an_active_writer_and_what_it_commits_under_a_lease(self, store: BlobStore) -> None:
        store.lease("work", ttl_s=HOUR_S)
        with store.ingest("active") as loose, store.ingest("leased", lease="work") as leased:
            loose.write(b"loose")
            leased.write(b"leased")
            assert store.collect([], grace_s=self.NO_GRACE_S).refs == ()
            loose.commit()
            digest = leased.commit().digest
        assert store.collect([], grace_s=self.NO_GRACE_S).blobs == (Digest.of(b"loose"),)
        store.release("work")
        assert store.collect([], grace_s=self.NO_GRACE_S).blobs == (digest,)

    def test_leased_ingest_is_kept_after_its_writer_vanished_until_the_lease_ends(self, make: Make) -> None:
        store = make()
        store.lease("work", ttl_s=HOUR_S)
        with store.ingest("ref", lease="work") as writer:
            writer.write(b"12345")
        store.close()
        store = make()
        try:
            assert store.collect([], grace_s=self.NO_GRACE_S).refs == ()
            store.release("work")
            assert store.collect([], grace_s=self.NO_GRACE_S).refs == ("ref",)
        finally:
            store.close()

    def test_lease_survives_reopening(self, make: Make) -> None:
        store = make()
        digest = add(store, b"data").digest
        store.lease("work", [digest], ttl_s=HOUR_S)
        store.close()
        store = make()
        try:
            assert store.collect([], grace_s=self.NO_GRACE_S).blobs == ()
            with pytest.raises(BusyError) as caught:
                store.delete(digest)
            assert caught.value.dependants == ("work",)
            store.release("work")
            store.release("work")
            store.delete(digest)
            assert list(store.list()) == []
        finally:
            store.close()

    def test_lease_tells_what_a_commit_under_it_made_over_reopening(self, make: Make) -> None:
        store = make()
        assert store.leased("work") == []
        store.lease("work", [Digest.of(b"other")], ttl_s=HOUR_S)
        with store.ingest("ref", lease="work") as writer:
            writer.write(b"made")
            writer.commit()
        store.close()
        store = make()
        try:
            assert store.leased("work") == sorted([Digest.of(b"made"), Digest.of(b"other")])
            store.release("work")
            assert store.leased("work") == []
        finally:
            store.close()

    def test_lease_is_only_ever_extended(self, store: BlobStore) -> None:
        one, two = add(store, b"one").digest, add(store, b"two").digest
        store.lease("work", [one], ttl_s=HOUR_S)
        store.lease("work", [two], ttl_s=0.0)
        assert store.collect([], grace_s=self.NO_GRACE_S).blobs == ()

    def test_lease_that_ran_out_protects_nothing(self, store: BlobStore) -> None:
        digest = add(store, b"data").digest
        store.lease("work", [digest], ttl_s=0.0)
        with pytest.raises(NotFoundError):
            store.ingest("ref", lease="work")
        assert store.leased("work") == []
        assert store.collect([], grace_s=self.NO_GRACE_S).blobs == (digest,)

    @pytest.mark.parametrize("name", ["", "x" * 513, "lone\ud800surrogate"])
    def test_bad_lease_name_is_refused(self, store: BlobStore, name: str) -> None:
        with pytest.raises(InvalidArgumentError):
            store.lease(name, ttl_s=HOUR_S)

    # -- threads ---------------------------------------------------------------------------------------------------------

    def test_threads_that_commit_one_digest_all_succeed(self, store: BlobStore) -> None:
        data = content(400_000)
        barrier = threading.Barrier(THREADS)

        def commit(number: int) -> BlobInfo:
            with store.ingest(f"ref {number}") as writer:
                writer.write(data)
                barrier.wait(timeout=60)
                return writer.commit(digest=Digest.of(data), size_bytes=len(data))

        with ThreadPoolExecutor(THREADS) as pool:
            infos = list(pool.map(commit, range(THREADS)))
        assert {info.digest for info in infos} == {Digest.of(data)}
        assert read(store, Digest.of(data), verify=True) == data
        assert list(store.ingests()) == []

    def test_collect_during_commits_never_takes_a_leased_blob(self, store: BlobStore) -> None:
        """A garbage collection that runs all the time, and writers of few distinct contents under leases."""
        done = threading.Event()

        def collect() -> int:
            rounds = 0
            while not done.is_set():
                store.collect([], grace_s=self.NO_GRACE_S)
                rounds += 1
            return rounds

        def write(number: int) -> None:
            lease = f"lease {number}"
            for count in range(12):
                store.lease(lease, ttl_s=HOUR_S)
                with store.ingest(f"ref {number}", lease=lease) as writer:
                    writer.write(b"content %d" % (count % 3))
                    digest = writer.commit().digest
                assert read(store, digest, verify=True) == b"content %d" % (count % 3)
                store.release(lease)

        with ThreadPoolExecutor(THREADS) as pool:
            collecting = pool.submit(collect)
            try:
                for writing in [pool.submit(write, number) for number in range(THREADS - 1)]:
                    writing.result()
            finally:
                done.set()
            assert collecting.result() > 0

    # -- life ------------------------------------------------------------------------------------------------------------

    def test_close_is_idempotent_and_a_later_use_is_refused(self, make: Make) -> None:
        store = make()
        digest = add(store, b"data").digest
        store.close()
        store.close()
        for call in (lambda: store.info(digest), lambda: store.ingest("ref"), lambda: store.collect([], grace_s=0.0)):
            with pytest.raises(UnavailableError):
                call()
