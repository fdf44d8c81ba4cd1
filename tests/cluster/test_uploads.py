"""Uploads at two replicas: parts at either, equal contents at both, and what a dead replica leaves behind."""

from __future__ import annotations

import contextlib
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import call, download, sha256, upload, wait_for
from tests.cluster.world import PART_BYTES, Site, pause, resume, wait

pytestmark = pytest.mark.backend("etcd", "s3")

DATA = random.Random(6).randbytes(2 * PART_BYTES + 777)
TUS = {"Tus-Resumable": "1.0.0"}
PART_TYPE = {"Content-Type": "application/offset+octet-stream"}


def _begin(replica: Daemon, length: int) -> str:
    headers = TUS | {"Upload-Length": str(length), "Upload-Metadata": "type a3Zt"}
    response = call(replica, "POST", "/uploads", headers=headers)
    assert response.status_code == 201, response.text
    return response.headers["Location"]


def _part(replica: Daemon, path: str, offset: int, data: bytes) -> int:
    headers = TUS | PART_TYPE | {"Upload-Offset": str(offset)}
    return call(replica, "PATCH", path, headers=headers, data=data).status_code


def _offset(replica: Daemon, path: str) -> int:
    return int(call(replica, "HEAD", path, headers=TUS).headers["Upload-Offset"])


def _put_begun(replica: Daemon, data: bytes) -> socket.socket:
    """An upload that stays unfinished for as long as the connection is open."""
    connection = socket.create_connection(("127.0.0.1", replica.port), timeout=60)
    head = f"PUT /images HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Image-Type: kvm\r\nContent-Length: {len(data) + 1}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_parts_of_one_upload_may_come_to_any_replica(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    path = _begin(first, len(DATA))
    at = 0
    for number, end in enumerate((1000, PART_BYTES + 5, 2 * PART_BYTES, len(DATA))):
        replica = (first, second)[number % 2]
        assert _offset(replica, path) == at
        assert _part(replica, path, at, DATA[at:end]) == 204, replica.log()[-2000:]
        at = end
    image_id = path.rpartition("/")[2]
    for replica in (first, second):
        assert download(replica, image_id).content == DATA
        assert _offset(replica, path) == len(DATA)
    assert list(site.bucket().list("ingest/")) == []
    assert site.records().replica.held("tus-") == set()


def test_upload_in_parts_goes_on_at_another_replica_when_its_own_is_killed(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    path = _begin(first, len(DATA))
    assert _part(first, path, 0, DATA[: PART_BYTES + 99]) == 204
    first.kill()
    assert _offset(second, path) == PART_BYTES + 99
    assert _part(second, path, PART_BYTES + 99, DATA[PART_BYTES + 99 :]) == 204
    assert download(second, path.rpartition("/")[2]).content == DATA


def test_upload_in_parts_at_a_paused_replica_is_another_s_and_stays_so(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    path = _begin(first, len(DATA))
    assert _part(first, path, 0, DATA[:PART_BYTES]) == 204
    pause(first)
    assert _part(second, path, PART_BYTES, DATA[PART_BYTES : 2 * PART_BYTES]) == 204
    resume(first)
    assert _part(first, path, PART_BYTES, b"old") in {409, 423, 503}
    assert _offset(second, path) == 2 * PART_BYTES
    assert _part(second, path, 2 * PART_BYTES, DATA[2 * PART_BYTES :]) == 204
    for replica in (first, second):
        assert download(replica, path.rpartition("/")[2]).content == DATA


def test_equal_uploads_at_both_replicas_with_deletes_between_never_lose_a_byte(site: Site) -> None:
    replicas = [site.replica("first"), site.replica("second")]
    shared = random.Random(7).randbytes(70_000)

    def round_trip(number: int) -> None:
        own, other = replicas[number % 2], replicas[1 - number % 2]
        record = upload(own, shared)
        assert download(other, record["id"]).content == shared
        if number % 4:
            assert call(other, "DELETE", f"/images/{record['id']}").status_code == 200

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(round_trip, range(24)))
    left = call(replicas[0], "GET", "/images").json()
    assert len(left) == 6
    for record in left:
        assert download(replicas[1], record["id"]).content == shared
        call(replicas[1], "DELETE", f"/images/{record['id']}")
    wait(lambda: list(site.bucket().list("blobs/")) == [], "the last copy to go")


def test_what_a_killed_replica_was_taking_in_is_removed_and_what_others_take_in_stays(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    bucket = site.bucket()
    with _put_begun(first, DATA), _put_begun(second, DATA) as alive:
        wait(lambda: len({stored.key.split("/")[1] for stored in bucket.list("ingest/")}) == 2, "both to begin")
        first.kill()
        wait(lambda: len(site.records().replica.held("replica-")) == 1, "the dead one's session to end")
        third = site.replica("third")
        wait(lambda: len({stored.key.split("/")[1] for stored in bucket.list("ingest/")}) == 1, "one to be gone")
        alive.sendall(b"!")
        assert alive.recv(65536).startswith(b"HTTP/1.1 200 ")
    (record,) = call(third, "GET", "/images").json()
    assert record["digest"] == sha256(DATA + b"!")


def test_upload_that_was_paused_for_too_long_is_refused_and_leaves_nothing(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    bucket = site.bucket()
    with _put_begun(first, DATA) as paused:
        wait(lambda: list(bucket.list("ingest/")) != [], "it to begin")
        pause(first)
        wait(lambda: len(site.records().replica.held("replica-")) == 0, "its session to end")
        resume(first)
        paused.sendall(b"!")
        assert paused.recv(65536).startswith(b"HTTP/1.1 503 ")
    assert call(second, "GET", "/images").json() == []
    again = upload(first, DATA)
    assert wait_for(second, again["id"], "complete")["digest"] == sha256(DATA)


def test_delete_at_one_replica_during_a_download_at_another_ends_well(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    record = upload(first, DATA)
    with call(first, "GET", f"/images/{record['id']}/download", stream=True) as response:
        pieces = response.iter_content(64 << 10)
        got = next(pieces)
        assert call(second, "DELETE", f"/images/{record['id']}").status_code == 200
        with contextlib.suppress(
            requests.exceptions.ChunkedEncodingError
        ):  # the connection ends short of what was announced
            for piece in pieces:
                got += piece
    assert DATA.startswith(got), "what comes is right"
    assert call(first, "GET", f"/images/{record['id']}").status_code == 404
    wait(lambda: list(site.bucket().list("blobs/")) == [], "the bytes to go")
