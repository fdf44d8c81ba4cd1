"""The parts between the wire and the stores: spooling, admission, collection, and fetches that are cancelled or parked."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from image_service.admission import Admission, AdmissionLimits
from image_service.collector import Collector, fetch_ref, upload_ref
from image_service.fetcher import ConversationLimits, Fetcher
from image_service.importer import FetchLimits, Importer
from image_service.inspector import Inspector
from image_service.lifecycle import Details, Expected, Image, ImageStatus, ImageType
from image_service.metadata import MetadataStore
from image_service.service import ImageService
from image_service.sources import SourcePolicy
from image_service.spool import Pools, Spool, settled
from image_service.uploads import Uploads
from imaging.blobs.local import LocalBlobStore
from imaging.digests import Digest
from imaging.errors import ConflictError, NoSpaceError, NotFoundError, TooLargeError, UnavailableError
from imaging.kv.leases import Fence
from imaging.kv.sqlite import SqliteKeyValue
from tests.fakes.source_server import Source, SourceServer, start_source_server

DATA = b"content " * 50_000
LIMITS = FetchLimits(fetches_max=2, waiting_max=3, failures_max=2, backoff_s=0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[SourceServer]:
    with start_source_server() as running:
        yield running


class Parts:
    """A service on real stores in a directory, to be opened and closed again."""

    def __init__(self, directory: Path) -> None:
        self.records = MetadataStore.over(SqliteKeyValue(directory / "records.db"))
        self.blobs = LocalBlobStore(directory / "images", reserve_free_bytes=0)
        self.pools = Pools()
        policy = SourcePolicy.parse(["127.0.0.0/8"])
        self.fetcher = Fetcher(policy, ConversationLimits())
        self.collector = Collector(self.records, self.blobs)
        self.admission = Admission(AdmissionLimits(size_max_bytes=10 << 20))
        self.inspector = Inspector(self.records, self.blobs, self.admission, self.collector)
        self.importer = Importer(
            self.records,
            self.blobs,
            self.fetcher,
            self.collector,
            self.inspector,
            pools=self.pools,
            limits=LIMITS,
        )
        self.service = ImageService(
            self.records,
            self.blobs,
            self.importer,
            self.collector,
            self.inspector,
            policy=policy,
            pools=self.pools,
        )

    async def close(self) -> None:
        await self.service.close()
        await self.fetcher.close()
        self.pools.close()
        self.blobs.close()
        self.records.shutdown()

    async def wait(self, image_id: str, status: ImageStatus, *, size_bytes: int = 0) -> Image:
        """The record once it has that status and size."""
        async with asyncio.timeout(60):
            while True:
                image = await self.service.get(image_id)
                if image.status is status and image.size_bytes >= size_bytes:
                    return image
                await asyncio.sleep(0.01)

    async def wait_until_idle(self) -> None:
        """Until no fetch is running."""
        async with asyncio.timeout(60):
            while tasks := list(self.importer._tasks.values()):
                await asyncio.wait(tasks)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    made = Parts(tmp_path)
    yield made
    await made.close()


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _hold(source: Source) -> None:
    """Until a request of this source waits."""
    assert await asyncio.to_thread(source.holding.wait, 60)


# -- settled -------------------------------------------------------------------------------------------------------------


async def test_settled_call_ends_before_its_waiter_is_cancelled() -> None:
    pools, begun, go, ended = Pools(), threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait(60)
        ended.set()

    waiter = asyncio.create_task(settled(pools.data(work)))
    assert await asyncio.to_thread(begun.wait, 60)
    for _ in range(3):  # a second and third cancel must not let go either
        waiter.cancel()
        await asyncio.sleep(0)
    assert not waiter.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert ended.is_set()
    pools.close()


async def test_settled_call_that_fails_for_a_cancelled_waiter_is_not_reported_as_forgotten() -> None:
    loop, reported, go = asyncio.get_running_loop(), list[object](), asyncio.Event()
    loop.set_exception_handler(lambda _, context: reported.append(context))

    async def work() -> None:
        await go.wait()
        raise UnavailableError("the store went away")

    waiter = asyncio.create_task(settled(work()))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.sleep(0)
    go.set()
    await asyncio.wait([waiter])
    assert waiter.cancelled()
    del waiter
    await asyncio.sleep(0)
    gc.collect()
    assert reported == []


# -- uploads ---------------------------------------------------------------------------------------------------------------


async def test_upload_that_fails_in_the_middle_leaves_nothing(parts: Parts) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield DATA
        raise UnavailableError("the client went away")

    with pytest.raises(UnavailableError, match="went away"):
        await parts.service.upload(ImageType.KVM, broken())
    assert (list(parts.blobs.list()), list(parts.blobs.ingests()), list(parts.blobs.leases())) == ([], [], [])
    assert parts.records.list() == []


async def test_upload_that_is_cancelled_leaves_nothing(parts: Parts) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield DATA
            begun.set()
            await asyncio.sleep(0)

    task = asyncio.create_task(parts.service.upload(ImageType.KVM, endless()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (list(parts.blobs.list()), list(parts.blobs.ingests()), list(parts.blobs.leases())) == ([], [], [])


async def test_upload_shorter_than_announced_is_refused(parts: Parts) -> None:
    with pytest.raises(Exception, match="bytes, not"):
        await parts.service.upload(ImageType.KVM, _chunks(b"short"), length_bytes=10)
    assert list(parts.blobs.ingests()) == []


async def test_upload_whose_record_can_not_be_stored_leaves_no_blob(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(image: Image, *, fence: Fence) -> None:
        raise NoSpaceError(f"no space for the record of {image.id} under {fence.name}")

    monkeypatch.setattr(parts.records, "put", refuse)
    with pytest.raises(NoSpaceError):
        await parts.service.upload(ImageType.KVM, _chunks(DATA))
    assert (list(parts.blobs.list()), list(parts.blobs.leases())) == ([], [])


# -- fetches ---------------------------------------------------------------------------------------------------------------


async def test_fetches_beyond_the_limit_wait_and_beyond_the_queue_are_refused(
    parts: Parts, server: SourceServer
) -> None:
    held = [Source(DATA, hold_after=1) for _ in range(3)]
    images = [
        await parts.service.create(server.add(f"/limit/{n}", source), ImageType.KVM) for n, source in enumerate(held)
    ]
    await _hold(held[0])
    await _hold(held[1])
    assert held[2].requests == []
    with pytest.raises(UnavailableError, match="too many fetches"):
        await parts.service.create(server.url + "/limit/x", ImageType.KVM)
    assert parts.records.find_by_source(server.url + "/limit/x") is None
    for source in held:
        source.go.set()
    for image in images:
        await parts.wait(image.id, ImageStatus.COMPLETE)


async def test_parked_fetch_keeps_its_bytes_and_goes_on_at_the_next_start(tmp_path: Path, server: SourceServer) -> None:
    source = Source(DATA, hold_after=100_000)
    first = Parts(tmp_path)
    image = await first.service.create(server.add("/park", source), ImageType.KVM)
    await first.wait(image.id, ImageStatus.DOWNLOADING, size_bytes=100_000)
    await first.close()
    source.go.set()
    second = Parts(tmp_path)
    assert [ingest.ref for ingest in second.blobs.ingests()] == [fetch_ref(image.id)]
    await second.service.start()
    done = await second.wait(image.id, ImageStatus.COMPLETE)
    assert done.digest == str(Digest.of(DATA))
    assert source.requests[1]["Range"] == "bytes=100000-"
    assert list(second.blobs.leases()) == []
    await second.close()


async def test_fetch_that_broke_is_looked_at_in_one_pass_all_the_same(
    parts: Parts, server: SourceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_again(*_: object, **__: object) -> None:
        raise AssertionError("stored bytes were read again")

    monkeypatch.setattr(parts.blobs, "open", read_again)
    source = Source(DATA, break_after=[100_000, 50_000])
    image = await parts.service.create(server.add("/broken", source), ImageType.KVM)
    done = await parts.wait(image.id, ImageStatus.COMPLETE)
    assert len(source.requests) == 3
    assert (done.digest, done.unpacked_sha512) == (str(Digest.of(DATA)), str(Digest.of(DATA, "sha512")))


async def test_fetch_that_died_while_it_was_looked_at_is_not_fetched_again(
    tmp_path: Path, server: SourceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise asyncio.CancelledError

    source = Source(DATA)
    first = Parts(tmp_path)
    monkeypatch.setattr(first.inspector, "publish", die)
    image = await first.service.create(server.add("/looked-at", source), ImageType.KVM)
    await first.wait_until_idle()
    assert (await first.service.get(image.id)).status is ImageStatus.DOWNLOADING
    await first.close()
    second = Parts(tmp_path)
    await second.service.start()
    done = await second.wait(image.id, ImageStatus.COMPLETE)
    assert (done.digest, len(source.requests)) == (str(Digest.of(DATA)), 1)
    assert list(second.blobs.leases()) == []
    await second.service.delete(image.id)
    assert (list(second.blobs.list()), list(second.blobs.ingests())) == ([], [])
    await second.close()


async def test_upload_in_parts_that_died_before_it_was_an_image_becomes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise asyncio.CancelledError

    first = Parts(tmp_path)
    uploads = Uploads(first.records, first.blobs, first.collector, first.inspector, pools=first.pools)
    monkeypatch.setattr(first.inspector, "publish", die)
    upload = await uploads.create(ImageType.KVM, len(DATA), details=Details(), expected=Expected())
    await uploads.append(upload.image.id, 0, _chunks(DATA[:1000]))
    with pytest.raises(asyncio.CancelledError):
        await uploads.append(upload.image.id, 1000, _chunks(DATA[1000:]))
    await first.close()
    second = Parts(tmp_path)
    again = Uploads(second.records, second.blobs, second.collector, second.inspector, pools=second.pools)
    await second.service.start()
    await again.start()
    await asyncio.wait(again._finishing)
    image = await second.wait(upload.image.id, ImageStatus.COMPLETE)
    assert (image.digest, image.unpacked_sha512) == (str(Digest.of(DATA)), str(Digest.of(DATA, "sha512")))
    assert (list(second.blobs.leases()), list(second.blobs.ingests())) == ([], [])
    await again.close()
    await second.close()


async def test_fetch_whose_stored_bytes_are_gone_is_fetched_again(
    tmp_path: Path, server: SourceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise asyncio.CancelledError

    source = Source(DATA)
    first = Parts(tmp_path)
    monkeypatch.setattr(first.inspector, "publish", die)
    image = await first.service.create(server.add("/lost", source), ImageType.KVM)
    await first.wait_until_idle()
    first.collector.discard(fetch_ref(image.id), Digest.of(DATA))
    await first.close()
    second = Parts(tmp_path)
    await second.service.start()
    assert (await second.wait(image.id, ImageStatus.COMPLETE)).digest == str(Digest.of(DATA))
    assert len(source.requests) == 2
    await second.close()


async def test_record_that_was_marked_by_somebody_else_ends_the_fetch(parts: Parts, server: SourceServer) -> None:
    source = Source(DATA, hold_after=1000)
    image = await parts.service.create(server.add("/gone", source), ImageType.KVM)
    await _hold(source)
    parts.records.delete(image.id)  # as another process would
    source.go.set()
    await parts.wait_until_idle()
    assert (list(parts.blobs.list()), list(parts.blobs.ingests()), list(parts.blobs.leases())) == ([], [], [])


async def test_fetch_with_a_bug_ends_as_an_error_and_frees_its_slot(
    parts: Parts, server: SourceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(parts.admission, "reserve", bug)
    image = await parts.service.create(server.add("/bug", Source(DATA)), ImageType.KVM)
    assert (await parts.wait(image.id, ImageStatus.ERROR)).error == "internal error"
    monkeypatch.undo()
    again = await parts.service.create(server.url + "/bug", ImageType.KVM)
    assert (await parts.wait(again.id, ImageStatus.COMPLETE)).id == image.id


async def test_source_there_with_another_type_is_a_conflict_even_after_an_error(
    parts: Parts, server: SourceServer
) -> None:
    url = server.add("/conflict", Source(status=404))
    image = await parts.service.create(url, ImageType.KVM)
    await parts.wait(image.id, ImageStatus.ERROR)
    with pytest.raises(ConflictError, match=image.id):
        await parts.service.create(url, ImageType.CONTAINER)


async def test_total_time_of_a_fetch_is_limited(tmp_path: Path, server: SourceServer) -> None:
    parts = Parts(tmp_path)
    parts.importer._limits = FetchLimits(total_timeout_s=0.2, backoff_s=0.01)
    source = Source(DATA, hold_after=10)
    image = await parts.service.create(server.add("/slow", source), ImageType.KVM)
    assert "longer than" in (await parts.wait(image.id, ImageStatus.ERROR)).error
    assert list(parts.blobs.ingests()) == []
    source.go.set()
    await parts.close()


# -- admission and collection ---------------------------------------------------------------------------------------------


def test_admission_counts_what_others_announced(tmp_path: Path) -> None:
    used = 100
    admission = Admission(AdmissionLimits(size_max_bytes=500, quota_bytes=1000), used_bytes=lambda: used)
    with admission.reserve("a", 500) as first:
        with pytest.raises(NoSpaceError, match="quota"):
            admission.reserve("b", 401)
        admission.reserve("c", 400).end()
        first.receive(500)
        used = 600  # the first one's bytes are in the store now, and counted once
        admission.reserve("d", 400).end()
        with pytest.raises(TooLargeError):
            admission.reserve("e", 501)
    admission.reserve("f").end()


def test_admission_refuses_what_would_fill_the_disk(tmp_path: Path) -> None:
    admission = Admission(AdmissionLimits(size_max_bytes=1 << 62), directory=tmp_path)
    with pytest.raises(NoSpaceError, match="free space"):
        admission.reserve("a", 1 << 60)


async def test_collector_keeps_what_is_named_or_leased_and_removes_the_rest(parts: Parts) -> None:
    kept = await parts.service.upload(ImageType.KVM, _chunks(b"kept"))
    for name in ("stray", "leased"):
        parts.blobs.lease(name, ttl_s=3600)
        with parts.blobs.ingest(name, lease=name) as writer:
            writer.write(name.encode())
            writer.commit()
    parts.blobs.release("stray")
    stray = Digest.of(b"stray")
    assert parts.collector.collect().blobs == ()  # too young: somebody may be about to name it
    young = Collector(parts.records, parts.blobs, grace_s=0)
    assert young.collect().blobs == (), "the grace has a floor"
    parts.collector.recover()
    assert {blob.digest for blob in parts.blobs.list()} == {kept.blob, Digest.of(b"leased")}
    parts.collector.drop(Digest.of(b"leased"))
    parts.collector.drop(stray)
    assert parts.blobs.info(Digest.of(b"leased")).size_bytes == 6


async def test_recovery_ends_the_leases_and_ingests_of_the_dead(parts: Parts) -> None:
    for ref in (upload_ref("dead", "replica-gone"), fetch_ref("unknown")):
        parts.blobs.lease(ref, ttl_s=3600)
        with parts.blobs.ingest(ref, lease=ref) as writer:
            writer.write(b"left behind")
    parts.blobs.lease(upload_ref("committed", "replica-gone"), ttl_s=3600)
    with parts.blobs.ingest(
        upload_ref("committed", "replica-gone"), lease=upload_ref("committed", "replica-gone")
    ) as writer:
        writer.write(b"no record")
        writer.commit()
    await parts.service.start()
    assert (list(parts.blobs.list()), list(parts.blobs.ingests()), list(parts.blobs.leases())) == ([], [], [])


async def test_blob_cannot_be_dropped_between_its_commit_and_its_record(parts: Parts) -> None:
    ref = upload_ref("new", "replica-gone")
    with await parts.pools.data(parts.admission.reserve, ref) as room:
        async with await Spool.open(parts.blobs, parts.pools.data, room, max_bytes=100) as spool:
            await spool.write(b"shared")
            info = await spool.commit()
    parts.collector.drop(info.digest)
    assert parts.blobs.info(info.digest).size_bytes == 6
    parts.collector.forget(ref)
    parts.collector.drop(info.digest)
    with pytest.raises(NotFoundError):
        parts.blobs.info(info.digest)
