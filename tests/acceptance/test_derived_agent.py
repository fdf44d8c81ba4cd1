"""The agent and the image service together: verified chunks, derived streams, increments, breaks and fallbacks."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from agent_image.drivers.file import FileDriver
from imaging.names import PoolName, SnapshotName
from tests.acceptance.daemons import Agent, Daemon, start_agent, start_image_service
from tests.acceptance.image_service_calls import sha256, upload
from tests.fakes.disk_files import BLOCK_BYTES, changed, disk_bytes, qcow2
from tests.fakes.image_server import FakeImageServer

OLD = disk_bytes(1, 512)
NEW = changed(OLD, 3, 40, 350)
NEWER = changed(NEW, 5)
POOL = PoolName.parse("mistify")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_image_service(tmp_path_factory.mktemp("service") / "state") as daemon:
        yield daemon


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "agent"


@pytest.fixture
def agent(state_dir: Path, service: Daemon) -> Iterator[Agent]:
    with start_agent(state_dir, image_service=f"127.0.0.1:{service.port}") as agent:
        yield agent


def put(service: Daemon, data: bytes, name: str = "") -> str:
    headers = {"X-Image-Name": name} if name else {}
    image_id: str = upload(service, data, **headers)["id"]
    return image_id


def request(agent: Agent, image_id: str, **more: Any) -> dict[str, Any]:
    image: dict[str, Any] = agent.call("RequestImage", id=image_id, type="kvm", **more)["images"][0]
    return image


def contents(agent: Agent, state_dir: Path, *images: dict[str, Any]) -> list[str]:
    """Digests of images; stops the agent, whose pool is read directly."""
    agent.stop()
    driver = FileDriver(POOL, state_dir)
    driver.open()
    found = []
    try:
        for image in images:
            name = SnapshotName.parse(image["snapshot"])
            size_bytes = driver.get_snapshot(name).volsize_bytes or 0
            with driver.open_snapshot(name) as fd, open(fd, "rb", closefd=False) as file:
                found.append(hashlib.sha256(file.read(size_bytes)).hexdigest())
    finally:
        driver.close()
    return found


def digests(*disks: bytes) -> list[str]:
    return [hashlib.sha256(disk).hexdigest() for disk in disks]


def received_bytes(agent: Agent) -> float:
    return agent.metric("mistify_fetched_bytes_total")


def test_images_of_every_format_arrive_as_streams(
    agent: Agent, service: Daemon, state_dir: Path, tmp_path: Path
) -> None:
    stored = [OLD, gzip.compress(OLD, 1), qcow2(tmp_path, OLD, "-c")]
    images = [request(agent, put(service, data)) for data in stored]
    assert contents(agent, state_dir, *images) == digests(OLD) * 3


def test_newer_versions_come_as_increments_onto_the_older(
    agent: Agent, service: Daemon, state_dir: Path, tmp_path: Path
) -> None:
    old = put(service, OLD, "debian")
    first = request(agent, old)
    full_bytes = received_bytes(agent)
    new, newer = put(service, qcow2(tmp_path, NEW), "debian"), put(service, NEWER, "debian")
    second = request(agent, new)
    third = request(agent, newer)
    pulled = received_bytes(agent) - full_bytes
    assert 0 < pulled < 10 * BLOCK_BYTES < full_bytes / 4
    assert contents(agent, state_dir, first, second, third) == digests(OLD, NEW, NEWER)


def test_older_version_may_go_while_the_newer_builds_on_it(agent: Agent, service: Daemon, state_dir: Path) -> None:
    old, new = put(service, OLD, "alpine"), put(service, NEW, "alpine")
    request(agent, old)
    second = request(agent, new)
    agent.call("DeleteImage", id=old)
    assert [image["id"] for image in agent.call("ListImages")["images"]] == [new]
    agent.restart()
    assert contents(agent, state_dir, second) == digests(NEW)


def test_version_the_service_does_not_have_any_more_is_no_base(agent: Agent, service: Daemon, state_dir: Path) -> None:
    old, new = put(service, OLD, "gone"), put(service, NEW, "gone")
    request(agent, old)
    requests.delete(f"{service.url}/images/{old}", timeout=60)
    second = request(agent, new)
    assert contents(agent, state_dir, second) == digests(NEW)


def test_version_that_came_from_elsewhere_does_not_fit_and_the_full_one_is_taken(
    agent: Agent, service: Daemon, state_dir: Path
) -> None:
    """The older image is here under the right id, but as a volume of another guid, which the driver notices."""
    old = put(service, OLD, "odd")
    new: str = upload(service, NEW, **{"X-Image-Name": "odd", "X-Image-Origin": old})["id"]
    with FakeImageServer() as elsewhere:
        request(agent, old, source=elsewhere.serve("/old", OLD))
        second = request(agent, new)
    assert "a form of an image is passed over" in agent.log()
    assert contents(agent, state_dir, second) == digests(NEW)


@pytest.mark.parametrize("packed", ["", "gzip"])
def test_increment_fits_a_version_that_was_taken_as_it_is_stored(
    agent: Agent, service: Daemon, state_dir: Path, packed: str
) -> None:
    """A raw disk becomes a volume with the guid the service's own stream of it has, whoever made the stream."""
    name = f"as-stored-{packed}"
    stored = gzip.compress(OLD, 1) if packed else OLD
    old, new = put(service, stored, name), put(service, NEW, name)
    first = request(agent, old, digest=sha256(stored))
    full_bytes = received_bytes(agent)
    second = request(agent, new)
    assert received_bytes(agent) - full_bytes < 10 * BLOCK_BYTES
    assert contents(agent, state_dir, first, second) == digests(OLD, NEW)


def test_digest_that_was_asked_for_is_that_of_the_stored_bytes(agent: Agent, service: Daemon, state_dir: Path) -> None:
    packed = gzip.compress(OLD, 1)
    image_id = put(service, packed)
    assert "is not the image that was asked for" in agent.error("RequestImage", id=image_id, digest=sha256(OLD))
    image = request(agent, image_id, digest=sha256(packed))
    assert image["digest"] == sha256(packed)
    other = request(agent, put(service, NEW))
    assert other["digest"] == sha256(NEW)
    assert contents(agent, state_dir, image, other) == digests(OLD, NEW)


def test_service_restarted_while_an_image_comes_costs_nothing_but_time(service: Daemon, state_dir: Path) -> None:
    data = disk_bytes(5, 4096)
    image_id = put(service, data)
    with start_agent(state_dir, image_service=f"127.0.0.1:{service.port}") as agent:
        agent.call("RequestImage", id=image_id, type="kvm", wait=False)
        service.kill()
        service.start()
        image = request(agent, image_id)
        assert contents(agent, state_dir, image) == digests(data)
