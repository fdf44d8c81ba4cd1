"""What the image service does where the original was wrong: fetches that end, one record a source, deletes that stay, limits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import (
    FETCHING,
    call,
    download,
    fetch,
    post,
    record_of,
    sha256,
    stored_files,
    upload,
    wait_for,
)
from tests.fakes.source_server import Source, SourceServer
from tests.waiting import wait_until

DATA = bytes(range(256)) * 1000
SERVICE_FLAGS = FETCHING | {"fetch_checkpoint_s": 0.05}


def _records(service: Daemon, source: str) -> list[str]:
    return [r["id"] for r in call(service, "GET", "/images").json() if r["source"] == source]


# -- no fetch is forgotten, no update lost -------------------------------------------------------------------------------


def test_fetches_quick_and_many_all_reach_complete(service: Daemon, sources: SourceServer) -> None:
    contents = {sources.add(f"/many/{n}", Source(b"image %d" % n * n)): b"image %d" % n * n for n in range(1, 301)}
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda url: fetch(service, url), contents))
    assert len({record["id"] for record in records}) == 300

    def unfinished() -> list[str]:
        return [r["id"] for r in call(service, "GET", "/images").json() if r["status"] in {"pending", "downloading"}]

    wait_until(lambda: not unfinished(), "300 fetches to end", timeout_s=120)
    done = {r["source"]: r for r in call(service, "GET", "/images").json() if r["source"] in contents}
    wrong = [r for url, r in done.items() if (r["status"], r["digest"]) != ("complete", sha256(contents[url]))]
    assert (len(done), wrong) == (300, [])


def test_posts_of_one_source_at_once_make_one_record_and_one_download(service: Daemon, sources: SourceServer) -> None:
    source = Source(DATA)
    url = sources.add("/at-once", source)
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda _: fetch(service, url), range(300)))
    assert len({record["id"] for record in records}) == 1
    wait_for(service, records[0]["id"], "complete")
    assert _records(service, url) == [records[0]["id"]]
    assert len(source.requests) == 1


# -- delete -----------------------------------------------------------------------------------------------------------------


def test_delete_during_a_download_cancels_it_and_leaves_nothing(
    service: Daemon, sources: SourceServer, state_dir: Path
) -> None:
    before = stored_files(state_dir)
    source = Source(DATA, hold_after=70_000)
    record = fetch(service, sources.add("/deleted", source))
    wait_for(service, record["id"], "downloading")
    wait_until(lambda: record_of(service, record["id"])["size"] == 70_000, "some bytes to come in")
    response = call(service, "DELETE", f"/images/{record['id']}")
    assert (response.status_code, response.json()["status"]) == (200, "downloading")
    source.go.set()
    assert call(service, "GET", f"/images/{record['id']}").status_code == 404
    assert stored_files(state_dir) == before
    wait_until(lambda: source.sent, "the source to notice")
    assert call(service, "GET", f"/images/{record['id']}").status_code == 404
    again = wait_for(service, fetch(service, sources.url + "/deleted")["id"], "complete")
    assert again["id"] != record["id"]
    assert download(service, again["id"]).content == DATA


def test_delete_of_a_waiting_fetch_ends_it(service: Daemon, sources: SourceServer) -> None:
    blockers = [Source(b"x" * 10, hold_after=1) for _ in range(8)]
    running = [fetch(service, sources.add(f"/blocker/{n}", blocker)) for n, blocker in enumerate(blockers)]
    for blocker in blockers:
        assert blocker.holding.wait(60)
    waiting = Source(DATA)
    record = fetch(service, sources.add("/waiting", waiting))
    assert record_of(service, record["id"])["status"] == "pending"
    assert call(service, "DELETE", f"/images/{record['id']}").status_code == 200
    for blocker in blockers:
        blocker.go.set()
    for one in running:
        wait_for(service, one["id"], "complete")
    assert waiting.requests == []


def test_deletes_and_posts_of_one_source_leave_a_whole_image_or_none(service: Daemon, sources: SourceServer) -> None:
    url = sources.add("/churn", Source(DATA))

    def turn(number: int) -> int:
        if number % 3:
            return post(service, url).status_code
        for image_id in _records(service, url):
            call(service, "DELETE", f"/images/{image_id}")
        return 0

    with ThreadPoolExecutor(8) as pool:
        statuses = set(pool.map(turn, range(120)))
    assert statuses == {0, 202}
    last = wait_for(service, fetch(service, url)["id"], "complete")
    assert _records(service, url) == [last["id"]]
    assert download(service, last["id"]).content == DATA


# -- failed fetches ---------------------------------------------------------------------------------------------------------


def test_failed_fetch_is_tried_again_by_the_next_post(service: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, status=404)
    url = sources.add("/poison", source)
    record = fetch(service, url)
    failed = wait_for(service, record["id"], "error")
    assert failed["size"] == 0
    assert failed["error"] == f"unexpected http response code: expected 200, received 404, url: {url}"
    assert len(source.requests) == 1
    source.status = 200
    again = fetch(service, url)
    assert (again["id"], again["status"]) == (record["id"], "pending")
    assert wait_for(service, record["id"], "complete")["digest"] == sha256(DATA)


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (503, 3), (429, 3), (403, 1), (410, 1), (400, 1)])
def test_errors_that_may_pass_are_retried_and_others_not(
    service: Daemon, sources: SourceServer, status: int, tries: int
) -> None:
    source = Source(DATA, failures=[status] * 2)
    record = fetch(service, sources.add(f"/retry/{status}", source))
    ended = wait_for(service, record["id"], "complete" if tries > 1 else "error")
    assert len(source.requests) == tries, ended


def test_retries_end_within_their_budget(service: Daemon, sources: SourceServer) -> None:
    source = Source(status=503)
    record = fetch(service, sources.add("/never", source))
    assert "503" in wait_for(service, record["id"], "error")["error"]
    assert len(source.requests) == 6


def test_another_type_for_a_source_that_is_there_is_a_conflict(service: Daemon, sources: SourceServer) -> None:
    url = sources.add("/typed", Source(DATA))
    record = fetch(service, url, image_type="kvm")
    wait_for(service, record["id"], "complete")
    response = post(service, url, image_type="container")
    assert (response.status_code, response.json()["code"]) == (409, 409)
    assert record["id"] in response.json()["message"]
    assert _records(service, url) == [record["id"]]


def test_fetch_of_another_digest_than_expected_never_becomes_complete(
    service: Daemon, sources: SourceServer, state_dir: Path
) -> None:
    before = stored_files(state_dir)
    content = b"not what was promised"
    url = sources.add("/promised", Source(content))
    record = fetch(service, url, digest=sha256(DATA))
    assert "digest" in wait_for(service, record["id"], "error")["error"]
    assert stored_files(state_dir) == before
    good_url = sources.add("/promised-and-kept", Source(content))
    good = wait_for(service, fetch(service, good_url, digest=sha256(content))["id"], "complete")
    assert good["digest"] == sha256(content)
    assert post(service, good_url, digest=sha256(DATA)).status_code == 409


# -- breaks and ranges --------------------------------------------------------------------------------------------------------


def test_broken_fetch_goes_on_with_a_range(service: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, break_after=[100_000, 50_000])
    record = fetch(service, sources.add("/broken", source))
    assert wait_for(service, record["id"], "complete")["digest"] == sha256(DATA)
    assert [headers.get("Range") for headers in source.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert source.requests[1]["If-Range"] == source.tag
    assert sum(source.sent) == len(DATA)


@pytest.mark.parametrize("source", [Source(DATA, ranges=False), Source(DATA, etag=None), Source(DATA, etag='W/"weak"')])
def test_broken_fetch_without_a_proof_starts_from_zero(service: Daemon, sources: SourceServer, source: Source) -> None:
    source.break_after = [100_000]
    record = fetch(service, sources.add(f"/restart/{id(source)}", source))
    done = wait_for(service, record["id"], "complete")
    assert (done["digest"], done["size"]) == (sha256(DATA), len(DATA))
    assert source.sent == [100_000, len(DATA)]


def test_source_that_changed_in_between_starts_from_zero(service: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, hold_after=100_000, break_after=[100_000])
    record = fetch(service, sources.add("/changed", source))
    assert source.holding.wait(60)
    newer = DATA[::-1] + b"longer"
    source.content = newer  # its entity tag changes with it
    source.go.set()
    done = wait_for(service, record["id"], "complete")
    assert (done["digest"], done["size"]) == (sha256(newer), len(newer))
    assert download(service, record["id"]).content == newer


def test_dated_source_goes_on_by_its_date(service: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, etag=None, last_modified="Sat, 01 Jan 2000 00:00:00 GMT", break_after=[100_000])
    record = fetch(service, sources.add("/dated", source))
    assert wait_for(service, record["id"], "complete")["digest"] == sha256(DATA)
    assert source.requests[1]["If-Range"] == "Sat, 01 Jan 2000 00:00:00 GMT"
    assert sum(source.sent) == len(DATA)


# -- quota and free space -----------------------------------------------------------------------------------------------------


def test_quota_refuses_with_507_before_the_body_is_stored(tmp_path: Path, sources: SourceServer) -> None:
    with start_image_service(tmp_path / "state", **FETCHING, quota_bytes=300_000) as service:
        first = upload(service, bytes(200_000))
        for body in (bytes(200_000), iter([bytes(60_000)] * 4)):
            response = call(service, "PUT", "/images", data=body, headers={"X-Image-Type": "kvm"})
            assert (response.status_code, response.json()["code"]) == (507, 507)
        record = fetch(service, sources.add("/over-quota", Source(bytes(200_000))))
        assert "quota" in wait_for(service, record["id"], "error")["error"]
        wait_until(lambda: len(stored_files(tmp_path / "state")) == 1, "what was refused to be gone")
        assert upload(service, b"y" * 90_000)["status"] == "complete"
        call(service, "DELETE", f"/images/{first['id']}")
        assert upload(service, b"z" * 200_000)["status"] == "complete"


def test_free_space_that_must_stay_free_refuses_with_507(tmp_path: Path) -> None:
    with start_image_service(tmp_path / "state", free_min_bytes=1 << 60) as service:
        response = call(service, "PUT", "/images", data=DATA, headers={"X-Image-Type": "kvm"})
        assert (response.status_code, response.json()["code"]) == (507, 507)
        assert "no space left on device" in response.json()["message"]
        assert stored_files(tmp_path / "state") == []
