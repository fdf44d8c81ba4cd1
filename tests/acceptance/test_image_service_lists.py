"""Looking for images, waiting for them, and looking after them: lists, labels, events, blobs by name, scrubbing, collecting."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.acceptance.daemons import CALL_TIMEOUT_S, Daemon
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
from tests.codec import samples
from tests.fakes.source_server import Source, SourceServer
from tests.waiting import wait_until

DATA = bytes(range(256)) * 400
SERVICE_FLAGS = FETCHING


@pytest.fixture
def clean(service: Daemon) -> Daemon:
    for record in call(service, "GET", "/images").json():
        call(service, "DELETE", f"/images/{record['id']}")
    return service


def ids(service: Daemon, query: str = "") -> list[str]:
    response = call(service, "GET", f"/images{query}")
    assert response.status_code == 200, response.text
    return [record["id"] for record in response.json()]


# -- what is said about an image, and found out --------------------------------------------------------------------------


def test_upload_says_name_version_labels_and_is_told_format(clean: Daemon) -> None:
    headers = {"X-Image-Name": "debian", "X-Image-Version": "13.1", "X-Image-Origin": "by hand"}
    record = upload(clean, samples.load("plain-c-s1"), **headers, **{"X-Image-Label": "os=linux"})
    assert (record["name"], record["version"], record["origin"]) == ("debian", "13.1", "by hand")
    assert record["labels"] == {"os": "linux"}
    assert (record["format"], record["compression"]) == ("zvol", "none")
    assert record["virtual_size"] == len(samples.raw_image())
    assert record["content_digest"] == sha256(samples.raw_image())
    assert record_of(clean, record["id"]) == record


def test_repeated_label_headers_are_all_taken(clean: Daemon) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", clean.port, timeout=CALL_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.putrequest("PUT", "/images")
        for name, value in (("X-Image-Type", "kvm"), ("X-Image-Label", "a=1"), ("X-Image-Label", "b = x=y")):
            connection.putheader(name, value)
        connection.putheader("Content-Length", "1")
        connection.endheaders(b"x")
        record = json.loads(connection.getresponse().read())
    assert record["labels"] == {"a": "1", "b": "x=y"}


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Image-Label": "no value"},
        {"X-Image-Label": "=x"},
        {"X-Image-Label": "-dash=x"},
        {"X-Image-Name": "x" * 256},
        {"X-Image-Size": "many"},
        {"X-Image-Format": "vmdk"},
        {"X-Image-Digest": "sha512:" + "0" * 128},
    ],
)
def test_upload_that_says_nonsense_is_refused(clean: Daemon, headers: dict[str, str]) -> None:
    response = call(clean, "PUT", "/images", data=DATA, headers={"X-Image-Type": "kvm"} | headers)
    assert response.status_code == 400, response.text
    assert ids(clean) == []


@pytest.mark.parametrize("headers", [{"X-Image-Size": "7"}, {"X-Image-Format": "qcow2"}])
def test_upload_that_is_not_what_was_said_is_refused(clean: Daemon, state_dir: Path, headers: dict[str, str]) -> None:
    response = call(clean, "PUT", "/images", data=DATA, headers={"X-Image-Type": "kvm"} | headers)
    assert response.status_code == 422, response.text
    assert (ids(clean), stored_files(state_dir)) == ([], [])


@pytest.mark.parametrize("name", ["plain-inc-s1-s2", "bad-nosize", "flip-data-first", "enc-w-raw", "fs-Lec"])
def test_harmful_image_never_becomes_complete(clean: Daemon, sources: SourceServer, state_dir: Path, name: str) -> None:
    for data in (samples.load(name), gzip.compress(samples.load(name))):
        response = call(clean, "PUT", "/images", data=data, headers={"X-Image-Type": "kvm"})
        assert response.status_code == 422, response.text
        record = fetch(clean, sources.add(f"/harmful/{name}/{len(data)}", Source(data)))
        assert wait_for(clean, record["id"], "error")["error"] in response.json()["message"]
    assert stored_files(state_dir) == []


def test_fetch_takes_what_is_said_and_keeps_it_over_a_failure(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, status=404)
    url = sources.add("/said", source)
    more: dict[str, Any] = {
        "name": "n",
        "version": "v",
        "origin": "o",
        "labels": {"k": "v"},
        "format": "raw",
        "length": len(DATA),
    }
    record = fetch(clean, url, **more)
    wait_for(clean, record["id"], "error")
    source.status = 200
    post(clean, url)
    done = wait_for(clean, record["id"], "complete")
    assert [done[key] for key in ("name", "version", "origin", "labels", "format")] == [
        "n",
        "v",
        "o",
        {"k": "v"},
        "raw",
    ]


@pytest.mark.parametrize("more", [{"format": "zvol"}, {"length": 5}])
def test_fetch_that_is_not_what_was_said_fails(clean: Daemon, sources: SourceServer, more: dict[str, Any]) -> None:
    record = fetch(clean, sources.add(f"/other/{'-'.join(more)}", Source(DATA)), **more)
    assert "not" in wait_for(clean, record["id"], "error")["error"]


def test_same_disk_in_other_encodings_is_known_as_the_same(clean: Daemon) -> None:
    disk = samples.raw_image()
    encodings = [disk, gzip.compress(disk), samples.load("lz4-c"), gzip.compress(samples.load("big1M-L"))]
    found = {upload(clean, data)["id"] for data in encodings}
    other = upload(clean, DATA)["id"]
    for record in call(clean, "GET", "/images").json():
        expected = found - {record["id"]} if record["id"] != other else set()
        assert set(record.get("same_as", [])) == expected
        assert record_of(clean, record["id"]) == record


# -- lists -----------------------------------------------------------------------------------------------------------------


def test_list_is_filtered_by_everything_that_is_said(clean: Daemon, sources: SourceServer) -> None:
    first = upload(clean, b"1", **{"X-Image-Name": "a", "X-Image-Label": "os=linux"})["id"]
    second = upload(clean, b"2", image_type="container", **{"X-Image-Name": "a", "X-Image-Label": "os=bsd"})["id"]
    failed = fetch(clean, sources.url + "/nothing-there", name="b")["id"]
    wait_for(clean, failed, "error")
    assert set(ids(clean, "?name=a")) == {first, second}
    assert ids(clean, "?name=a&type=kvm") == [first]
    assert ids(clean, "?label=os=bsd") == [second]
    assert set(ids(clean, "?label=os")) == {first, second}
    assert ids(clean, "?label=os&label=os=linux") == [first]
    assert ids(clean, "?status=error") == [failed]
    assert ids(clean, "?status=error&name=a") == []
    refused = call(clean, "GET", "/images?status=odd")
    assert (refused.status_code, refused.json()) == (400, {"message": "invalid status"})


def test_list_in_pages_shows_every_image_once(clean: Daemon) -> None:
    everything = sorted(upload(clean, b"%d" % n, **{"X-Image-Name": "n"})["id"] for n in range(7))
    seen, path, pages = [], "/images?limit=3&name=n", 0
    while path:
        response = call(clean, "GET", path)
        seen += [record["id"] for record in response.json()]
        path = response.links.get("next", {}).get("url", "")
        pages += 1
    assert (seen, pages) == (everything, 3)
    assert ids(clean) == everything
    assert ids(clean, f"?after={everything[4]}") == everything[5:]
    assert "Link" not in call(clean, "GET", "/images?limit=7").headers
    for limit in ("0", "-1", "x", "1001"):
        assert call(clean, "GET", f"/images?limit={limit}").status_code == 400


# -- waiting ---------------------------------------------------------------------------------------------------------------


def test_prefer_wait_answers_when_the_image_is_there(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, hold_after=10)
    record = fetch(clean, sources.add("/waited-for", source))
    early = call(clean, "GET", f"/images/{record['id']}", headers={"Prefer": "wait=1"})
    assert early.json()["status"] in {"pending", "downloading"}
    assert early.headers["Preference-Applied"] == "wait=1"
    assert source.holding.wait(60)
    source.go.set()
    late = call(clean, "GET", f"/images/{record['id']}", headers={"Prefer": "respond-async, wait=100"})
    assert late.json()["status"] == "complete"
    assert call(clean, "GET", "/images/unknown", headers={"Prefer": "wait=100"}).status_code == 404


def test_events_tell_of_progress_until_the_end(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, hold_after=10)
    record = fetch(clean, sources.add("/events", source))
    assert source.holding.wait(60)
    seen: list[tuple[str, dict[str, Any]]] = []
    url = f"{clean.url}/images/{record['id']}/events"
    with requests.get(url, stream=True, timeout=CALL_TIMEOUT_S) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.iter_lines(chunk_size=1)
        for name in lines:
            if name:
                data = next(lines)
                seen.append((name.decode().removeprefix("event: "), json.loads(data.decode().removeprefix("data: "))))
                source.go.set()
    assert seen[0][0] in {"pending", "downloading"}
    assert seen[-1][0] == seen[-1][1]["status"] == "complete"
    assert call(clean, "GET", "/images/unknown/events").status_code == 404


def test_events_of_a_deleted_image_say_so(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, hold_after=10)
    record = fetch(clean, sources.add("/events-deleted", source))
    with requests.get(f"{clean.url}/images/{record['id']}/events", stream=True, timeout=CALL_TIMEOUT_S) as response:
        lines = response.iter_lines(chunk_size=1)
        next(lines)
        call(clean, "DELETE", f"/images/{record['id']}")
        assert b"event: deleted" in list(lines)


# -- blobs by their name ---------------------------------------------------------------------------------------------------


def test_blob_is_served_by_digest_for_ever(clean: Daemon) -> None:
    record = upload(clean, DATA)
    path = f"/blobs/{record['digest']}"
    response = call(clean, "GET", path)
    assert (response.status_code, response.content) == (200, DATA)
    assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert response.headers["ETag"] == f'"{record["digest"]}"'
    part = call(clean, "GET", path, headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, DATA[5:10])
    unchanged = call(clean, "GET", path, headers={"If-None-Match": response.headers["ETag"]})
    assert (unchanged.status_code, unchanged.headers["Cache-Control"]) == (304, response.headers["Cache-Control"])
    assert call(clean, "HEAD", path).headers["Content-Length"] == str(len(DATA))
    call(clean, "DELETE", f"/images/{record['id']}")
    assert call(clean, "GET", path).status_code == 404


@pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "sha512:" + "0" * 128, "nonsense", "sha256:..%2f..", "%00"])
def test_blob_nobody_names_is_not_found(service: Daemon, digest: str) -> None:
    assert call(service, "GET", f"/blobs/{digest}").status_code == 404


# -- upkeep ----------------------------------------------------------------------------------------------------------------


def _scrub(service: Daemon) -> dict[str, Any]:
    assert call(service, "POST", "/upkeep/scrub").status_code == 202
    wait_until(lambda: not call(service, "GET", "/upkeep/scrub").json()["running"], "the scrub to end")
    report: dict[str, Any] = call(service, "GET", "/upkeep/scrub").json()
    return report


def test_scrub_finds_damage_and_the_image_is_not_offered_any_more(
    clean: Daemon, sources: SourceServer, state_dir: Path
) -> None:
    sound = upload(clean, b"sound")
    url = sources.add("/damaged", Source(DATA))
    damaged = wait_for(clean, fetch(clean, url, name="kept")["id"], "complete")
    gone = upload(clean, b"gone")
    assert _scrub(clean)["damaged"] == []
    files = {Path(name).name: state_dir / "images" / name for name in stored_files(state_dir)}
    broken = files[damaged["digest"].removeprefix("sha256:")]
    broken.chmod(0o644)
    broken.write_bytes(DATA[:-1] + b"!")
    files[gone["digest"].removeprefix("sha256:")].unlink()
    report = _scrub(clean)
    assert set(report["images"]) == {damaged["id"], gone["id"]}
    assert set(report["damaged"]) == {damaged["digest"], gone["digest"]}
    assert record_of(clean, sound["id"]) == sound
    assert record_of(clean, gone["id"])["status"] == "error"
    assert "damaged" in record_of(clean, damaged["id"])["error"]
    assert download(clean, damaged["id"]).status_code == 404
    post(clean, url)
    again = wait_for(clean, damaged["id"], "complete")
    assert (again["digest"], again["name"]) == (damaged["digest"], "kept")
    assert download(clean, damaged["id"]).content == DATA


def test_collect_tells_before_it_removes(clean: Daemon) -> None:
    upload(clean, DATA)
    report = call(clean, "POST", "/upkeep/collect?dry_run=true").json()
    assert (report["dry_run"], report["blobs"], report["kept"]) == (True, [], 1)
    assert call(clean, "POST", "/upkeep/collect?dry_run=odd").status_code == 400
    assert call(clean, "POST", "/upkeep/collect?limit=10").json()["complete"] is True
