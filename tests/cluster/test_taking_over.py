"""Fetches on two replicas: one of them does it; when that one dies or is paused, the other goes on where it was."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import call, download, fetch, record_of, sha256, wait_for
from tests.cluster.world import PART_BYTES, Site, pause, resume, wait
from tests.fakes.source_server import Source, SourceServer

pytestmark = pytest.mark.backend("etcd", "s3")

CONTENT = random.Random(5).randbytes(4 * PART_BYTES + 12_345)
HELD_AT = 3 * PART_BYTES + 4_321
"""Where the source stops talking: three parts are full by then."""


def _held_fetch(replica: Daemon, sources: SourceServer) -> tuple[Source, str]:
    """A fetch under way, with everything before HELD_AT durable."""
    source = Source(CONTENT, hold_after=HELD_AT)
    record = fetch(replica, sources.add("/disk", source))
    wait(lambda: record_of(replica, record["id"])["size"] >= 3 * PART_BYTES, "three parts to be here")
    assert source.holding.wait(60)
    return source, record["id"]


def _range_start(request: dict[str, str]) -> int:
    return int(request["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in request else 0


def test_fetch_of_a_killed_replica_goes_on_at_another_behind_the_stored_parts(
    site: Site, sources: SourceServer
) -> None:
    first, second = site.replica("first"), site.replica("second")
    source, image_id = _held_fetch(first, sources)
    owner, other = (first, second) if first.metric("mistify_image_fetches") else (second, first)
    owner.kill()
    source.go.set()
    record = wait_for(other, image_id, "complete")
    assert record["digest"] == sha256(CONTENT)
    assert download(other, image_id).content == CONTENT
    assert [_range_start(request) >= 2 * PART_BYTES for request in source.requests] == [False, True]
    assert source.requests[1]["If-Range"] == source.tag
    assert list(site.records().replica.held("fetch-")) == []


def test_fetch_of_a_paused_replica_is_taken_over_and_the_paused_one_changes_nothing(
    site: Site, sources: SourceServer
) -> None:
    first = site.replica("first")
    source, image_id = _held_fetch(first, sources)
    second = site.replica("second")
    pause(first)
    source.holding.clear()
    source.hold_after = PART_BYTES // 2  # behind what is here already
    assert source.holding.wait(60), "nobody took the fetch over"
    resume(first)  # it believes that it fetches, while the other one does
    wait(lambda: "left to whoever" in first.log(), "the first replica to notice")
    source.go.set()
    record = wait_for(second, image_id, "complete")
    assert record["digest"] == sha256(CONTENT)
    for replica in (first, second):
        assert download(replica, image_id).content == CONTENT
    wait(lambda: list(site.bucket().list("ingest/")) == [], "the ingest to be gone")


def test_source_asked_of_both_replicas_at_once_is_fetched_once(site: Site, sources: SourceServer) -> None:
    replicas = [site.replica("first"), site.replica("second")]
    source = Source(b"wanted by many")
    url = sources.add("/many", source)
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda number: fetch(replicas[number % 2], url), range(16)))
    assert len({record["id"] for record in records}) == 1
    for replica in replicas:
        assert wait_for(replica, records[0]["id"], "complete")["digest"] == sha256(b"wanted by many")
        assert len(call(replica, "GET", "/images").json()) == 1
    assert len(source.requests) == 1


def test_image_deleted_at_one_replica_ends_its_fetch_at_the_other(site: Site, sources: SourceServer) -> None:
    first = site.replica("first")
    source, image_id = _held_fetch(first, sources)
    second = site.replica("second")
    assert call(second, "DELETE", f"/images/{image_id}").status_code == 200
    wait(lambda: first.metric("mistify_image_fetches") == 0, "the fetch to end, though its source says nothing")
    source.go.set()
    for replica in (first, second):
        assert call(replica, "GET", f"/images/{image_id}").status_code == 404
    wait(lambda: list(site.bucket().list("ingest/")) == [], "the bytes to go")
    assert list(site.bucket().list("blobs/")) == []


def test_start_of_a_replica_leaves_what_others_are_at(site: Site, sources: SourceServer) -> None:
    first = site.replica("first")
    source, image_id = _held_fetch(first, sources)
    before = {stored.key for stored in site.bucket().list("ingest/")}
    second = site.replica("second")
    assert before <= {stored.key for stored in site.bucket().list("ingest/")}
    source.go.set()
    assert wait_for(second, image_id, "complete")["digest"] == sha256(CONTENT)
    assert len(source.requests) == 1


def test_whoever_waits_at_a_replica_that_does_not_fetch_is_told_the_end(site: Site, sources: SourceServer) -> None:
    first = site.replica("first")
    source, image_id = _held_fetch(first, sources)
    second = site.replica("second")
    with ThreadPoolExecutor(2) as pool:
        waited = pool.submit(call, second, "GET", f"/images/{image_id}", headers={"Prefer": "wait=100"})
        with call(second, "GET", f"/images/{image_id}/events", stream=True) as response:
            lines = response.iter_lines()
            assert next(lines) == b"event: downloading"
            assert not waited.done()
            source.go.set()
            events = [line for line in lines if line.startswith(b"event: ")]
        assert events[-1] == b"event: complete"
        assert waited.result().json()["status"] == "complete"


def test_whoever_waits_is_told_that_another_replica_deleted_the_image(site: Site, sources: SourceServer) -> None:
    first = site.replica("first")
    _, image_id = _held_fetch(first, sources)
    second = site.replica("second")
    with call(second, "GET", f"/images/{image_id}/events", stream=True) as response:
        lines = response.iter_lines()
        assert next(lines) == b"event: downloading"
        assert call(first, "DELETE", f"/images/{image_id}").status_code == 200
        assert [line for line in lines if line.startswith(b"event: ")][-1] == b"event: deleted"
