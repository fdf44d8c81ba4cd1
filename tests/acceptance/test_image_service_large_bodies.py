"""Uploads so long that the service takes the connection into its own hands."""

from __future__ import annotations

import gzip
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from image_service.bodies import BUFFER_BYTES, DIRECT_MAX, DIRECT_MIN_BYTES
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import call, download, record_of, sha256, stored_files, upload
from tests.waiting import wait_until

SIZE_BYTES = DIRECT_MIN_BYTES + 3 * BUFFER_BYTES + 512
DATA = random.Random(9).randbytes(SIZE_BYTES)
KVM = {"X-Image-Type": "kvm"}
PART = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("large") / "state"


@pytest.fixture(scope="module")
def running(state_dir: Path) -> Iterator[Daemon]:
    with start_image_service(state_dir, upload_stall_timeout_s=1.0, image_size_max_bytes=32 << 20) as daemon:
        yield daemon


@pytest.fixture
def service(running: Daemon) -> Iterator[Daemon]:
    yield running
    for record in call(running, "GET", "/images").json():
        call(running, "DELETE", f"/images/{record['id']}")


def _send(service: Daemon, request: str, body: bytes, **headers: str) -> socket.socket:
    """The head of a request for all of DATA, and a body as long as we like."""
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    named = KVM | headers | {"Host": "127.0.0.1", "Content-Length": str(SIZE_BYTES)}
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    connection.sendall(f"{request} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


def test_long_upload_is_stored_whole_and_its_connection_ends(service: Daemon) -> None:
    with requests.Session() as session:
        for _ in range(3):
            response = session.put(f"{service.url}/images", data=DATA, headers=KVM, timeout=60)
            assert response.status_code == 200, response.text
            assert response.headers["Connection"] == "close"
            record = response.json()
            assert (record["digest"], record["content_digest"]) == (sha256(DATA), sha256(DATA))
            assert download(service, record["id"]).content == DATA


def test_body_in_slow_small_pieces_is_stored_whole(service: Daemon) -> None:
    with _send(service, "PUT /images", DATA[:10]) as connection:
        for at in range(10, SIZE_BYTES, 300_001):
            connection.sendall(DATA[at : at + 300_001])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert [record["digest"] for record in call(service, "GET", "/images").json()] == [sha256(DATA)]


def test_body_that_waits_for_continue_is_stored_whole(service: Daemon) -> None:
    with _send(service, "PUT /images", b"", Expect="100-continue") as connection:
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(DATA)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_more_long_uploads_at_once_than_are_taken_directly_are_all_stored(service: Daemon) -> None:
    bodies = [DATA[n:] + DATA[:n] for n in range(2 * DIRECT_MAX)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        records = list(pool.map(lambda body: upload(service, body), bodies))
    assert [record["digest"] for record in records] == [sha256(body) for body in bodies]


def test_long_volume_stream_has_the_content_of_its_disk(service: Daemon) -> None:
    """What the validator keeps of one piece must outlive the piece."""
    disk = upload(service, DATA[:-512])  # whole blocks: a stream's volume has no others
    stream = call(service, "GET", f"/images/{disk['id']}/download?format=zvol&compression=none").content
    packed = gzip.compress(stream, 1)
    assert min(len(stream), len(packed)) > DIRECT_MIN_BYTES
    for body in (stream, packed):
        record = upload(service, body)
        assert (record["format"], record["content_digest"]) == ("zvol", disk["content_digest"])


def test_long_upload_of_something_else_is_refused_and_its_connection_ends(service: Daemon, state_dir: Path) -> None:
    headers = KVM | {"X-Image-Digest": sha256(b"something else")}
    response = call(service, "PUT", "/images", data=DATA, headers=headers)
    assert (response.status_code, response.headers["Connection"]) == (422, "close")
    assert stored_files(state_dir) == []


def test_long_upload_that_is_refused_on_its_way_leaves_nothing(service: Daemon, state_dir: Path) -> None:
    damaged = b"QFI\xfb" + DATA[4:]
    with _send(service, "PUT /images", damaged) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 422 ")
    wait_until(lambda: stored_files(state_dir) == [], "the upload to be forgotten")


@pytest.mark.parametrize("sent_bytes", [0, 5, SIZE_BYTES - 1])
def test_long_upload_that_stalls_is_given_up(service: Daemon, state_dir: Path, sent_bytes: int) -> None:
    with _send(service, "PUT /images", DATA[:sent_bytes]) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: stored_files(state_dir) == [], "the upload to be forgotten")


def test_long_upload_whose_client_vanishes_leaves_nothing(service: Daemon, state_dir: Path) -> None:
    with _send(service, "PUT /images", DATA[:-1]):
        wait_until(lambda: stored_files(state_dir), "the upload to begin")
    wait_until(lambda: stored_files(state_dir) == [], "the upload to be forgotten")
    assert call(service, "GET", "/images").json() == []


@pytest.mark.parametrize("sent_bytes", [SIZE_BYTES - 1, 2 * BUFFER_BYTES + 77])
def test_long_part_that_breaks_off_keeps_every_byte_that_came(service: Daemon, sent_bytes: int) -> None:
    created = call(
        service,
        "POST",
        "/uploads",
        headers={"Tus-Resumable": "1.0.0", "Upload-Length": str(SIZE_BYTES), "Upload-Metadata": "type a3Zt"},
    )
    path = created.headers["Location"]

    def offset() -> int:
        return int(call(service, "HEAD", path, headers=PART).headers["Upload-Offset"])

    with _send(service, f"PATCH {path}", DATA[:sent_bytes], **PART):
        pass
    wait_until(lambda: offset() == sent_bytes, "what came in to be kept")
    rest = PART | {"Upload-Offset": str(sent_bytes)}
    assert call(service, "PATCH", path, data=DATA[sent_bytes:], headers=rest).status_code == 204
    assert record_of(service, path.rsplit("/", 1)[1])["digest"] == sha256(DATA)


def test_service_that_stops_ends_a_long_upload(tmp_path: Path) -> None:
    with start_image_service(tmp_path / "state") as service:
        with _send(service, "PUT /images", DATA[:-1]) as connection:
            wait_until(lambda: stored_files(tmp_path / "state"), "the upload to begin")
            assert service.stop() == 0
            while connection.recv(4096):
                continue
        service.start()
        assert call(service, "GET", "/images").json() == []
        assert stored_files(tmp_path / "state") == []
