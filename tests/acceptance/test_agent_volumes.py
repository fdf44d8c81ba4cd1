"""agent-wire section 4: volumes, datasets and snapshots."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.acceptance.daemons import Agent, write_disk
from tests.integration.zfs_pool import run
from tests.waiting import wait_until


def ids(answer: dict[str, list[dict[str, object]]]) -> list[object]:
    return [one["id"] for values in answer.values() for one in values]


@pytest.fixture(scope="module", autouse=True)
def fixed(agent: Agent) -> None:
    """A volume with a snapshot, and a filesystem, that the error tables speak of."""
    agent.call("CreateVolume", id="fixed/v", size=4)
    agent.call("CreateSnapshot", id="fixed/v", dest="s")


def test_create_volume_gives_id_size_device(agent: Agent, pool: str) -> None:
    answer = agent.call("CreateVolume", id="made/a/b", size=2)
    volume = answer["volumes"][0]
    assert set(volume) == {"id", "size", "device"}
    assert (volume["id"], volume["size"]) == (f"{pool}/made/a/b", 2)
    assert Path(volume["device"]).exists()
    assert agent.call("GetVolume", id="made/a/b") == answer
    assert volume in agent.call("ListVolumes")["volumes"]


def test_create_volume_reserves_its_space(agent: Agent) -> None:
    assert "no space left on device" in agent.error("CreateVolume", id="huge", size=4 << 20)


@pytest.mark.parametrize(
    ("method", "request_", "text"),
    [
        ("CreateVolume", {}, "need a valid size"),
        ("CreateVolume", {"size": -1}, "need a valid size"),
        ("CreateVolume", {"id": "x", "size": 0}, "need a valid size"),
        ("CreateVolume", {"size": 1}, "need an id"),
        ("CreateVolume", {"id": "fixed/v", "size": 5}, "dataset already exists"),
        ("GetVolume", {}, "need an id"),
        ("GetVolume", {"id": "fixed"}, "not a volume"),
        ("GetVolume", {"id": "fixed/v@s"}, "not a volume"),
        ("GetVolume", {"id": "nope"}, "not found"),
        ("DeleteDataset", {}, "need an id"),
        ("DeleteDataset", {"id": "nope"}, "not found"),
        ("DeleteDataset", {"id": "fixed/v@nope"}, "not found"),
        ("DeleteDataset", {"id": "fixed/v@s"}, "not a valid dataset"),
        ("DeleteDataset", {"id": "images/.."}, "not a valid dataset"),
        ("ListSnapshots", {"id": "nope"}, "not found"),
        ("ListSnapshots", {"id": "fixed/v@nope"}, "not found"),
        ("GetSnapshot", {}, "need an id"),
        ("GetSnapshot", {"id": "fixed/v@nope"}, "not found"),
        ("GetSnapshot", {"id": "nope"}, "not found"),
        ("GetSnapshot", {"id": "fixed/v"}, "not a snapshot"),
        ("GetSnapshot", {"id": "fixed/../v@s"}, "not a valid dataset"),
        ("CreateSnapshot", {}, "need an id"),
        ("CreateSnapshot", {"id": "nope"}, "not found"),
        ("CreateSnapshot", {"id": ".."}, "not a valid dataset"),
        ("CreateSnapshot", {"id": "fixed/v@s"}, "cannot create a snapshot of a snapshot"),
        ("CreateSnapshot", {"id": "fixed/v"}, "need a dest"),
        ("CreateSnapshot", {"id": "fixed/v", "dest": "a b"}, "invalid snapshot dest"),
        ("CreateSnapshot", {"id": "fixed/v", "dest": "a/b"}, "invalid snapshot dest"),
        ("DeleteSnapshot", {}, "need an id"),
        ("DeleteSnapshot", {"id": "fixed/v@nope"}, "not found"),
        ("DeleteSnapshot", {"id": "fixed/v"}, "not a snapshot"),
        ("RollbackSnapshot", {}, "need an id"),
        ("RollbackSnapshot", {"id": "fixed/v@nope"}, "not found"),
        ("RollbackSnapshot", {"id": "fixed/v"}, "not a snapshot"),
    ],
)
def test_wrong_request_is_told_in_known_words(
    agent: Agent, method: str, request_: dict[str, object], text: str
) -> None:
    assert agent.error(method, **request_) == text


def test_full_name_is_accepted_where_relative_is_wanted(agent: Agent, pool: str) -> None:
    assert agent.call("GetVolume", id=f"{pool}/fixed/v") == agent.call("GetVolume", id="fixed/v")
    assert ids(agent.call("GetSnapshot", id=f"{pool}/fixed/v@s")) == [f"{pool}/fixed/v@s"]


def test_delete_dataset_destroys_all_below_and_returns_it(agent: Agent, pool: str) -> None:
    agent.call("CreateVolume", id="gone/v", size=1)
    agent.call("CreateSnapshot", id="gone", dest="s", recursive=True)
    assert agent.call("DeleteDataset", id="gone/v")["volumes"][0]["size"] == 1
    assert ids(agent.call("DeleteDataset", id="gone")) == [f"{pool}/gone"]
    assert agent.error("GetVolume", id="gone/v") == "not found"


@pytest.mark.parametrize("name", ["images", "guests", "mistify"])
def test_delete_dataset_of_the_layout_is_refused(agent: Agent, pool: str, name: str) -> None:
    assert "can't be deleted" in agent.error("DeleteDataset", id=name if name != "mistify" else pool)


@pytest.mark.parametrize("spelling", ["ListSnapshots", "ListSnapshot"])
def test_list_snapshots_orders_by_dataset_then_creation(agent: Agent, pool: str, spelling: str) -> None:
    top = f"ordered-{spelling}"
    for name in ("b", "a"):
        agent.call("CreateVolume", id=f"{top}/{name}", size=1)
    for dest in ("z", "y"):
        agent.call("CreateSnapshot", id=f"{top}/a", dest=dest)
    agent.call("CreateSnapshot", id=top, dest="r", recursive=True)
    expected = [f"{pool}/{top}{rest}" for rest in ("@r", "/a@z", "/a@y", "/a@r", "/b@r")]
    assert ids(agent.call(spelling, id=top)) == expected
    assert ids(agent.call(spelling, id=f"{top}/a@y")) == [f"{pool}/{top}/a@y"]
    everything = ids(agent.call(spelling))
    assert set(expected) < set(everything)
    assert f"{pool}/fixed/v@s" in everything


def test_create_snapshot_recursive_returns_all(agent: Agent, pool: str) -> None:
    agent.call("CreateVolume", id="rec/v", size=1)
    assert ids(agent.call("CreateSnapshot", id="rec/v", dest="one")) == [f"{pool}/rec/v@one"]
    made = agent.call("CreateSnapshot", id="rec", dest="all:1.x_y-z", recursive=True)
    assert ids(made) == [f"{pool}/rec@all:1.x_y-z", f"{pool}/rec/v@all:1.x_y-z"]
    assert set(made["snapshots"][0]) == {"id", "size"}


def noise(size_mib: int) -> bytes:
    """What takes as much room in a pool as it has bytes."""
    return random.Random(size_mib).randbytes(size_mib << 20)


def test_snapshot_size_is_what_was_written(agent: Agent) -> None:
    volume = agent.call("CreateVolume", id="written", size=8)["volumes"][0]
    write_disk(volume["device"], noise(3))
    assert agent.call("CreateSnapshot", id="written", dest="s1")["snapshots"][0]["size"] == 3
    assert agent.call("CreateSnapshot", id="written", dest="s2")["snapshots"][0]["size"] == 0


def test_delete_snapshot_recursive_returns_what_was_deleted(agent: Agent, pool: str) -> None:
    agent.call("CreateVolume", id="del/v", size=1)
    agent.call("CreateSnapshot", id="del", dest="s", recursive=True)
    agent.call("CreateSnapshot", id="del/v", dest="t")
    assert ids(agent.call("DeleteSnapshot", id="del@s", recursive=True)) == [f"{pool}/del@s", f"{pool}/del/v@s"]
    assert ids(agent.call("DeleteSnapshot", id="del/v@t")) == [f"{pool}/del/v@t"]
    assert agent.call("ListSnapshots", id="del") == {"snapshots": []}


@contextmanager
def unread_download(agent: Agent, wire_id: str) -> Iterator[None]:
    """Of a snapshot with more in it than fits between us and the agent."""
    with requests.get(f"{agent.url}/snapshots/download", params={"id": wire_id}, stream=True, timeout=60) as sent:
        assert sent.raw.read(1)
        yield


@contextmanager
def hold(snapshot: str) -> Iterator[None]:
    """An administrator's."""
    run("zfs", "hold", "backup", snapshot)
    yield
    run("zfs", "release", "backup", snapshot)


def test_delete_snapshot_that_is_needed_waits_only_if_asked_to(agent: Agent, pool: str, driver: str) -> None:
    size_mib = 32
    device = agent.call("CreateVolume", id="needed", size=size_mib)["volumes"][0]["device"]
    write_disk(device, noise(size_mib))
    agent.call("CreateSnapshot", id="needed", dest="s")
    with unread_download(agent, "needed@s"):
        assert f"needed by {pool}/needed@s is being" in agent.error("DeleteSnapshot", id="needed@s")
    # ZFS does not defer what is being sent.
    with hold(f"{pool}/needed@s") if driver == "zfs" else unread_download(agent, "needed@s"):
        assert f"{pool}/needed@s" in agent.error("DeleteSnapshot", id="needed@s")
        assert agent.call("DeleteSnapshot", id="needed@s", defer=True) == {"snapshots": []}
        assert ids(agent.call("ListSnapshots", id="needed")) == [f"{pool}/needed@s"]
    wait_until(lambda: not ids(agent.call("ListSnapshots", id="needed")), "the snapshot to go with its last need")


def test_rollback_over_newer_snapshots_needs_destroy_more_recent(agent: Agent, pool: str) -> None:
    volume = agent.call("CreateVolume", id="roll", size=1)["volumes"][0]
    agent.call("CreateSnapshot", id="roll", dest="s1")
    write_disk(volume["device"], b"later")
    agent.call("CreateSnapshot", id="roll", dest="s2")
    text = agent.error("RollbackSnapshot", id="roll@s1")
    assert "s2" in text or "newer" in text or "recent" in text, text
    answer = agent.call("RollbackSnapshot", id="roll@s1", destroyMoreRecent=True)
    assert ids(answer) == [f"{pool}/roll@s1"]
    assert ids(agent.call("ListSnapshots", id="roll")) == [f"{pool}/roll@s1"]
    assert Path(volume["device"]).read_bytes()[:5] == bytes(5)


@pytest.mark.parametrize(
    "name", ["../other/x", ".", "..", "images/..", "-r", "x,y", "x%y", "a//b", "/a", "a/", "x" * 300, "a\nb", "é"]
)
def test_name_that_leaves_its_place_is_not_a_valid_dataset(agent: Agent, name: str) -> None:
    for method, more in (
        ("GetVolume", {}),
        ("CreateVolume", {"size": 1}),
        ("DeleteDataset", {}),
        ("ListSnapshots", {}),
        ("CreateSnapshot", {"dest": "s"}),
    ):
        assert agent.error(method, id=name, **more) == "not a valid dataset"


def test_create_volume_again_the_same_is_fine(agent: Agent) -> None:
    first = agent.call("CreateVolume", id="again", size=2)
    assert agent.call("CreateVolume", id="again", size=2) == first
