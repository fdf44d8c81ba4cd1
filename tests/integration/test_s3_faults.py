"""Many parts, several replicas, servers that die or pause, on a real S3 server."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import urllib3

from demo.servers.s3 import BUCKET, make_bucket, s3_settings
from demo.servers.swift import SwiftServer, swift_server
from imaging.blobs.s3 import S3BlobStore
from imaging.blobs.s3_bucket import S3Bucket, S3Settings
from imaging.blobs.s3_ingest import PART_SIZE_MIN_BYTES, PartLimits, ingest_prefix
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    BusyError,
    InvalidArgumentError,
    NotFoundError,
    NotPermittedError,
    TooLargeError,
    UnavailableError,
)
from tests.contracts.blob_store import HOUR_S, add, content, read
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("s3")

PARTS = PartLimits(size_bytes=PART_SIZE_MIN_BYTES)
NO_GRACE_S = -5.0
ROOT = Path(__file__).resolve().parents[2]

_names = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        make_bucket(server, BUCKET)
        yield server


@pytest.fixture
def server(shared: SwiftServer) -> Iterator[SwiftServer]:
    """Up before and after each test."""
    yield shared
    for process in shared.processes.values():
        process.resume()
        if not process.is_running:
            process.start()
    shared.wait_ready()


@pytest.fixture
def settings(server: SwiftServer) -> S3Settings:
    return replace(s3_settings(server, prefix=f"fault{next(_names)}/"), read_timeout_s=10.0)


@pytest.fixture
def store(settings: S3Settings) -> Iterator[S3BlobStore]:
    with S3BlobStore(settings, parts=PARTS) as store:
        yield store


@pytest.fixture
def bucket(settings: S3Settings) -> Iterator[S3Bucket]:
    bucket = S3Bucket(settings)
    yield bucket
    bucket.close()


@pytest.mark.parametrize("extra_bytes", [0, 1, 100_000])
def test_blob_of_several_parts_is_put_together_by_the_service(
    store: S3BlobStore, bucket: S3Bucket, extra_bytes: int
) -> None:
    data = content(3 * PART_SIZE_MIN_BYTES + extra_bytes)
    info = add(store, data)
    assert (info.digest, info.size_bytes) == (Digest.of(data), len(data))
    assert read(store, info.digest, verify=True) == data
    assert read(store, info.digest, offset_bytes=PART_SIZE_MIN_BYTES - 1) == data[PART_SIZE_MIN_BYTES - 1 :]
    assert [stored.key for stored in bucket.list("ingest/")] == []
    assert list(bucket.uploads("")) == []


def test_blob_of_exactly_one_part(store: S3BlobStore) -> None:
    data = content(PART_SIZE_MIN_BYTES)
    assert read(store, add(store, data).digest, verify=True) == data


def test_damaged_blob_of_several_parts_is_quarantined(store: S3BlobStore, bucket: S3Bucket) -> None:
    data = content(2 * PART_SIZE_MIN_BYTES + 5)
    digest = add(store, data).digest
    [copy] = list(bucket.list("blobs/"))
    bucket.put(copy.key, data[:-1] + b"?" if data[-1:] != b"?" else data[:-1] + b"!")
    with pytest.raises(BadDataError, match=digest.hex):
        store.verify(digest)
    assert list(bucket.list("blobs/")) == []
    assert [stored.size_bytes for stored in bucket.list("quarantine/")] == [len(data)]


_WRITER = """
import sys
from imaging.blobs.s3 import S3BlobStore
from imaging.blobs.s3_bucket import S3Settings
from imaging.blobs.s3_ingest import PartLimits
from tests.contracts.blob_store import content
bucket, endpoint, access, secret, prefix = sys.argv[1:]
settings = S3Settings(bucket=bucket, endpoint=endpoint, access_key=access, secret_key=secret, prefix=prefix)
store = S3BlobStore(settings, parts=PartLimits(size_bytes=5 << 20))
writer = store.ingest("big")
writer.write(content(12 << 20)[: 11 << 20])
print(writer.offset_bytes, flush=True)
sys.stdin.read()
"""


def test_writer_killed_between_parts_is_continued_by_another_replica(settings: S3Settings, store: S3BlobStore) -> None:
    """kill -9 of a process that wrote 11 MiB: the two parts it stored count, the rest is written again."""
    arguments = [settings.bucket, str(settings.endpoint), str(settings.access_key), str(settings.secret_key)]
    command = [sys.executable, "-c", _WRITER, *arguments, settings.prefix]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == 11 << 20
        process.kill()
    data = content(12 << 20)
    with store.ingest("big") as writer:
        assert writer.offset_bytes == 10 << 20
        writer.write(data[10 << 20 :])
        info = writer.commit(digest=Digest.of(data), size_bytes=len(data))
    assert read(store, info.digest, verify=True) == data


def test_part_that_was_changed_behind_our_back_is_not_resumed_from(
    settings: S3Settings, store: S3BlobStore, bucket: S3Bucket
) -> None:
    data = content(2 * PART_SIZE_MIN_BYTES)
    with store.ingest("ref") as writer:
        writer.write(data)
    second = sorted(stored.key for stored in bucket.list(ingest_prefix("ref")) if "state" not in stored.key)[1]
    bucket.put(second, b"something else")
    with store.ingest("ref") as writer:
        assert writer.offset_bytes == PART_SIZE_MIN_BYTES
        writer.write(data[PART_SIZE_MIN_BYTES:])
        assert writer.commit().digest == Digest.of(data)


def test_zombie_writer_spoils_nothing_of_its_successor(settings: S3Settings, store: S3BlobStore) -> None:
    """A replica that was paused goes on writing an ingest that another one took over and restarted."""
    ours, theirs = content(12 << 20, seed=1), content(12 << 20, seed=2)
    with S3BlobStore(settings, parts=PARTS) as other:
        zombie = other.ingest("ref")
        zombie.write(theirs[: 6 << 20])
        with store.ingest("ref") as writer:
            writer.restart()
            writer.write(ours[: 6 << 20])
            zombie.write(theirs[6 << 20 :])
            writer.write(ours[6 << 20 :])
            info = writer.commit()
        zombie.abort()
    assert info.digest == Digest.of(ours)
    assert read(store, info.digest, verify=True) == ours


def test_commits_of_one_replica_survive_the_collections_of_another(settings: S3Settings, store: S3BlobStore) -> None:
    """Few contents, committed under leases by one replica and collected all the time by another one."""
    done = threading.Event()

    def collect() -> int:
        rounds = 0
        with S3BlobStore(settings, parts=PARTS) as other:
            while not done.is_set():
                other.collect([], grace_s=NO_GRACE_S)
                rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(collect)
        try:
            for count in range(15):
                store.lease("work", ttl_s=HOUR_S)
                with store.ingest("ref", lease="work") as writer:
                    writer.write(b"content %d" % (count % 2))
                    digest = writer.commit().digest
                assert read(store, digest, verify=True) == b"content %d" % (count % 2)
                store.release("work")
        finally:
            done.set()
        assert collecting.result(timeout=120) > 0


def test_copies_of_one_blob_are_cleared_to_one(store: S3BlobStore, bucket: S3Bucket) -> None:
    for number in range(3):
        add(store, b"same", f"ref {number}")
    assert len(list(bucket.list("blobs/"))) == 3
    report = store.collect([Digest.of(b"same")], grace_s=NO_GRACE_S)
    assert (report.blobs, report.kept, report.freed_bytes) == ((), 1, 8)
    assert len(list(bucket.list("blobs/"))) == 1
    assert read(store, Digest.of(b"same")) == b"same"


def test_reader_whose_copy_is_cleared_goes_on_with_another(store: S3BlobStore, bucket: S3Bucket) -> None:
    data = content(3 * PART_SIZE_MIN_BYTES)
    digest = add(store, data).digest
    [old] = list(bucket.list("blobs/"))
    with store.open(digest) as reader:
        head = reader.read(1000)
        add(store, data, "again")
        bucket.delete(old.key)
        assert head + reader.read() == data


@pytest.mark.parametrize("kind", ["proxy", "object"])
@pytest.mark.parametrize("blow", ["kill", "pause"])
def test_server_lost_in_the_middle_is_unavailable_and_the_upload_goes_on(
    server: SwiftServer, settings: S3Settings, kind: str, blow: str
) -> None:
    data = content(13 << 20)
    impatient = replace(settings, read_timeout_s=3.0, attempts_max=2)
    process = server.processes[kind]
    with S3BlobStore(impatient, parts=PARTS) as store:
        writer = store.ingest("ref")
        writer.write(data[: 6 << 20])
        getattr(process, blow)()
        with pytest.raises(UnavailableError):
            writer.write(data[6 << 20 :])
        assert writer.offset_bytes == 6 << 20
        process.resume()
        if not process.is_running:
            process.start()
        server.wait_ready()
        wait_until(lambda: _try(lambda: writer.write(data[6 << 20 :])), "the rest to be taken", timeout_s=120.0)
        info = wait_until(lambda: _try(writer.commit), "the commit", timeout_s=120.0)
        assert info is not None
        assert read(store, Digest.of(data), verify=True) == data


def _try(call: object) -> object:
    try:
        return call() or True  # type: ignore[operator]
    except UnavailableError:
        return None


def test_abort_while_the_server_is_away_lets_go_of_the_ingest(server: SwiftServer, settings: S3Settings) -> None:
    impatient = replace(settings, read_timeout_s=3.0, attempts_max=2)
    with S3BlobStore(impatient, parts=PARTS) as store:
        writer = store.ingest("ref")
        writer.write(content(6 << 20))
        server.proxy.kill()
        with pytest.raises(UnavailableError):
            writer.abort()
        server.proxy.start()
        server.wait_ready()
        with store.ingest("ref") as again:
            again.restart()
            again.write(b"whole")
            assert again.commit().digest == Digest.of(b"whole")


def test_presigned_address_gives_the_blob_to_anybody_with_ranges(store: S3BlobStore) -> None:
    data = content(300_000)
    url = store.presigned_url(add(store, data).digest, expires_s=60)
    pools = urllib3.PoolManager(retries=False)
    assert pools.request("GET", url, timeout=30.0).data == data
    part = pools.request("GET", url, headers={"Range": "bytes=299990-"}, timeout=30.0)
    assert (part.status, part.data) == (206, data[299_990:])
    assert pools.request("GET", url.split("?")[0], timeout=30.0).status in {400, 403}
    pools.clear()
    with pytest.raises(NotFoundError):
        store.presigned_url(Digest.of(b"absent"), expires_s=60)


def test_more_parts_than_the_service_takes_is_too_large(settings: S3Settings) -> None:
    few = PartLimits(size_bytes=PART_SIZE_MIN_BYTES, count_max=2)
    with S3BlobStore(settings, parts=few) as store, store.ingest("ref") as writer:
        writer.write(content(2 * PART_SIZE_MIN_BYTES))
        with pytest.raises(TooLargeError):
            writer.write(b"x")
        writer.abort()


def test_orphaned_parts_and_abandoned_ingests_are_collected(store: S3BlobStore, bucket: S3Bucket) -> None:
    with store.ingest("left behind") as writer:
        writer.write(content(6 << 20))
    bucket.delete(f"{ingest_prefix('left behind')}state")  # as a crash in the middle of a removal leaves it
    with pytest.raises(BusyError), store.ingest("in use") as writer:
        store.ingest("in use")
    report = store.collect([], grace_s=NO_GRACE_S)
    assert report.refs == ("in use",)
    assert report.freed_bytes == 6 << 20
    assert list(bucket.list("ingest/")) == []


def test_wrong_key_bucket_or_parts_are_told(server: SwiftServer, settings: S3Settings) -> None:
    with S3BlobStore(replace(settings, secret_key="wrong")) as store, pytest.raises(NotPermittedError):
        store.leases()
    with S3BlobStore(replace(settings, bucket="no-such-bucket")) as store, pytest.raises(UnavailableError):
        store.leases()
    with pytest.raises(InvalidArgumentError):
        S3BlobStore(settings, parts=PartLimits(size_bytes=1))


def test_random_pieces_over_part_borders_give_the_same_blob(store: S3BlobStore) -> None:
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    data = content(2 * PART_SIZE_MIN_BYTES + 12_345, seed=seed)
    with store.ingest("ref") as writer:
        start = 0
        while start < len(data):
            end = min(len(data), start + dice.randrange(1, 3 << 20))
            writer.write(memoryview(data)[start:end])
            start = end
            if dice.random() < 0.2:
                assert writer.checkpoint() == start, f"seed {seed}"
        assert writer.commit().digest == Digest.of(data), f"seed {seed}"
    assert read(store, Digest.of(data), verify=True) == data, f"seed {seed}"
