"""Uploads in parts (tus 1.0): a process, over real sockets, stopped and killed in between."""

from __future__ import annotations

import base64
import gzip
import hashlib
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import call, download, record_of, sha256, stored_files, upload
from tests.codec import samples
from tests.waiting import wait_until

DATA = random.Random(4).randbytes(3_000_000)
SERVICE_FLAGS = {"image_size_max_bytes": 8 << 20, "upload_stall_timeout_s": 30.0}
BODY = "application/offset+octet-stream"


def tus(service: Daemon, method: str, path: str, data: bytes | None = None, **headers: str) -> requests.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return call(service, method, path, data=data, headers={"Tus-Resumable": "1.0.0"} | names)


def said(**values: str) -> str:
    """An Upload-Metadata header."""
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())


def begin(service: Daemon, length: int, **values: str) -> str:
    """A new upload; its path."""
    metadata = said(**({"type": "kvm"} | values))
    response = tus(service, "POST", "/uploads", Upload_Length=str(length), Upload_Metadata=metadata)
    assert response.status_code == 201, response.text
    assert response.headers["Upload-Expires"].endswith("GMT")
    return response.headers["Location"]


def part(service: Daemon, path: str, offset: int, data: bytes, **headers: str) -> requests.Response:
    return tus(service, "PATCH", path, data, Upload_Offset=str(offset), Content_Type=BODY, **headers)


def offset_of(service: Daemon, path: str) -> int:
    response = tus(service, "HEAD", path)
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    return int(response.headers["Upload-Offset"])


def test_options_tell_what_the_server_can(service: Daemon) -> None:
    for path in ("/uploads", "/uploads/some-id"):
        response = call(service, "OPTIONS", path)
        assert response.status_code == 204
        assert response.headers["Tus-Version"] == "1.0.0"
        extensions = "creation,creation-with-upload,checksum,termination,expiration"
        assert response.headers["Tus-Extension"] == extensions
        assert response.headers["Tus-Checksum-Algorithm"] == "sha256,sha1"
        assert response.headers["Tus-Max-Size"] == str(8 << 20)


def test_upload_in_parts_becomes_an_image_with_the_same_id(service: Daemon) -> None:
    values = {"name": "debian", "version": "13", "comment": "ä", "origin": "by hand", "label.os": "linux"}
    path = begin(service, len(DATA), digest=sha256(DATA), format="raw", **values)
    image_id = path.rsplit("/", 1)[1]
    assert image_id not in {record["id"] for record in call(service, "GET", "/images").json()}
    at = 0
    for end in (0, 1, 1_000_000, 1_000_001, len(DATA)):
        response = part(service, path, at, DATA[at:end])
        assert (response.status_code, response.headers["Upload-Offset"]) == (204, str(end))
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert offset_of(service, path) == end
        at = end
    record = record_of(service, image_id)
    assert (record["status"], record["digest"], record["size"]) == ("complete", sha256(DATA), len(DATA))
    assert (record["name"], record["version"], record["comment"], record["origin"]) == ("debian", "13", "ä", "by hand")
    assert (record["labels"], record["format"]) == ({"os": "linux"}, "raw")
    assert download(service, image_id).content == DATA


def test_upload_with_its_creation_is_complete_at_once(service: Daemon) -> None:
    headers = {"Upload_Length": str(len(DATA)), "Upload_Metadata": said(type="kvm"), "Content_Type": BODY}
    response = tus(service, "POST", "/uploads", DATA, **headers)
    assert (response.status_code, response.headers["Upload-Offset"]) == (201, str(len(DATA)))
    assert record_of(service, response.headers["X-Image-Id"])["digest"] == sha256(DATA)
    empty = tus(service, "POST", "/uploads", Upload_Length="0", Upload_Metadata=said(type="container"))
    assert record_of(service, empty.headers["X-Image-Id"])["status"] == "complete"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upload_Metadata": said(type="kvm")}, 400),
        ({"Upload_Length": "-1", "Upload_Metadata": said(type="kvm")}, 400),
        ({"Upload_Length": "1"}, 400),
        ({"Upload_Length": "1", "Upload_Metadata": said(type="vmware")}, 400),
        ({"Upload_Length": "1", "Upload_Metadata": "type kvm!"}, 400),
        ({"Upload_Length": "1", "Upload_Metadata": said(type="kvm", digest="md5:1")}, 400),
        ({"Upload_Length": "1", "Upload_Metadata": said(type="kvm", format="vmdk")}, 400),
        ({"Upload_Length": str((8 << 20) + 1), "Upload_Metadata": said(type="kvm")}, 413),
        ({"Upload_Length": "1", "Upload_Metadata": said(type="kvm"), "Tus_Resumable": "0.2.2"}, 412),
    ],
)
def test_creation_that_makes_no_sense_is_refused(service: Daemon, headers: dict[str, str], status: int) -> None:
    response = tus(service, "POST", "/uploads", None, **headers)
    assert response.status_code == status, response.text
    assert response.headers["Tus-Resumable"] == "1.0.0"


def test_parts_that_do_not_fit_are_refused_and_change_nothing(service: Daemon) -> None:
    path = begin(service, 100)
    assert part(service, path, 0, b"x" * 40).status_code == 204
    assert part(service, path, 0, b"x" * 40).status_code == 409
    assert part(service, path, 41, b"x").status_code == 409
    assert tus(service, "PATCH", path, b"x", Upload_Offset="40").status_code == 415
    assert tus(service, "PATCH", path, b"x", Content_Type=BODY).status_code == 400
    assert part(service, path, 40, b"x" * 61).status_code == 400
    assert offset_of(service, path) == 40
    overridden = tus(
        service, "POST", path, b"x" * 10, Upload_Offset="40", Content_Type=BODY, X_HTTP_Method_Override="PATCH"
    )
    assert (overridden.status_code, offset_of(service, path)) == (204, 50)
    assert tus(service, "DELETE", path).status_code == 204
    assert tus(service, "HEAD", path).status_code == 404
    assert part(service, path, 50, b"x").status_code == 404


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
def test_part_with_a_wrong_checksum_is_not_taken(service: Daemon, algorithm: str) -> None:
    path = begin(service, len(DATA))
    right, wrong = (base64.b64encode(hashlib.new(algorithm, x).digest()).decode() for x in (DATA, b"other"))
    refused = part(service, path, 0, DATA, Upload_Checksum=f"{algorithm} {wrong}")
    assert (refused.status_code, offset_of(service, path)) == (460, 0)
    assert part(service, path, 0, DATA, Upload_Checksum="md5 AAAA").status_code == 400
    assert part(service, path, 0, DATA, Upload_Checksum=f"{algorithm} {right}").status_code == 204
    assert record_of(service, path.rsplit("/", 1)[1])["digest"] == sha256(DATA)


def test_upload_that_is_no_image_is_refused_and_gone(service: Daemon, state_dir: Path) -> None:
    before = stored_files(state_dir)
    increment = samples.load("plain-inc-s1-s2")
    path = begin(service, len(increment))
    assert part(service, path, 0, increment[:1000]).status_code == 204
    response = part(service, path, 1000, increment[1000:])
    assert (response.status_code, "increment" in response.json()["message"]) == (422, True)
    assert tus(service, "HEAD", path).status_code == 404
    other = begin(service, len(DATA), digest=sha256(b"something else"))
    assert part(service, other, 0, DATA).status_code == 422
    assert stored_files(state_dir) == before


def _ingested(state_dir: Path) -> int:
    return max((path.stat().st_size for path in state_dir.glob("images/ingest/*/data")), default=0)


def test_part_that_breaks_off_keeps_what_came(service: Daemon, state_dir: Path) -> None:
    path = begin(service, len(DATA))
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        head = [f"PATCH {path} HTTP/1.1", "Host: 127.0.0.1", "Tus-Resumable: 1.0.0", f"Content-Type: {BODY}"]
        lines = [*head, "Upload-Offset: 0", f"Content-Length: {len(DATA)}", "", ""]
        connection.sendall("\r\n".join(lines).encode() + DATA[:2_000_000])
        wait_until(lambda: _ingested(state_dir) >= 1 << 20, "the part to be under way")
        second = part(service, path, 0, b"x")
        assert (second.status_code, "another part" in second.json()["message"]) == (423, True)
    wait_until(lambda: offset_of(service, path) == 2_000_000, "what came in to be kept")
    assert part(service, path, 2_000_000, DATA[2_000_000:]).status_code == 204
    assert download(service, path.rsplit("/", 1)[1]).content == DATA


def test_upload_goes_on_after_stop_and_kill_and_is_counted(tmp_path: Path) -> None:
    data = gzip.compress(samples.load("plain-full-s1"), 1)
    third = len(data) // 3
    with start_image_service(tmp_path / "state", quota_bytes=len(data) + 1000) as service:
        path = begin(service, len(data), digest=sha256(data))
        assert part(service, path, 0, data[:third]).status_code == 204
        assert service.stop() == 0
        service.start()
        assert offset_of(service, path) == third
        refused = call(service, "PUT", "/images", data=bytes(2000), headers={"X-Image-Type": "kvm"})
        assert refused.status_code == 507
        assert part(service, path, third, data[third : 2 * third]).status_code == 204
        service.kill()
        service.start()
        assert offset_of(service, path) == 2 * third
        assert part(service, path, 2 * third, data[2 * third :]).status_code == 204
        record = record_of(service, path.rsplit("/", 1)[1])
        assert (record["format"], record["compression"], record["digest"]) == ("zvol", "gzip", sha256(data))
        assert record["content_digest"] == sha256(samples.raw_image())
        service.kill()
        service.start()
        assert offset_of(service, path) == len(data)
        assert len(stored_files(tmp_path / "state")) == 1


def test_upload_without_parts_expires(tmp_path: Path) -> None:
    with start_image_service(tmp_path / "state", upload_expiry_s=0.2, collect_interval_s=0.1) as service:
        path = begin(service, 100)
        part(service, path, 0, b"x" * 40)
        wait_until(lambda: tus(service, "HEAD", path).status_code == 404, "the upload to expire")
        assert stored_files(tmp_path / "state") == []


def test_many_clients_each_get_their_own_image(service: Daemon) -> None:
    barrier = threading.Barrier(8)

    def client(number: int) -> bool:
        data = random.Random(number).randbytes(500_000)
        path = begin(service, len(data))
        barrier.wait(60)
        for at in range(0, len(data), 70_000):
            assert part(service, path, at, data[at : at + 70_000]).status_code == 204
        return download(service, path.rsplit("/", 1)[1]).content == data

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [True] * 8


def test_quota_counts_what_was_announced(tmp_path: Path) -> None:
    with start_image_service(tmp_path / "state", quota_bytes=300_000) as service:
        path = begin(service, 200_000)
        response = tus(service, "POST", "/uploads", Upload_Length="200000", Upload_Metadata=said(type="kvm"))
        assert response.status_code == 507
        tus(service, "DELETE", path)
        begin(service, 200_000)
        assert upload(service, bytes(90_000))["status"] == "complete"
