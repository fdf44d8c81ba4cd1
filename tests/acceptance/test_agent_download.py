"""agent-wire section 5: ``/snapshots/download``."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest
import requests

from imaging.sendstream.receiving import VolumeReceiver
from imaging.sendstream.records import HEADER_BYTES, Begin, Feature, parse
from imaging.sendstream.resume import ResumeToken
from imaging.sendstream.volume import apply_stream
from tests.acceptance.daemons import Agent, write_disk
from tests.fakes.agent_world import MIB, disk
from tests.fakes.image_server import FakeImageServer
from tests.waiting import wait_until

SIZE = 24 * MIB


@pytest.fixture(scope="module")
def body() -> bytes:
    """What the snapshot holds: more than any buffer on the way."""
    return os.urandom(SIZE // 2) + disk(1, SIZE // 2)


@pytest.fixture(scope="module", autouse=True)
def volume(agent: Agent, body: bytes) -> Path:
    """A volume with a snapshot ``f@s1``, and a changed one beside it."""
    device = Path(agent.call("CreateVolume", id="f", size=SIZE // MIB)["volumes"][0]["device"])
    write_disk(device, body)
    agent.call("CreateSnapshot", id="f", dest="s1")
    return device


def download(agent: Agent, **parameters: str) -> requests.Response:
    return requests.get(f"{agent.url}/snapshots/download", params=parameters, timeout=120)


def content(stream: bytes) -> bytes:
    """The volume a stream makes."""
    with tempfile.TemporaryFile() as file:
        apply_stream(io.BytesIO(stream), file.fileno(), None)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_download_by_any_method_is_the_stream(agent: Agent, body: bytes, method: str) -> None:
    response = requests.request(method, f"{agent.url}/snapshots/download", data=b'{"id": "f@s1"}', timeout=120)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert content(response.content) == body


def test_download_by_query_is_the_same(agent: Agent) -> None:
    by_query = requests.get(f"{agent.url}/snapshots/download", params={"id": "f@s1"}, timeout=120)
    assert by_query.status_code == 200
    digest = hashlib.sha256(by_query.content).hexdigest()
    assert hashlib.sha256(agent.download("f@s1").content).hexdigest() == digest


@pytest.fixture(scope="module")
def changed(agent: Agent, body: bytes) -> bytes:
    """What a second snapshot ``g@s2`` holds, of a volume of its own with a first one ``g@s1``."""
    device = Path(agent.call("CreateVolume", id="g", size=SIZE // MIB)["volumes"][0]["device"])
    write_disk(device, body)
    agent.call("CreateSnapshot", id="g", dest="s1")
    write_disk(device, b"changed!" * 4096)
    agent.call("CreateSnapshot", id="g", dest="s2")
    return b"changed!" * 4096 + body[8 * 4096 :]


@pytest.mark.parametrize("base", ["@s1", "g@s1"])
def test_download_from_a_base_holds_what_changed(agent: Agent, changed: bytes, base: str) -> None:
    increment = download(agent, id="g@s2", **{"from": base})
    assert (increment.status_code, len(increment.content) < SIZE // 8) == (200, True)
    by_body = requests.post(f"{agent.url}/snapshots/download", json={"id": "g@s2", "from": base}, timeout=120)
    assert by_body.content == increment.content
    with tempfile.TemporaryFile() as file:
        state = apply_stream(io.BytesIO(agent.download("g@s1").content), file.fileno(), None)
        apply_stream(io.BytesIO(increment.content), file.fileno(), state)
        assert os.pread(file.fileno(), SIZE, 0) == changed


def test_download_compressed_says_so_and_is_smaller(agent: Agent, changed: bytes, driver: str) -> None:
    plain, packed = download(agent, id="g@s2"), download(agent, id="g@s2", compressed="true", large_blocks="true")
    for response, is_packed in ((plain, False), (packed, True)):
        begin = parse(response.content[:HEADER_BYTES])
        assert isinstance(begin, Begin)
        assert bool(begin.features & Feature.COMPRESSED) is is_packed
    assert b"changed!" * 100 in plain.content
    if driver == "file":  # ZFS sends as it is what does not lie compressed on its disks
        assert b"changed!" * 100 not in packed.content
    assert content(packed.content) == changed


def test_download_that_broke_off_goes_on_from_the_token(agent: Agent, changed: bytes) -> None:
    whole = download(agent, id="g@s2").content
    with tempfile.TemporaryFile() as file:
        receiver = VolumeReceiver(file.fileno())
        receiver.feed(whole[: len(whole) // 3])
        point = receiver.interrupted()
        assert point is not None
        rest = download(agent, id="g@s2", resume_token=ResumeToken.at(point, 0).encode())
        assert (rest.status_code, len(rest.content) < len(whole)) == (200, True)
        apply_stream(io.BytesIO(rest.content), file.fileno(), resume=point)
        assert os.pread(file.fileno(), SIZE, 0) == changed


@pytest.mark.usefixtures("changed")
@pytest.mark.parametrize(
    ("parameters", "status"),
    [
        ({"from": "@nope"}, 404),
        ({"from": "#nope"}, 404),
        ({"from": "nope@s1"}, 404),
        ({"from": "../g@s1"}, 400),
        ({"from": "s1"}, 404),
        ({"from": "@s2"}, 400),
        ({"resume_token": "1-2-3"}, 400),
        ({"resume_token": "1-2-3", "from": "@s1"}, 400),
        ({"compressed": "perhaps"}, 400),
    ],
)
def test_download_with_a_wrong_parameter_is_refused(agent: Agent, parameters: dict[str, str], status: int) -> None:
    response = download(agent, id="g@s2", **parameters)
    assert (response.status_code, response.headers["Content-Type"][:10]) == (status, "text/plain")


def test_download_over_http_1_0_is_not_chunked(agent: Agent, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=60) as client:
        client.sendall(b"GET /snapshots/download?id=f@s1 HTTP/1.0\r\n\r\n")
        with client.makefile("rb") as file:
            head, _, stream = file.read().partition(b"\r\n\r\n")
    assert head.split()[1] == b"200"
    assert b"chunked" not in head.lower()
    assert content(stream) == body


def test_download_head_sends_no_body(agent: Agent) -> None:
    response = requests.head(f"{agent.url}/snapshots/download", params={"id": "f@s1"}, timeout=60)
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        (b"", 400, "need an id\n"),
        (b"{}", 400, "need an id\n"),
        (b"null", 400, "need an id\n"),
        (b'{"id": ""}', 400, "need an id\n"),
        (b'{"id": "f"}', 400, "not a snapshot\n"),
        (b'{"id": "f@nope"}', 404, "not found\n"),
        (b'{"id": "nope@s"}', 404, "not found\n"),
        (b'{"id": "../f@s1"}', 400, "not a valid dataset\n"),
        (b'{"id": "-f@s1"}', 400, "not a valid dataset\n"),
        (b'{"id": ', 400, None),
        (b"[]", 400, None),
        (b'{"id": 5}', 400, None),
        (b"\xff", 400, None),
    ],
)
def test_download_wrong_request_is_text_with_newline(agent: Agent, sent: bytes, status: int, text: str | None) -> None:
    response = requests.get(f"{agent.url}/snapshots/download", data=sent, timeout=60)
    assert response.status_code == status
    assert response.headers["Content-Type"].startswith("text/plain")
    assert response.text.endswith("\n")
    assert text is None or response.text == text


def test_download_client_that_goes_away_ends_the_send(agent: Agent) -> None:
    before = agent.metric("mistify_snapshot_downloads_total", outcome="gone")
    for _ in range(3):
        with requests.get(f"{agent.url}/snapshots/download", params={"id": "f@s1"}, timeout=60, stream=True) as gone:
            assert gone.raw.read(1000)
    wait_until(
        lambda: agent.metric("mistify_snapshot_downloads_total", outcome="gone") == before + 3, "the sends to end"
    )
    # Nothing holds the snapshot any more.
    agent.call("CreateVolume", id="other", size=1)
    agent.call("CreateSnapshot", id="other", dest="s")
    agent.download("other@s")
    agent.call("DeleteSnapshot", id="other@s")


def test_download_slow_client_does_not_hold_up_other_calls(agent: Agent) -> None:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=60) as slow:
        slow.sendall(b"GET /snapshots/download?id=f@s1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow.recv(100)
        assert agent.call("GetSnapshot", id="f@s1")["snapshots"]
        assert len(agent.download("f@s1").content) > SIZE // 2


def test_download_many_at_once_are_all_whole(agent: Agent) -> None:
    expected = hashlib.sha256(agent.download("f@s1").content).hexdigest()
    found: list[str] = []

    def one() -> None:
        found.append(hashlib.sha256(agent.download("f@s1").content).hexdigest())

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [expected] * 6


def test_download_round_trip_through_an_image_keeps_the_content(
    agent: Agent, image_server: FakeImageServer, body: bytes, pool: str
) -> None:
    image_server.serve("round", agent.download("f@s1").content)
    image = agent.call("RequestImage", id="round")["images"][0]
    assert image["snapshot"] == f"{pool}/images/round@s1"
    clone = agent.call("CloneImage", id="round", dest=f"{pool}/round")["volumes"][0]
    assert Path(clone["device"]).read_bytes() == body
