"""The local blob store: the contract, and what is its own: layout, quota, free space, power cuts, failing disks."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

import imaging.files
from imaging.blobs.base import BlobStore
from imaging.blobs.ingest import IngestState, load_state, ref_key
from imaging.blobs.leases import LEASE_DIGESTS_MAX
from imaging.blobs.local import LocalBlobStore
from imaging.blobs.sweep import QUARANTINE_KEEP_S
from imaging.digests import Digest
from imaging.errors import BadDataError, BusyError, InvalidArgumentError, NoSpaceError, NotFoundError, UnavailableError
from tests.contracts.blob_store import BlobStoreContract, add, content, read

HOUR_S = 3600.0


def _blob_file(root: Path, digest: Digest) -> Path:
    return root / "blobs" / "sha256" / digest.hex[:2] / digest.hex


class TestLocalBlobStore(BlobStoreContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[], BlobStore]:
        return lambda: LocalBlobStore(tmp_path / "store", reserve_free_bytes=0)

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Callable[[Digest], None]:
        def flip(digest: Digest) -> None:
            path = _blob_file(tmp_path / "store", digest)
            path.chmod(0o644)
            with path.open("r+b") as file:
                middle = path.stat().st_size // 2
                file.seek(middle)
                byte = file.read(1)[0]
                file.seek(middle)
                file.write(bytes([byte ^ 1]))

        return flip


class _Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path, clock: _Clock) -> Iterator[LocalBlobStore]:
    with LocalBlobStore(root, reserve_free_bytes=0, clock=clock) as store:
        yield store


# -- layout --------------------------------------------------------------------------------------------------------------


def test_blob_is_one_read_only_file_named_by_its_digest(store: LocalBlobStore, root: Path) -> None:
    digest = add(store, b"data").digest
    path = _blob_file(root, digest)
    assert store.path(digest) == str(path)
    assert path.read_bytes() == b"data"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list((root / "ingest").iterdir()) == []


def test_second_owner_is_busy(store: LocalBlobStore, root: Path) -> None:
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        LocalBlobStore(root)


def test_files_that_are_no_blobs_are_left_alone(store: LocalBlobStore, root: Path) -> None:
    digest = add(store, b"data").digest
    strangers = [
        _blob_file(root, digest).with_name("README"),
        root / "ingest" / "README",
        root / "blobs" / "sha256" / "x",
    ]
    for stranger in strangers:
        stranger.write_text("somebody's notes")
    assert [info.digest for info in store.list()] == [digest]
    assert list(store.ingests()) == []
    store.collect([], grace_s=0)
    store.close()
    LocalBlobStore(root).close()
    assert all(stranger.exists() for stranger in strangers)


# -- grace ---------------------------------------------------------------------------------------------------------------


def test_collect_waits_for_the_grace_period(store: LocalBlobStore, clock: _Clock) -> None:
    digest = add(store, b"data").digest
    store.ingest("ref").close()
    clock.now_s += 1000
    assert store.collect([], grace_s=2000).kept == 2
    report = store.collect([], grace_s=500)
    assert (report.blobs, report.refs) == ((digest,), ("ref",))


def test_collect_an_old_blob_committed_anew_is_young(store: LocalBlobStore, clock: _Clock) -> None:
    digest = add(store, b"data").digest
    clock.now_s += HOUR_S
    assert add(store, b"data").created_s == clock.now_s
    assert store.collect([], grace_s=HOUR_S / 2).blobs == ()
    assert store.info(digest).created_s == pytest.approx(clock.now_s)


def test_lease_ends_with_the_clock(store: LocalBlobStore, clock: _Clock, root: Path) -> None:
    digest = add(store, b"data").digest
    store.lease("work", [digest], ttl_s=60)
    clock.now_s += 59
    assert store.collect([], grace_s=0).blobs == ()
    clock.now_s += 1
    assert store.collect([], grace_s=0).blobs == (digest,)
    assert list((root / "leases").iterdir()) == []


def test_lease_that_ended_comes_back_empty(store: LocalBlobStore, clock: _Clock) -> None:
    digest = add(store, b"data").digest
    store.lease("work", [digest], ttl_s=60)
    clock.now_s += 61
    store.lease("work", ttl_s=60)
    assert store.collect([], grace_s=0).blobs == (digest,)


def test_lease_has_a_bound(store: LocalBlobStore) -> None:
    with pytest.raises(InvalidArgumentError, match=str(LEASE_DIGESTS_MAX)):
        store.lease("work", [Digest("sha256", f"{n:064x}") for n in range(LEASE_DIGESTS_MAX + 1)], ttl_s=60)


def test_damaged_lease_stops_the_store_from_opening(store: LocalBlobStore, root: Path) -> None:
    store.lease("work", ttl_s=60)
    store.close()
    [path] = (root / "leases").iterdir()
    path.write_bytes(b"{")
    with pytest.raises(BadDataError, match=path.name):
        LocalBlobStore(root)
    path.unlink()
    LocalBlobStore(root).close()


def test_quarantine_is_emptied_after_its_time(store: LocalBlobStore, clock: _Clock, root: Path) -> None:
    digest = add(store, b"data").digest
    _blob_file(root, digest).chmod(0o644)
    _blob_file(root, digest).write_bytes(b"tada")
    with pytest.raises(BadDataError):
        store.verify(digest)
    store.collect([], grace_s=0)
    assert [path.read_bytes() for path in (root / "quarantine").iterdir()] == [b"tada"]
    assert store.used_bytes == 4
    clock.now_s += QUARANTINE_KEEP_S + 1
    assert store.collect([], grace_s=0).freed_bytes == 4
    assert list((root / "quarantine").iterdir()) == []
    assert store.used_bytes == 0


def test_damage_found_by_an_old_reader_does_not_touch_a_new_blob(store: LocalBlobStore, root: Path) -> None:
    data = content(3_000_000)
    digest = add(store, data).digest
    _blob_file(root, digest).chmod(0o644)
    with _blob_file(root, digest).open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(BadDataError), store.open(digest, verify=True) as reader:  # noqa: PT012
        reader.read(10)
        store.delete(digest)
        add(store, data)
        reader.read()
    assert read(store, digest, verify=True) == data


# -- space ---------------------------------------------------------------------------------------------------------------


def test_quota_counts_blobs_and_ingests_exactly(root: Path) -> None:
    with LocalBlobStore(root, quota_bytes=1000, reserve_free_bytes=0) as store:
        add(store, b"a" * 400)
        with store.ingest("ref") as writer:
            writer.write(b"b" * 500)
            with pytest.raises(NoSpaceError, match="quota"):
                writer.write(b"c" * 101)
            assert writer.offset_bytes == 500
            writer.write(b"c" * 100)
            assert store.used_bytes == 1000
            writer.abort()
        assert store.used_bytes == 400
        add(store, b"a" * 400, "the same again")
        assert store.used_bytes == 400
        with store.ingest("left") as writer:
            writer.write(b"d" * 50)
    with LocalBlobStore(root, quota_bytes=1000, reserve_free_bytes=0) as store:
        assert store.used_bytes == 450
        store.abort("left")
        store.delete(Digest.of(b"a" * 400))
        assert store.used_bytes == 0


def test_quota_is_freed_by_restart_wrong_digest_and_collect(root: Path) -> None:
    with LocalBlobStore(root, quota_bytes=1000, reserve_free_bytes=0) as store:
        with store.ingest("ref") as writer:
            writer.write(b"x" * 1000)
            writer.restart()
            assert store.used_bytes == 0
            writer.write(b"x" * 1000)
            with pytest.raises(BadDataError):
                writer.commit(digest=Digest.of(b"other"))
        assert store.used_bytes == 0
        add(store, b"y" * 1000)
        store.ingest("empty").close()
        store.collect([], grace_s=0)
        assert store.used_bytes == 0


def test_free_space_is_reserved_for_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imaging.blobs.space.free_bytes", lambda _: 1500)
    with LocalBlobStore(root, reserve_free_bytes=1000) as store, store.ingest("ref") as writer:
        with pytest.raises(NoSpaceError, match="no space left on device"):
            writer.write(bytes(501))
        writer.write(bytes(500))
        assert writer.offset_bytes == 500


@contextmanager
def _file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow past a size: writes fail for real, in the middle."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_write_that_fails_half_way_keeps_the_offset_and_can_go_on(store: LocalBlobStore) -> None:
    data = content(2_000_000)
    with store.ingest("ref") as writer:
        writer.write(data[:500_000])
        with _file_size_limit(1_000_000), pytest.raises(NoSpaceError):
            writer.write(data[500_000:])
        assert writer.offset_bytes == 500_000
        assert store.used_bytes == 500_000
        writer.write(data[500_000:])
        assert writer.commit(digest=Digest.of(data)).size_bytes == len(data)


def test_commit_that_cannot_write_the_rest_keeps_the_ingest(store: LocalBlobStore) -> None:
    data = content(300_000)
    with store.ingest("ref") as writer:
        writer.write(data)
        writer.write(b"gathered")
        with _file_size_limit(300_000), pytest.raises(NoSpaceError):
            writer.commit()
        assert writer.offset_bytes == 300_008
        assert list(store.list()) == []
        assert writer.commit().digest == Digest.of(data + b"gathered")


def test_close_that_cannot_write_the_rest_keeps_what_was_written(store: LocalBlobStore) -> None:
    data = content(300_000)
    writer = store.ingest("ref")
    writer.write(data)
    writer.write(b"gathered")
    with _file_size_limit(300_000), pytest.raises(NoSpaceError):
        writer.close()
    assert store.used_bytes == 300_000
    with store.ingest("ref") as writer:
        assert writer.offset_bytes == 300_000
        assert writer.commit().digest == Digest.of(data)


# -- failing disks -------------------------------------------------------------------------------------------------------


def test_sync_that_fails_falls_back_to_the_last_checkpoint(
    store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel may have dropped the pages: believing a second, successful one would publish holes."""
    data = content(900_000)
    with store.ingest("ref") as writer:
        writer.write(data[:300_000])
        writer.checkpoint()
        writer.write(data[300_000:])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _raise_eio)
            with pytest.raises(UnavailableError):
                writer.commit()
        assert writer.offset_bytes == 300_000
        assert store.used_bytes == 300_000
        writer.write(data[300_000:])
        assert writer.commit(digest=Digest.of(data)).size_bytes == len(data)


def _raise_eio(_: int) -> None:
    raise OSError(errno.EIO, "injected")


def test_commit_after_the_rename_nothing_fails_the_call(
    store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path | str) -> None:
        raise UnavailableError(f"injected: {path}")

    with store.ingest("ref") as writer:
        writer.write(b"data")
        with monkeypatch.context() as patch:
            patch.setattr("imaging.blobs.local.fsync_directory", refuse)
            assert writer.commit().digest == Digest.of(b"data")
    assert "cannot finish publishing" in caplog.text
    assert read(store, Digest.of(b"data")) == b"data"
    with store.ingest("ref") as writer:
        assert writer.offset_bytes == 0


# -- power cuts and crashes ----------------------------------------------------------------------------------------------


def _edit_state(root: Path, ref: str, **changes: object) -> None:
    path = root / "ingest" / ref_key(ref)
    state = load_state(path)
    assert state is not None
    (path / "state.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(state, **changes)))


@pytest.mark.parametrize(("boot_id", "resumed"), [(None, 700_000), ("another boot", 300_000)])
def test_resume_trusts_unsynced_bytes_only_within_one_boot(root: Path, boot_id: str | None, resumed: int) -> None:
    data = content(700_000)
    with LocalBlobStore(root, reserve_free_bytes=0) as store, store.ingest("ref") as writer:
        writer.write(data[:300_000])
    directory = root / "ingest" / ref_key("ref")
    with (directory / "data").open("ab") as file:  # what a killed writer leaves: bytes no checkpoint vouches for
        file.write(data[300_000:])
    if boot_id is not None:
        _edit_state(root, "ref", boot_id=boot_id)
    with LocalBlobStore(root, reserve_free_bytes=0) as store, store.ingest("ref") as writer:
        assert writer.offset_bytes == resumed == store.used_bytes
        writer.write(data[resumed:])
        assert writer.commit().digest == Digest.of(data)


@pytest.mark.parametrize("left", ["empty", "state only", "data only", "damaged state", "temporary"])
def test_half_made_or_half_removed_ingest_is_cleaned_at_start(root: Path, left: str) -> None:
    LocalBlobStore(root).close()
    directory = root / "ingest" / ref_key("ref")
    directory.mkdir()
    if left not in {"empty", "state only"}:
        (directory / "data").write_bytes(b"data")
    if left == "state only":
        (directory / "state.json").write_bytes(msgspec.json.encode(IngestState(ref="ref")))
    if left == "damaged state":
        (directory / "state.json").write_bytes(b"{")
    if left == "temporary":
        (directory / f"{imaging.files.TEMPORARY_PREFIX}1").write_bytes(b"{}")
    with LocalBlobStore(root) as store:
        assert list(store.ingests()) == []
        assert not directory.exists()
        assert store.used_bytes == 0


def test_commit_cut_off_after_making_the_file_read_only_is_resumed(root: Path) -> None:
    with LocalBlobStore(root, reserve_free_bytes=0) as store, store.ingest("ref") as writer:
        writer.write(b"data")
    (root / "ingest" / ref_key("ref") / "data").chmod(0o444)
    with LocalBlobStore(root, reserve_free_bytes=0) as store, store.ingest("ref") as writer:
        writer.write(b"more")
        assert writer.commit().digest == Digest.of(b"datamore")


def test_close_of_the_store_keeps_open_ingests(root: Path) -> None:
    store = LocalBlobStore(root, reserve_free_bytes=0)
    writer = store.ingest("ref")
    writer.write(b"data")
    store.close()
    with pytest.raises(InvalidArgumentError):
        writer.write(b"more")
    with LocalBlobStore(root, reserve_free_bytes=0) as again, again.ingest("ref") as writer:
        assert writer.offset_bytes == 4


def test_collect_that_lists_while_others_delete_goes_on(store: LocalBlobStore) -> None:
    digests = [add(store, b"%d" % number).digest for number in range(40)]
    listing = store.list()
    first = next(listing)
    for digest in digests:
        if digest != first.digest:
            store.delete(digest)
    assert list(listing) == []
    with pytest.raises(NotFoundError):
        store.delete(digests[-1] if digests[-1] != first.digest else digests[0])


def test_store_is_not_blocked_while_a_prefix_is_hashed(store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming a large ingest takes seconds; others must get their blobs meanwhile."""
    with store.ingest("large") as writer:
        writer.write(content(500_000))
    hashing, go_on = threading.Event(), threading.Event()
    original = os.pread

    def slow(fd: int, count: int, offset: int) -> bytes:
        hashing.set()
        assert go_on.wait(timeout=60)
        return original(fd, count, offset)

    monkeypatch.setattr(os, "pread", slow)
    resuming = threading.Thread(target=lambda: store.ingest("large").close())
    resuming.start()
    try:
        assert hashing.wait(timeout=60)
        with pytest.raises(BusyError):
            store.ingest("large")
        digest = add(store, b"small").digest
        assert store.info(digest).size_bytes == 5
        assert store.collect([], grace_s=0).refs == ()
    finally:
        go_on.set()
        resuming.join(timeout=60)
    assert not resuming.is_alive()
