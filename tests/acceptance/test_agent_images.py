"""agent-wire section 4: images; and what RequestImage adds (wait, pending, digest, sources, formats)."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lz4.frame
import pytest
import requests
import zstandard

from tests.acceptance.daemons import Agent, start_agent
from tests.codec import samples
from tests.fakes.agent_world import MIB, disk
from tests.fakes.disk_files import qcow2
from tests.fakes.image_server import FakeImageServer
from tests.waiting import wait_until

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "lz4": lz4.frame.compress,
}


def content_of(agent: Agent, image_id: str, pool: str) -> bytes:
    """An image's bytes, as a guest would see them."""
    dest = f"{pool}/look/{image_id}"
    volume = agent.call("CloneImage", id=image_id, dest=dest)["volumes"][0]
    content = Path(volume["device"]).read_bytes()
    agent.call("DeleteDataset", id=f"look/{image_id}")
    return content


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_request_image_raw_disk_in_any_packing_is_here(
    agent: Agent, image_server: FakeImageServer, pool: str, packing: str
) -> None:
    image_id = f"raw-{packing}"
    body = disk(len(packing), 3 * MIB)
    packed = PACKERS[packing](body)
    image_server.serve(image_id, packed)
    image = agent.call("RequestImage", id=image_id, type="kvm")["images"][0]
    assert image["id"] == image_id
    assert image["type"] == "kvm"
    assert image["volume"] == f"{pool}/images/{image_id}"
    assert image["snapshot"].startswith(f"{pool}/images/{image_id}@")
    assert (image["size"], image["status"]) == (3, "complete")
    assert image["digest"] == f"sha256:{hashlib.sha256(packed).hexdigest()}"
    assert agent.call("GetImage", id=image_id) == {"images": [image]}
    assert image in agent.call("ListImages")["images"]
    assert content_of(agent, image_id, pool) == body


@pytest.mark.backend("qemu")
@pytest.mark.parametrize("form", ["plain", "packed clusters", "gzip"])
def test_request_image_qcow2_disk_is_here(
    agent: Agent, image_server: FakeImageServer, pool: str, tmp_path: Path, form: str
) -> None:
    image_id, body = f"qcow2-{form[:4]}", disk(len(form), 2 * MIB) + bytes(5 * MIB) + disk(1)
    file = qcow2(tmp_path, body, *(["-c"] if form == "packed clusters" else []))
    image_server.serve(image_id, gzip.compress(file, 1) if form == "gzip" else file)
    image = agent.call("RequestImage", id=image_id)["images"][0]
    assert (image["size"], image["status"]) == (len(body) // MIB, "complete")
    assert content_of(agent, image_id, pool) == body


@pytest.mark.backend("qemu")
@pytest.mark.parametrize(
    ("form", "words"),
    [("backing file", "backing file"), ("cut off", "outside the file"), ("a qcow2 inside", "qcow2 format")],
)
def test_request_image_qcow2_that_could_harm_is_refused(
    agent: Agent, image_server: FakeImageServer, tmp_path: Path, form: str, words: str
) -> None:
    """Whatever reaches out of the file, and what a program that guesses formats would take for another disk."""
    whole = qcow2(tmp_path, disk(1, 2 * MIB))
    if form == "backing file":
        whole = qcow2(tmp_path, disk(1), "-B", "/etc/hostname", "-F", "raw")
    elif form == "a qcow2 inside":
        whole = qcow2(tmp_path, whole + bytes(-len(whole) % 512))
    image_id = f"harm-{form.replace(' ', '-')}"
    image_server.serve(image_id, whole[: -(64 << 10)] if form == "cut off" else whole)
    assert words in agent.error("RequestImage", id=image_id)
    assert agent.error("GetImage", id=image_id) == "not found"


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_request_image_volume_stream_in_any_packing_keeps_its_snapshot(
    agent: Agent, image_server: FakeImageServer, pool: str, packing: str
) -> None:
    facts = samples.manifest()["b512-full"]
    image_id = f"stream-{packing}"
    image_server.serve(image_id, PACKERS[packing](samples.load("b512-full")))
    image = agent.call("RequestImage", id=image_id)["images"][0]
    assert image["snapshot"] == f"{pool}/images/{image_id}@{facts['result_of'].partition('@')[2]}"
    assert hashlib.sha256(content_of(agent, image_id, pool)).hexdigest() == facts["result"]["sha256"]


def test_request_image_again_fetches_nothing(agent: Agent, image_server: FakeImageServer) -> None:
    image_server.serve("once", disk(1))
    first = agent.call("RequestImage", id="once")
    assert agent.call("RequestImage", id="once") == first
    assert image_server.requests[image_server.path_of("once")] == 1


def test_request_image_many_callers_share_one_fetch(agent: Agent, image_server: FakeImageServer) -> None:
    image_server.serve("shared", disk(2, 2 * MIB), piece_bytes=256 << 10, pause_s=0.05)
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda _: agent.call("RequestImage", id="shared"), range(10)))
    assert all(answer == answers[0] for answer in answers)
    assert image_server.requests[image_server.path_of("shared")] == 1


def test_request_image_from_another_source_shares_the_fetch_that_runs(
    agent: Agent, image_server: FakeImageServer
) -> None:
    """An image is what its id says: whoever comes second gets the same one, wherever it would have taken it from."""
    url = image_server.serve("/pub/first.img", disk(5, 2 * MIB), piece_bytes=256 << 10, pause_s=0.05)
    other = image_server.serve("/pub/second.img", disk(6))
    first = agent.call("RequestImage", id="two-sources", source=url, wait=False)["images"][0]
    assert first["status"] in {"pending", "downloading"}
    answers = [agent.call("RequestImage", id="two-sources", source=source) for source in (other, url, other)]
    assert all(answer == answers[0] for answer in answers)
    assert (image_server.requests["/pub/first.img"], image_server.requests["/pub/second.img"]) == (1, 0)


@pytest.mark.parametrize("form", ["absolute", "rooted", "relative"])
def test_request_image_source_in_any_form_is_fetched(agent: Agent, image_server: FakeImageServer, form: str) -> None:
    url = image_server.serve(f"/pub/{form}.img", disk(3))
    source = {"absolute": url, "rooted": f"/pub/{form}.img", "relative": f"pub/{form}.img"}[form]
    assert agent.call("RequestImage", id=f"src-{form}", source=source)["images"][0]["status"] == "complete"


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({}, "need id"),
        ({"id": "../x"}, "not a valid image id"),
        ({"id": "a/b"}, "not a valid image id"),
        ({"id": "x", "source": "file:///etc/passwd"}, "not a valid source"),
        ({"id": "x", "source": "//evil.example/x"}, "not a valid source"),
        ({"id": "x", "digest": "md6:00"}, "not a digest"),
    ],
)
def test_request_image_wrong_request_is_refused(agent: Agent, request_: dict[str, Any], text: str) -> None:
    assert agent.error("RequestImage", **request_).startswith(text)


def test_request_image_server_says_no_is_told_in_known_words(agent: Agent, image_server: FakeImageServer) -> None:
    url = f"{image_server.url}/images/absent/download"
    expected = f"unexpected http response code: expected 200, received 404, url: {url}"
    assert agent.error("RequestImage", id="absent") == expected
    assert agent.error("GetImage", id="absent") == "not found"
    failed = agent.call("GetImage", id="absent", pending=True)["images"][0]
    assert (failed["status"], failed["progress"]["message"]) == ("error", expected)


def test_request_image_expected_digest_is_verified(agent: Agent, image_server: FakeImageServer) -> None:
    body = disk(4)
    image_server.serve("digest", body)
    wrong = agent.error("RequestImage", id="digest", digest=f"sha256:{'0' * 64}")
    assert "is not the image that was asked for" in wrong
    assert agent.error("GetImage", id="digest") == "not found"
    right = f"sha256:{hashlib.sha256(body).hexdigest()}"
    assert agent.call("RequestImage", id="digest", digest=right)["images"][0]["digest"] == right
    assert "not sha256:00" in agent.error("RequestImage", id="digest", digest=f"sha256:{'0' * 64}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flip-begin-creation", "checksum"),
        ("bad-fstype", "filesystem"),
        ("fs-Lec", "filesystem"),
        ("enc-w-raw", "raw"),
        ("clone-inc-s1-c1", ""),
        ("plain-inc-s1-s2", ""),
    ],
)
def test_request_image_damaged_or_other_stream_is_refused(
    agent: Agent, image_server: FakeImageServer, name: str, words: str
) -> None:
    image_server.serve(f"refused-{name}", samples.load(name))
    text = agent.error("RequestImage", id=f"refused-{name}")
    assert words in text.lower()
    assert agent.error("GetImage", id=f"refused-{name}") == "not found"


def test_request_image_without_wait_answers_at_once_with_progress(
    agent: Agent, image_server: FakeImageServer, tmp_path: Path, driver: str
) -> None:
    image_server.serve("slow", disk(5, 2 * MIB), piece_bytes=128 << 10, pause_s=0.1)
    image = agent.call("RequestImage", id="slow", type="kvm", wait=False)["images"][0]
    assert image["status"] in {"pending", "downloading"}
    assert image["progress"]["stage"] == image["status"]
    assert agent.error("GetImage", id="slow") == "not found"
    assert "slow" not in [one["id"] for one in agent.call("ListImages")["images"]]

    def received() -> dict[str, Any]:
        one: dict[str, Any] = agent.call("GetImage", id="slow", pending=True)["images"][0]
        return one if one.get("progress", {}).get("received_bytes", 0) > 0 else {}

    seen = wait_until(received, "bytes of the image to arrive")
    assert seen["status"] == "downloading"
    assert seen["progress"]["expected_bytes"] == 2 * MIB
    assert "slow" in [one["id"] for one in agent.call("ListImages", pending=True)["images"]]
    done = agent.call("RequestImage", id="slow")["images"][0]
    assert (done["status"], "progress" in done) == ("complete", False)
    assert agent.call("RequestImage", id="slow", wait=False)["images"] == [done]


def test_request_image_caller_that_hangs_up_does_not_stop_the_fetch(
    agent: Agent, image_server: FakeImageServer
) -> None:
    image_server.serve("hung-up", disk(6), piece_bytes=128 << 10, pause_s=0.05)
    with pytest.raises(requests.exceptions.ReadTimeout):
        agent.call("RequestImage", id="hung-up", timeout_s=0.2)
    wait_until(lambda: agent.raw_call("GetImage", {"id": "hung-up"})["error"] is None, "the image to be complete")
    assert image_server.requests[image_server.path_of("hung-up")] == 1


@pytest.mark.parametrize("image_id", ["", "nope", "../../etc/passwd"])
def test_get_or_delete_image_unknown_or_no_id_is_not_found(agent: Agent, image_id: str) -> None:
    assert agent.error("GetImage", id=image_id) == "not found"
    assert agent.error("GetImage", id=image_id, pending=True) == "not found"
    assert agent.error("DeleteImage", id=image_id) == "not found"


def test_delete_image_destroys_volume_and_returns_record(agent: Agent, image_server: FakeImageServer) -> None:
    image_server.serve("del", disk(7))
    image = agent.call("RequestImage", id="del")["images"][0]
    assert agent.call("DeleteImage", id="del") == {"images": [image]}
    assert agent.error("GetImage", id="del") == "not found"
    assert agent.error("GetVolume", id="images/del") == "not found"


def test_list_of_volumes_shows_images_and_copies_none(
    agent: Agent, image_server: FakeImageServer, driver: str, pool: str
) -> None:
    image_server.serve("listed", disk(12, 4 * MIB))
    agent.call("RequestImage", id="listed")
    state_dir = agent.log_path.with_suffix("")
    files = set(state_dir.glob("pools/*/contents/*"))
    listed = {one["id"]: one for one in agent.call("ListVolumes")["volumes"]}
    assert listed[f"{pool}/images/listed"]["size"] == 4
    assert set(state_dir.glob("pools/*/contents/*")) == files
    assert bool(files) == (driver == "file")
    assert agent.call("GetVolume", id="images/listed")["volumes"][0]["device"]


def test_delete_image_on_its_way_stops_the_fetch(agent: Agent, image_server: FakeImageServer) -> None:
    image_server.serve("stopped", disk(8), hang_after=64 << 10)
    errors: list[str] = []
    waiter = threading.Thread(target=lambda: errors.append(agent.error("RequestImage", id="stopped")))
    waiter.start()
    wait_until(lambda: image_server.requests[image_server.path_of("stopped")], "the fetch to begin")
    gone = agent.call("DeleteImage", id="stopped")["images"][0]
    waiter.join(60)
    assert gone["id"] == "stopped"
    assert gone["status"] in {"pending", "downloading"}
    assert len(errors) == 1
    assert "was deleted while it was being fetched" in errors[0]
    assert agent.error("GetImage", id="stopped", pending=True) == "not found"
    image_server.serve("stopped", disk(8))
    assert agent.call("RequestImage", id="stopped")["images"][0]["status"] == "complete"


def test_clone_image_gives_a_writable_volume(agent: Agent, image_server: FakeImageServer, pool: str) -> None:
    body = disk(9)
    image_server.serve("cloned", body)
    agent.call("RequestImage", id="cloned")
    volume = agent.call("CloneImage", id="cloned", dest=f"{pool}/deep/er/clone")["volumes"][0]
    assert (volume["id"], volume["size"]) == (f"{pool}/deep/er/clone", 1)
    with Path(volume["device"]).open("r+b") as device:
        assert device.read() == body
        device.seek(0)
        device.write(b"changed")
    assert content_of(agent, "cloned", pool) == body
    assert agent.call("CloneImage", id="cloned", dest=f"{pool}/deep/er/clone") == {"volumes": [volume]}


def test_clone_image_errors_are_checked_in_order(agent: Agent, image_server: FakeImageServer, pool: str) -> None:
    image_server.serve("orig", disk(10))
    agent.call("RequestImage", id="orig")
    agent.call("CreateVolume", id="taken", size=1)
    assert agent.error("CloneImage") == "need dest"
    assert agent.error("CloneImage", id="nope", dest=f"{pool}/x") == "not found"
    assert agent.error("CloneImage", id="orig", dest="otherpool/x") == "not a valid dataset"
    assert agent.error("CloneImage", id="orig", dest=f"{pool}/taken") == "dataset already exists"


def test_delete_image_with_clones_keeps_them_alive(agent: Agent, image_server: FakeImageServer, pool: str) -> None:
    body = disk(11)
    image_server.serve("parent", body)
    agent.call("RequestImage", id="parent")
    volume = agent.call("CloneImage", id="parent", dest=f"{pool}/child")["volumes"][0]
    agent.call("DeleteImage", id="parent")
    assert agent.error("GetImage", id="parent") == "not found"
    assert Path(volume["device"]).read_bytes() == body
    assert not [one for one in agent.call("ListVolumes")["volumes"] if "parent" in one["id"]]
    assert not [one for one in agent.call("ListSnapshots")["snapshots"] if "parent" in one["id"]]
    agent.call("DeleteDataset", id="child")


def test_full_queue_answers_at_once_with_a_clear_error(tmp_path: Path, driver: str, own_pool: str) -> None:
    with FakeImageServer() as server:
        for number in range(3):
            server.serve(f"q{number}", disk(number), hang_after=1000)
        with start_agent(
            tmp_path / "state",
            image_service=server.address,
            driver=driver,
            zpool=own_pool,
            fetchers=1,
            max_pending=2,
        ) as agent:
            for number in range(2):
                agent.call("RequestImage", id=f"q{number}", wait=False)
            text = agent.error("RequestImage", id="q2")
            assert "2" in text
            assert agent.error("GetImage", id="q2", pending=True) == "not found"
            agent.call("RequestImage", id="q1", wait=False)  # joins, takes no place
            agent.call("DeleteImage", id="q0")
            assert agent.call("RequestImage", id="q2", wait=False)["images"][0]["id"] == "q2"


def test_server_that_is_down_is_an_error_after_a_few_attempts(tmp_path: Path, driver: str, own_pool: str) -> None:
    with start_agent(tmp_path / "state", driver=driver, zpool=own_pool) as agent:
        assert "can't reach" in agent.error("RequestImage", id="x")
        assert agent.metric("mistify_fetch_retries_total", code="unavailable") == 4
