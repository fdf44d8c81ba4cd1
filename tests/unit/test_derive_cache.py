"""Derived blobs are made once for all who ask, survive restarts, and are given up by rule."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from image_service.admission import Admission, AdmissionLimits
from image_service.derive_cache import EVICT_GRACE_S, PREFIX, DerivedIndex
from image_service.derive_forms import Recipe, Shape
from image_service.derive_work import DeriveLimits, SharedWork, Work
from image_service.spool import Spool
from imaging.blobs.base import BlobInfo
from imaging.blobs.writer import LocalBlobWriter
from imaging.compression import Compression
from imaging.digests import Digest
from imaging.errors import BadDataError, InternalError, NoSpaceError, NotFoundError, UnavailableError
from imaging.kv.base import Delete, Put, put
from imaging.kv.sqlite import SqliteKeyValue
from tests.fakes.derive_world import LIMITS, DeriveWorld, open_derive_world
from tests.fakes.disk_files import changed, disk_bytes
from tests.waiting import wait_until

OLD = disk_bytes(1)
NEW = changed(OLD, 3)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[DeriveWorld]:
    async with open_derive_world(tmp_path / "world") as world:
        yield world


# -- once ------------------------------------------------------------------------------------------------------------


async def test_concurrent_requests_derive_once(world: DeriveWorld) -> None:
    world.add("old", OLD)
    world.add("new", NEW)
    asked = [world.get("new", base="old") for _ in range(20)] + [world.get("new", format="zvol") for _ in range(20)]
    answers = await asyncio.gather(*asked)
    assert len(set(answers[:20])) == len(set(answers[20:])) == 1
    assert world.deriver.started == 2
    assert world.strays() == []


async def test_derived_blob_outlives_a_restart(tmp_path: Path) -> None:
    async with open_derive_world(tmp_path) as world:
        world.add("img", OLD)
        first = await world.info("img", format="zvol")
    async with open_derive_world(tmp_path) as world:
        world.collector.recover()
        assert (await world.info("img", format="zvol")).digest == first.digest
        assert world.deriver.started == 0


async def test_derivation_that_a_crash_cut_off_leaves_nothing(tmp_path: Path) -> None:
    async with open_derive_world(tmp_path) as world:
        world.add("img", OLD)
        world.blobs.lease("derive-key", ttl_s=3600)
        with world.blobs.ingest("derive-key", lease="derive-key") as writer:
            writer.write(OLD)
        (world.work_directory / ".tmp-left-behind").write_bytes(OLD)
    async with open_derive_world(tmp_path) as world:
        world.collector.recover()
        assert world.strays() == []
        assert [info.digest for info in world.blobs.list()] == [Digest.of(OLD)]


async def test_derived_blob_that_is_gone_or_forgotten_is_made_again(world: DeriveWorld) -> None:
    world.add("img", OLD)
    first = await world.info("img", format="zvol")
    world.blobs.delete(first.digest)
    assert (await world.info("img", format="zvol")).digest == first.digest
    entry = world.engine.list(PREFIX)[0]
    put(world.engine, entry.key, b"not json")
    assert (await world.info("img", format="zvol")).digest == first.digest
    assert world.deriver.started == 3


# -- shared work -----------------------------------------------------------------------------------------------------


@contextmanager
def blocked() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: work has begun, work may go on."""
    begun, go_on = threading.Event(), threading.Event()
    try:
        yield begun, go_on
    finally:
        go_on.set()


async def begun(event: threading.Event) -> None:
    await asyncio.to_thread(wait_until, event.is_set, "the work to begin")


async def test_work_that_takes_long_is_told_to_come_again_and_goes_on(tmp_path: Path) -> None:
    work = SharedWork(tmp_path, replace(LIMITS, wait_s=0.01))
    with blocked() as (started, go_on):

        def make(step: Work) -> str:
            step.step(1234)
            started.set()
            go_on.wait()
            return "made"

        with pytest.raises(UnavailableError, match="being made"):
            await work.run("key", make)
        await begun(started)
        with pytest.raises(UnavailableError, match=r"1234 bytes worked through"):
            await work.run("key", make)
        assert work.running == 1
        go_on.set()
        await asyncio.to_thread(wait_until, lambda: work.started == 1, "the work to go on")
    await work.close()
    assert (work.running, work.started) == (0, 1)


async def test_work_beyond_the_limit_is_refused_at_once(tmp_path: Path) -> None:
    work = SharedWork(tmp_path, replace(LIMITS, derivations_max=1, waiting_max=2))
    with blocked() as (started, go_on):

        def make(_: Work) -> str:
            started.set()
            go_on.wait()
            return "made"

        accepted = [asyncio.create_task(work.run(key, make)) for key in ("a", "b", "b")]
        await begun(started)
        with pytest.raises(UnavailableError, match="too many derived images"):
            await work.run("c", make)
        assert (work.running, work.started) == (2, 1)
        go_on.set()
        assert await asyncio.gather(*accepted) == ["made"] * 3
    await work.close()
    with pytest.raises(UnavailableError, match="too many"):
        await work.run("a", make)


async def test_work_whose_asker_goes_away_goes_on_for_the_others(tmp_path: Path) -> None:
    work = SharedWork(tmp_path, LIMITS)
    with blocked() as (started, go_on):

        def make(_: Work) -> str:
            started.set()
            go_on.wait()
            return "made"

        first, second = (asyncio.create_task(work.run("key", make)) for _ in range(2))
        await begun(started)
        first.cancel()
        await asyncio.wait([first])
        go_on.set()
        assert await second == "made"
    await work.close()


async def test_work_that_failed_for_good_is_not_repeated_for_a_while(tmp_path: Path) -> None:
    calls: list[str] = []

    def fail(work: Work) -> None:
        calls.append(work.key)
        if work.key == "bug":
            raise ZeroDivisionError
        raise BadDataError("the disk is damaged") if work.key == "bad" else UnavailableError("busy")

    work = SharedWork(tmp_path, LIMITS)
    for key, kind in (("bad", BadDataError), ("bug", InternalError), ("busy", UnavailableError)):
        for _ in range(2):
            with pytest.raises(kind):
                await work.run(key, fail)
    assert calls == ["bad", "bug", "busy", "busy"]
    await work.close()
    forgetful = SharedWork(tmp_path, replace(LIMITS, failure_keep_s=0.0))
    for _ in range(2):
        with pytest.raises(BadDataError, match="damaged"):
            await forgetful.run("bad", fail)
    assert calls[4:] == ["bad", "bad"]
    await forgetful.close()


async def test_work_ends_when_the_service_stops_or_time_or_room_is_up(tmp_path: Path) -> None:
    def endless(work: Work) -> None:
        started.set()
        while True:
            work.step(1 << 20)

    for changes, kind, words in (
        ({"total_timeout_s": 0.0}, UnavailableError, "took longer"),
        ({"free_min_bytes": 1 << 62}, NoSpaceError, "no room"),
    ):
        started = threading.Event()
        work = SharedWork(tmp_path, replace(LIMITS, **changes))
        with pytest.raises(kind, match=words):
            await work.run("key", endless)
        await work.close()
    started = threading.Event()
    work = SharedWork(tmp_path, LIMITS)
    asked = asyncio.create_task(work.run("key", endless))
    await begun(started)
    await work.close()
    with pytest.raises(UnavailableError, match="stopping"):
        await asked


async def test_derivation_waits_for_whoever_has_its_turn(world: DeriveWorld) -> None:
    world.add("old", OLD)
    first = await world.info("old", format="zvol")
    (entry,) = world.engine.list(PREFIX)
    world.engine.transact([Delete(entry.key)])
    with world.records.replica.acquire(f"derive-{entry.key.removeprefix(PREFIX)}"):
        asked = asyncio.create_task(world.info("old", format="zvol"))
        await asyncio.wait([asked], timeout=1.0)
        assert not asked.done()
        world.engine.transact([Put(entry.key, entry.value)])  # the other one has made it
        assert (await asked).digest == first.digest


@pytest.mark.parametrize("same", [True, False])
async def test_derivation_goes_on_behind_what_a_dead_replica_stored_if_that_is_the_same(
    world: DeriveWorld, monkeypatch: pytest.MonkeyPatch, *, same: bool
) -> None:
    world.add("old", OLD)
    first = await world.info("old", format="zvol")
    made = world.read(first)
    (entry,) = world.engine.list(PREFIX)
    world.engine.transact([Delete(entry.key)])
    world.collector.drop(first.digest)
    left = made[: len(made) // 2] if same else bytes(len(made) // 2)
    ref = f"derive-{entry.key.removeprefix(PREFIX)}"
    world.blobs.lease(ref, ttl_s=3600)
    with world.blobs.ingest(ref, lease=ref) as writer:
        writer.write(left)
    written: list[int] = []
    write = LocalBlobWriter.write

    def count(self: LocalBlobWriter, data: bytes) -> None:
        written.append(len(data))
        write(self, data)

    monkeypatch.setattr(LocalBlobWriter, "write", count)
    again = await world.info("old", format="zvol")
    assert (again.digest, world.read(again)) == (first.digest, made)
    assert sum(written) == (len(made) - len(left) if same else len(made))
    assert world.strays() == []


# -- garbage ---------------------------------------------------------------------------------------------------------


async def test_collection_keeps_derived_blobs_as_long_as_their_sources(world: DeriveWorld) -> None:
    world.add("old", OLD)
    world.add("new", NEW)
    increment = await world.info("new", base="old")
    full = await world.info("new", format="zvol")
    chunks = await world.deriver.get_chunks(world.add("other", disk_bytes(5)))
    world.collector.collect()
    assert {increment.digest, full.digest} <= {info.digest for info in world.blobs.list()}
    assert world.store.chunks.find(full) is not None
    world.records.delete("old")
    world.collector.collect()
    left = {info.digest for info in world.blobs.list()}
    assert full.digest in left
    assert increment.digest not in left
    assert world.store.chunks.find(increment) is None
    assert world.store.chunks.find(world.blobs.info(chunks.digest)) == chunks
    world.records.delete("new")
    world.collector.collect()
    assert full.digest not in {info.digest for info in world.blobs.list()}
    assert world.engine.list(PREFIX) == []


async def test_derived_blob_that_is_also_an_image_outlives_the_cache(world: DeriveWorld) -> None:
    world.add("img", OLD)
    stream = await world.get("img", format="zvol")
    uploaded = world.add("stream", stream)
    world.records.delete("img")
    world.collector.collect()
    assert world.read(uploaded) == stream
    world.records.delete("stream")
    world.collector.drop(uploaded.digest)
    with pytest.raises(NotFoundError):
        world.blobs.info(uploaded.digest)


async def test_image_that_is_also_a_derived_blob_is_not_dropped_with_its_record(world: DeriveWorld) -> None:
    world.add("img", OLD)
    stream = await world.get("img", format="zvol")
    uploaded = world.add("stream", stream)
    world.records.delete("stream")
    world.collector.drop(uploaded.digest)
    assert await world.get("img", format="zvol") == stream
    assert world.deriver.started == 1


def recipe(number: int) -> Recipe:
    return Recipe(Digest.of(str(number).encode()), Shape.ZVOL, Compression.ZSTD)


def fill(index: DerivedIndex, count: int, now: list[float]) -> list[Digest]:
    """One entry a second."""
    infos = [BlobInfo(Digest.of(bytes([number])), 100, 0.0) for number in range(count)]
    for number, info in enumerate(infos):
        now[0] = float(number)
        index.save(recipe(number), info)
    return [info.digest for info in infos]


def test_index_evicts_what_is_old_and_what_is_too_much_least_recently_used_first(tmp_path: Path) -> None:
    now = [0.0]
    limits = DeriveLimits(cache_max_bytes=250, cache_max_age_s=1e6)
    with SqliteKeyValue(tmp_path / "kv.db") as store:
        index = DerivedIndex(store, limits, clock=lambda: now[0])
        blobs = fill(index, 4, now)
        assert index.sweep(lambda _: True) == []  # all used just now
        now[0] = EVICT_GRACE_S * 2
        assert index.find(recipe(0)) is not None  # notes the use
        assert index.sweep(lambda _: True) == blobs[1:3]
        now[0] += EVICT_GRACE_S * 2
        assert index.make_room(1) == [blobs[3]]
        now[0] += 2e6
        assert index.sweep(lambda _: True) == [blobs[0]]
        assert index.digests() == set()


def test_index_notes_uses_now_and_then_only(tmp_path: Path) -> None:
    now = [0.0]
    with SqliteKeyValue(tmp_path / "kv.db") as store:
        index = DerivedIndex(store, DeriveLimits(), clock=lambda: now[0])
        fill(index, 1, now)
        revisions = []
        for at in (1.0, 200.0, 400.0, 401.0):
            now[0] = at
            found = index.find(recipe(0))
            assert found is not None
            assert msgspec.json.decode(store.list(PREFIX)[0].value)["size_bytes"] == 100
            revisions.append(store.list(PREFIX)[0].revision)
        assert revisions[0] == revisions[1] < revisions[2] == revisions[3]


async def test_quota_that_is_used_up_by_derived_blobs_makes_room(tmp_path: Path) -> None:
    data = random.Random(8).randbytes(1 << 20)
    async with open_derive_world(tmp_path, quota_bytes=5 * len(data) // 2) as world:
        clock = [0.0]
        world.store.index = DerivedIndex(world.engine, LIMITS, clock=lambda: clock[0])
        world.add("img", data)
        first = await world.info("img", format="zvol", compression="none")
        with pytest.raises(NoSpaceError):  # somebody may be about to read the first one
            await world.info("img", format="zvol", compression="gzip")
        clock[0] = EVICT_GRACE_S * 2
        await world.info("img", format="zvol", compression="zstd")
        with pytest.raises(NotFoundError):
            world.blobs.info(first.digest)
        assert world.strays() == []


async def test_image_that_has_no_room_is_taken_when_derived_blobs_have_gone(tmp_path: Path) -> None:
    data = random.Random(8).randbytes(1 << 20)
    async with open_derive_world(tmp_path, quota_bytes=5 * len(data) // 2) as world:
        clock = [0.0]
        world.store.index = DerivedIndex(world.engine, LIMITS, clock=lambda: clock[0])
        world.add("img", data)
        derived = await world.info("img", format="zvol", compression="none")
        limits = AdmissionLimits(quota_bytes=5 * len(data) // 2, free_min_bytes=0)
        admission = Admission(limits, used_bytes=lambda: world.blobs.used_bytes)
        admission.add_reclaimer(world.store.make_room)
        with pytest.raises(NoSpaceError):  # somebody may be about to read it
            admission.reserve("upload", len(data))
        clock[0] = EVICT_GRACE_S * 2
        with pytest.raises(NoSpaceError):
            admission.reserve("upload", 3 * len(data))  # no room would be enough, so nothing goes
        world.blobs.info(derived.digest)
        admission.reserve("upload", len(data)).end()
        with pytest.raises(NotFoundError):
            world.blobs.info(derived.digest)


async def test_image_of_unknown_length_makes_room_as_it_comes(tmp_path: Path) -> None:
    data = random.Random(9).randbytes(1 << 20)
    async with open_derive_world(tmp_path, quota_bytes=5 * len(data) // 2) as world:
        clock = [0.0]
        world.store.index = DerivedIndex(world.engine, LIMITS, clock=lambda: clock[0])
        world.add("img", data)
        derived = await world.info("img", format="zvol", compression="none")
        clock[0] = EVICT_GRACE_S * 2
        admission = Admission(AdmissionLimits(free_min_bytes=0))
        admission.add_reclaimer(world.store.make_room)
        with admission.reserve("upload") as room:
            async with await Spool.open(world.blobs, world.offload, room, max_bytes=1 << 30) as spool:
                await spool.write(data[::-1])
                assert (await spool.commit()).digest == Digest.of(data[::-1])
        with pytest.raises(NotFoundError):
            world.blobs.info(derived.digest)
