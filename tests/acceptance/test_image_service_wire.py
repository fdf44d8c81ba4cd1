"""The image service's wire, row by row: a process, over real sockets."""

from __future__ import annotations

import gzip
import json
import re
import socket
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import (
    FETCHING,
    NINE_FIELDS,
    ZERO_TIME,
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
from tests.fakes.source_server import Source, SourceServer, start_source_server
from tests.waiting import wait_until

DATA = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wire") / "state"


@pytest.fixture(scope="module")
def service(state_dir: Path) -> Iterator[Daemon]:
    with start_image_service(state_dir, **FETCHING, image_size_max_bytes=4 << 20, upload_stall_timeout_s=1.0) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def sources() -> Iterator[SourceServer]:
    with start_source_server() as server:
        yield server


@pytest.fixture
def clean(service: Daemon) -> Daemon:
    for record in call(service, "GET", "/images").json():
        call(service, "DELETE", f"/images/{record['id']}")
    return service


# -- GET /images -------------------------------------------------------------------------------------------------------


def test_list_when_there_is_nothing_answers_an_empty_array(clean: Daemon) -> None:
    response = call(clean, "GET", "/images")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.text == "[]"


def test_list_with_a_type_shows_that_type_only(clean: Daemon) -> None:
    kvm = upload(clean, b"kvm")["id"]
    container = upload(clean, b"container", image_type="container")["id"]
    everything = [record["id"] for record in call(clean, "GET", "/images").json()]
    assert sorted(everything) == sorted([kvm, container])
    assert [r["id"] for r in call(clean, "GET", "/images?type=kvm").json()] == [kvm]
    assert [r["id"] for r in call(clean, "GET", "/images?type=container").json()] == [container]


@pytest.mark.parametrize("wrong", ["kvm1", "KVM", "x", "%00", "kvm,container"])
def test_list_with_an_unknown_type_is_refused(service: Daemon, wrong: str) -> None:
    response = call(service, "GET", f"/images?type={wrong}")
    assert response.status_code == 400
    assert response.json() == {"message": "invalid type"}


# -- POST /images ------------------------------------------------------------------------------------------------------


def test_post_answers_at_once_and_fetches_in_the_background(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, hold_after=1000)
    url = sources.add("/background", source)
    response = post(clean, url, comment="a comment")
    assert response.status_code == 202
    record = response.json()
    assert list(record)[:9] == NINE_FIELDS
    assert record["status"] == "pending"
    assert uuid.UUID(record["id"]).version == 4
    assert (record["source"], record["type"], record["comment"]) == (url, "kvm", "a comment")
    assert (record["size"], record["expected_size"]) == (0, -1)
    assert record["download_start"] == record["download_end"] == ZERO_TIME
    running = wait_for(clean, record["id"], "downloading")
    assert running["expected_size"] == len(DATA)
    assert running["download_end"] == ZERO_TIME
    wait_until(lambda: record_of(clean, record["id"])["size"] == 1000, "the size to grow while downloading")
    source.go.set()
    done = wait_for(clean, record["id"], "complete")
    assert (done["size"], done["expected_size"], done["digest"]) == (len(DATA), len(DATA), sha256(DATA))
    assert download(clean, record["id"]).content == DATA


def test_post_without_a_known_length_shows_minus_one(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, chunked=True, hold_after=10)
    record = fetch(clean, sources.add("/unknown-length", source))
    assert wait_for(clean, record["id"], "downloading")["expected_size"] == -1
    source.go.set()
    assert wait_for(clean, record["id"], "complete")["expected_size"] == len(DATA)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "invalid JSON"),
        (b"{", "invalid JSON"),
        (b"nonsense", "invalid JSON"),
        (b"\xff\xfe", "invalid JSON"),
        (b'"text"', "invalid argument"),
        (b"[]", "invalid argument"),
        (b'{"source": 5, "type": "kvm"}', "invalid argument"),
        (b'{"type": "kvm"}', "missing image source"),
        (b'{"source": "", "type": "kvm"}', "missing image source"),
        (b'{"source": "http://127.0.0.1/x"}', "invalid image type"),
        (b'{"source": "http://127.0.0.1/x", "type": "vmware"}', "invalid image type"),
        (b'{"source": "http://127.0.0.1/x", "type": "kvm", "digest": "md5"}', "not a digest"),
        (b'{"source": "ftp://127.0.0.1/x", "type": "kvm"}', "invalid image source"),
        (b'{"source": "file:///etc/passwd", "type": "kvm"}', "invalid image source"),
        (b'{"source": "just words", "type": "kvm"}', "invalid image source"),
        (b'{"source": "http:///x", "type": "kvm"}', "invalid image source"),
        (b'{"source": "http://[::1", "type": "kvm"}', "invalid image source"),
    ],
)
def test_post_of_a_bad_request_is_refused_with_a_message(clean: Daemon, body: bytes, message: str) -> None:
    response = call(clean, "POST", "/images", data=body)
    assert response.status_code == 400
    answer = response.json()
    assert list(answer) == ["message"]
    assert answer["message"].startswith(message)
    assert call(clean, "GET", "/images").json() == []


def test_post_of_a_source_that_is_there_answers_its_record_without_a_download(
    clean: Daemon, sources: SourceServer
) -> None:
    source = Source(DATA)
    url = sources.add("/twice", source)
    first = fetch(clean, url)
    done = wait_for(clean, first["id"], "complete")
    again = post(clean, url, comment="another comment")
    assert (again.status_code, again.json()) == (202, done)
    assert len(source.requests) == 1


def test_post_ignores_what_the_service_owns(clean: Daemon, sources: SourceServer) -> None:
    url = sources.add("/owned", Source(DATA))
    record = fetch(
        clean,
        url,
        id="mine",
        status="complete",
        size=7,
        expected_size=8,
        download_start="2020-01-01T00:00:00Z",
        download_end="2020-01-01T00:00:00Z",
        digest=sha256(DATA),
    )
    assert (record["status"], record["size"], record["expected_size"]) == ("pending", 0, -1)
    assert record["id"] != "mine"
    assert wait_for(clean, record["id"], "complete")["download_start"].startswith("20")
    assert call(clean, "GET", "/images/mine").status_code == 404


# -- PUT /images -------------------------------------------------------------------------------------------------------


def test_put_stores_and_answers_the_complete_record(clean: Daemon) -> None:
    record = upload(clean, DATA, **{"X-Image-Comment": "by hand"})
    assert list(record)[:9] == NINE_FIELDS
    assert (record["source"], record["type"], record["comment"]) == ("", "kvm", "by hand")
    assert (record["status"], record["size"], record["expected_size"]) == ("complete", len(DATA), len(DATA))
    for name in ("download_start", "download_end"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", record[name]), record[name]
        assert datetime.fromisoformat(record[name]).year >= 2024
    assert record["digest"] == sha256(DATA)
    assert record_of(clean, record["id"]) == record
    assert download(clean, record["id"]).content == DATA


@pytest.mark.parametrize("pieces", [[b""], [b"x"], [DATA[:7], DATA[7:], b"tail"]])
def test_put_takes_chunked_bodies(clean: Daemon, pieces: list[bytes]) -> None:
    record = upload(clean, iter([piece for piece in pieces if piece]), image_type="container")
    whole = b"".join(pieces)
    assert (record["size"], record["digest"], record["type"]) == (len(whole), sha256(whole), "container")
    assert download(clean, record["id"]).content == whole


@pytest.mark.parametrize("coding", ["gzip", "br", "nonsense"])
def test_put_with_a_content_encoding_is_stored_as_it_came(clean: Daemon, coding: str) -> None:
    """As ever: whoever packs an image uploads a packed image."""
    packed = gzip.compress(DATA)
    record = upload(clean, packed, **{"Content-Encoding": coding})
    assert (record["size"], record["digest"]) == (len(packed), sha256(packed))


@pytest.mark.parametrize("headers", [{}, {"X-Image-Type": ""}, {"X-Image-Type": "vmware"}])
def test_put_without_a_valid_type_is_refused(clean: Daemon, headers: dict[str, str]) -> None:
    response = call(clean, "PUT", "/images", data=b"x", headers=headers)
    assert response.status_code == 400
    assert response.json() == {"message": "invalid X-Image-Type header"}


def test_put_ignores_a_body_of_another_digest_and_leaves_nothing(clean: Daemon, state_dir: Path) -> None:
    headers = {"X-Image-Type": "kvm", "X-Image-Digest": sha256(b"something else")}
    response = call(clean, "PUT", "/images", data=DATA, headers=headers)
    assert response.status_code == 422, response.text
    assert call(clean, "GET", "/images").json() == []
    assert stored_files(state_dir) == []
    good = call(clean, "PUT", "/images", data=DATA, headers=headers | {"X-Image-Digest": sha256(DATA)})
    assert good.status_code == 200


@pytest.mark.parametrize("pieces", [1, 5])
def test_put_beyond_the_size_limit_is_413_and_leaves_nothing(clean: Daemon, state_dir: Path, pieces: int) -> None:
    large = bytes((4 << 20) + 1)
    body: Any = large if pieces == 1 else iter([large[: 1 << 20]] * 4 + [b"x"])  # several pieces are sent chunked
    try:
        response = call(clean, "PUT", "/images", data=body, headers={"X-Image-Type": "kvm"})
    except requests.ConnectionError:
        response = None  # the refusal came while we were still sending
    if response is not None:
        assert response.status_code == 413, response.text
        assert response.json()["code"] == 413
    assert call(clean, "GET", "/images").json() == []
    wait_until(lambda: stored_files(state_dir) == [], "the refused upload to be gone")


def _open_put(service: Daemon, *headers: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    lines = ["PUT /images HTTP/1.1", f"Host: 127.0.0.1:{service.port}", "X-Image-Type: kvm", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def test_put_that_expects_continue_is_admitted_first(clean: Daemon) -> None:
    with _open_put(clean, "Content-Length: 4", "Expect: 100-continue") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(b"body")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_put_that_expects_continue_and_is_too_large_is_never_asked_for(clean: Daemon) -> None:
    with _open_put(clean, f"Content-Length: {1 << 40}", "Expect: 100-continue") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_put_whose_client_vanishes_leaves_nothing(clean: Daemon, state_dir: Path) -> None:
    connection = _open_put(clean, "Content-Length: 3000000")
    connection.sendall(bytes(2 << 20))
    wait_until(lambda: stored_files(state_dir), "the upload to begin")
    connection.close()
    wait_until(lambda: stored_files(state_dir) == [], "the upload to be forgotten")
    assert call(clean, "GET", "/images").json() == []


def test_put_that_stalls_is_given_up(clean: Daemon, state_dir: Path) -> None:
    with _open_put(clean, "Content-Length: 100") as connection:
        connection.sendall(b"x")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: stored_files(state_dir) == [], "the upload to be forgotten")


# -- GET and DELETE /images/{id} ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image_id", ["unknown", "00000000-0000-4000-8000-000000000001", "%2e%2e", "..%2f..%2fetc", "a%00b", "x" * 300]
)
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("GET", "/download")])
def test_unknown_image_is_404_with_the_three_keys(service: Daemon, method: str, suffix: str, image_id: str) -> None:
    response = call(service, method, f"/images/{image_id}{suffix}")
    assert response.status_code == 404
    assert response.json() == {"message": "not found", "code": 404, "stack": []}


def test_delete_answers_the_record_as_it_was_and_takes_the_bytes(clean: Daemon, state_dir: Path) -> None:
    record = upload(clean, DATA)
    response = call(clean, "DELETE", f"/images/{record['id']}")
    assert (response.status_code, response.json()) == (200, record)
    assert call(clean, "GET", f"/images/{record['id']}").status_code == 404
    assert call(clean, "DELETE", f"/images/{record['id']}").status_code == 404
    assert stored_files(state_dir) == []


def test_delete_of_one_of_two_equal_images_keeps_the_other(clean: Daemon, state_dir: Path) -> None:
    first, second = upload(clean, DATA), upload(clean, DATA)
    assert len(stored_files(state_dir)) == 1
    call(clean, "DELETE", f"/images/{first['id']}")
    assert download(clean, second["id"]).content == DATA
    call(clean, "DELETE", f"/images/{second['id']}")
    assert stored_files(state_dir) == []


# -- GET /images/{id}/download -----------------------------------------------------------------------------------------


def test_download_is_an_octet_stream_with_its_length(clean: Daemon) -> None:
    response = download(clean, upload(clean, DATA)["id"])
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Length"] == str(len(DATA))
    assert response.headers["X-Image-Digest"] == sha256(DATA)
    assert response.content == DATA


def test_download_of_an_incomplete_image_is_404(clean: Daemon, sources: SourceServer) -> None:
    source = Source(DATA, hold_after=5)
    record = fetch(clean, sources.add("/incomplete", source))
    response = download(clean, record["id"])
    assert (response.status_code, response.json()["message"]) == (404, "incomplete image")
    source.go.set()
    wait_for(clean, record["id"], "complete")


@pytest.mark.parametrize(
    ("asked", "status", "expected", "content_range"),
    [
        ("bytes=0-9", 206, DATA[:10], f"bytes 0-9/{len(DATA)}"),
        ("bytes=100-", 206, DATA[100:], f"bytes 100-{len(DATA) - 1}/{len(DATA)}"),
        ("bytes=-7", 206, DATA[-7:], f"bytes {len(DATA) - 7}-{len(DATA) - 1}/{len(DATA)}"),
        (f"bytes=10-{len(DATA) * 2}", 206, DATA[10:], f"bytes 10-{len(DATA) - 1}/{len(DATA)}"),
        (f"bytes={len(DATA)}-", 416, None, f"bytes */{len(DATA)}"),
        ("bytes=-0", 416, None, f"bytes */{len(DATA)}"),
        ("bytes=9-1", 200, DATA, None),
        ("bytes=0-1,5-6", 200, DATA, None),
        ("lines=1-2", 200, DATA, None),
        ("bytes=-", 200, DATA, None),
    ],
)
def test_download_of_a_range(
    service: Daemon, asked: str, status: int, expected: bytes | None, content_range: str | None
) -> None:
    response = download(service, upload(service, DATA)["id"], Range=asked)
    assert response.status_code == status
    assert response.headers.get("Content-Range") == content_range
    assert response.headers["Accept-Ranges"] == "bytes"
    if expected is not None:
        assert response.content == expected
        assert response.headers["Content-Length"] == str(len(expected))


def test_download_conditions_follow_the_entity_tag(service: Daemon) -> None:
    image_id = upload(service, DATA)["id"]
    tag = download(service, image_id).headers["ETag"]
    assert tag == f'"{sha256(DATA)}"'
    unchanged = download(service, image_id, **{"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content, unchanged.headers["ETag"]) == (304, b"", tag)
    assert download(service, image_id, **{"If-None-Match": f'"a", W/{tag}'}).status_code == 304
    assert download(service, image_id, **{"If-None-Match": '"other"'}).status_code == 200
    assert download(service, image_id, **{"If-Match": '"other"'}).status_code == 412
    same = download(service, image_id, **{"Range": "bytes=5-", "If-Range": tag})
    assert (same.status_code, same.content) == (206, DATA[5:])
    other = download(service, image_id, **{"Range": "bytes=5-", "If-Range": '"other"'})
    assert (other.status_code, other.content) == (200, DATA)


def test_download_head_answers_headers_only(service: Daemon) -> None:
    image_id = upload(service, DATA)["id"]
    response = call(service, "HEAD", f"/images/{image_id}/download")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Length"] == str(len(DATA))
    assert response.headers["ETag"] == f'"{sha256(DATA)}"'


def test_download_of_an_empty_image_works(clean: Daemon) -> None:
    record = upload(clean, b"")
    response = download(clean, record["id"])
    assert (response.status_code, response.content, response.headers["Content-Length"]) == (200, b"", "0")


# -- everything else ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/images", "/images/some-id", "/images/some-id/download"])
def test_trailing_slash_is_moved_to_the_path_without_it(service: Daemon, method: str, path: str) -> None:
    response = call(service, method, path + "/")
    assert (response.status_code, response.headers["Location"]) == (301, path)
    query = call(service, method, path + "/?type=kvm")
    assert (query.status_code, query.headers["Location"]) == (301, path + "?type=kvm")


def test_unknown_path_and_method_are_json_errors(service: Daemon) -> None:
    unknown = call(service, "GET", "/nothing")
    assert (unknown.status_code, unknown.json()["code"], unknown.json()["stack"]) == (404, 404, [])
    refused = call(service, "PATCH", "/images")
    assert (refused.status_code, refused.json()["code"]) == (405, 405)
    assert "GET" in refused.headers["Allow"]


def test_record_on_the_wire_is_what_old_clients_read(service: Daemon) -> None:
    raw = call(service, "GET", f"/images/{upload(service, DATA)['id']}").text
    record = json.loads(raw)
    assert [name for name in NINE_FIELDS if name not in record] == []
    assert isinstance(record["size"], int)
    assert isinstance(record["expected_size"], int)
    assert "Z" in record["download_start"]


def test_health_metrics_and_readiness_are_there(service: Daemon) -> None:
    assert call(service, "GET", "/healthz").status_code == 200
    assert call(service, "GET", "/readyz").status_code == 200
    assert "mistify_image_fetches" in call(service, "GET", "/metrics").text
