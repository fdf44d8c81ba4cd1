"""agent-wire sections 3 and 4: disks of guests, and guests that come back as they went."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imaging.sendstream.validator import StreamValidator
from tests.acceptance.daemons import Agent, start_agent, write_disk
from tests.fakes.agent_world import MIB, disk
from tests.fakes.image_server import FakeImageServer


@pytest.fixture(scope="module", autouse=True)
def image(agent: Agent, image_server: FakeImageServer) -> bytes:
    """An image that guests start from."""
    body = disk(1, 2 * MIB)
    image_server.serve("base", body)
    agent.call("RequestImage", id="base", type="kvm")
    return body


def guest(guest_id: str, *disks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": guest_id, "disks": list(disks), **more}


def test_verify_disks_fills_in_sizes(agent: Agent) -> None:
    wanted = guest("v1", {"image": "base", "size": 77}, {"size": 5, "bus": "virtio"})
    answer = agent.call("VerifyDisks", guest=wanted, action="create", args={"a": 1})
    assert set(answer) == {"guest"}
    disks = answer["guest"]["disks"]
    assert [one["size"] for one in disks] == [2, 5]
    assert set(disks[0]) == {"bus", "device", "size", "volume", "image", "source"}
    assert disks[1]["bus"] == "virtio"
    assert agent.error("GetVolume", id="guests/v1/disk-0") == "not found"


def test_create_guest_disks_returns_the_whole_guest(agent: Agent, pool: str, image: bytes) -> None:
    nic = {"name": "eth0", "network": "n", "model": "virtio", "address": "10.0.0.2", "netmask": "m", "gateway": "g"}
    whole = guest(
        "g1",
        {"image": "base", "bus": "sata", "device": "sda", "serial": "kept"},
        {"size": 3},
        type="kvm",
        memory=512,
        cpu=2,
        metadata={"k": "v"},
        nics=[nic],
        owner={"other": ["program"]},
    )
    answer = agent.call("CreateGuestDisks", guest=whole)["guest"]
    first, second = answer["disks"]
    assert first["volume"] == f"{pool}/guests/g1/disk-0"
    assert (first["size"], first["image"], first["bus"], first["device"]) == (2, "base", "sata", "sda")
    assert first["serial"] == "kept"
    assert Path(first["source"]).read_bytes() == image
    assert (second["volume"], second["size"]) == (f"{pool}/guests/g1/disk-1", 3)
    assert Path(second["source"]).read_bytes() == bytes(3 * MIB)
    assert {key: answer[key] for key in ("id", "type", "memory", "cpu", "metadata", "owner")} == {
        key: whole[key] for key in ("id", "type", "memory", "cpu", "metadata", "owner")
    }
    assert answer["nics"] == [nic | {"vlans": None}]
    assert "state" not in answer
    assert "vnc" not in answer


def test_thin_disk_may_be_larger_than_what_is_left_and_a_thick_one_not(agent: Agent) -> None:
    size = 4 << 20  # MiB: no machine for tests has 4 TiB
    assert agent.error("CreateGuestDisks", guest=guest("thick", {"size": size})) == "no space left on device"
    assert agent.error("VerifyDisks", guest=guest("thick", {"size": size, "thin": False})) == "no space left on device"
    wanted = guest("thin", {"size": size, "thin": True}, {"size": 1})
    assert agent.call("VerifyDisks", guest=wanted)["guest"]["disks"][0]["size"] == size
    disks = agent.call("CreateGuestDisks", guest=wanted)["guest"]["disks"]
    assert [(one["size"], one.get("thin", False)) for one in disks] == [(size, True), (1, False)]
    agent.call("DeleteGuestsDisks", guest=wanted)


def test_create_guest_disks_keeps_existing_ones(agent: Agent) -> None:
    wanted = guest("g2", {"size": 1})
    made = agent.call("CreateGuestDisks", guest=wanted)["guest"]["disks"][0]
    write_disk(made["source"], b"mine")
    more = guest("g2", {"size": 1}, {"image": "base"})
    disks = agent.call("CreateGuestDisks", guest=more)["guest"]["disks"]
    assert disks[0]["source"] == made["source"]
    assert Path(disks[0]["source"]).read_bytes()[:4] == b"mine"
    assert disks[1]["size"] == 2


@pytest.mark.parametrize("method", ["VerifyDisks", "CreateGuestDisks"])
@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({}, "invalid argument"),
        ({"disks": [{"size": 1}]}, "invalid argument"),
        ({"id": "e"}, "invalid argument"),
        ({"id": "e", "disks": []}, "invalid argument"),
        ({"id": "e", "disks": [{"bus": "sata"}]}, "invalid argument"),
        ({"id": "e", "disks": [{"size": -1}]}, "invalid argument"),
        ({"id": "e", "disks": [{"image": "nope"}]}, "not found"),
        ({"id": "e", "disks": [{"size": 1 << 42}]}, "no space left on device"),
        ({"id": "e", "disks": [{"size": (1 << 43) - 1}] * 4}, "no space left on device"),
        ({"id": "../x", "disks": [{"size": 1}]}, "not a valid dataset"),
    ],
)
def test_wrong_guest_is_told_in_known_words(agent: Agent, method: str, wanted: dict[str, Any], text: str) -> None:
    assert agent.error(method, guest=wanted) == text
    assert agent.error("GetVolume", id="guests/e/disk-0") == "not found"


def test_create_guest_disks_all_or_none(agent: Agent) -> None:
    agent.call("CreateVolume", id="guests/half/disk-1", size=9)
    text = agent.error("CreateGuestDisks", guest=guest("half", {"image": "base"}, {"size": 1}))
    assert text == "dataset already exists"
    assert agent.error("GetVolume", id="guests/half/disk-0") == "not found"
    assert agent.call("GetVolume", id="guests/half/disk-1")["volumes"][0]["size"] == 9


@pytest.mark.parametrize("spelling", ["DeleteGuestsDisks", "DeleteGuestDisks"])
def test_delete_guest_disks_returns_guest_without_disks(agent: Agent, spelling: str) -> None:
    wanted = guest(f"d-{spelling}", {"size": 1}, type="kvm")
    made = agent.call("CreateGuestDisks", guest=wanted)["guest"]
    answer = agent.call(spelling, guest=made)["guest"]
    assert answer == {"id": f"d-{spelling}", "type": "kvm"}
    assert agent.error("GetVolume", id=f"guests/d-{spelling}/disk-0") == "not found"
    assert agent.call(spelling, guest=made)["guest"] == answer  # nothing there is fine
    assert agent.error(spelling, guest={}) == "invalid argument"


def test_concurrent_requests_do_not_overbook_the_pool(tmp_path: Path, driver: str, own_pool: str) -> None:
    """Of requests that fit one by one, no more succeed than fit together."""
    with start_agent(tmp_path / "state", driver=driver, zpool=own_pool) as agent:
        low, high = 0, 1 << 40
        while high - low > 1:
            middle = (low + high) // 2
            fits = agent.raw_call("VerifyDisks", {"guest": guest("probe", {"size": middle})})["error"] is None
            low, high = (middle, high) if fits else (low, middle)
        size = low * 2 // 5  # two fit, three do not

        def create(number: int) -> str | None:
            error: str | None = agent.raw_call("CreateGuestDisks", {"guest": guest(f"c{number}", {"size": size})})[
                "error"
            ]
            return error

        with ThreadPoolExecutor(6) as threads:
            errors = list(threads.map(create, range(6)))
        assert sorted(map(str, errors)) == ["None"] * 2 + ["no space left on device"] * 4
        assert len(agent.call("ListVolumes")["volumes"]) == 2


def test_block_size_of_new_volumes_is_the_one_that_was_set(tmp_path: Path, driver: str, own_pool: str) -> None:
    with start_agent(tmp_path / "state", driver=driver, zpool=own_pool, volblocksize=65536) as agent:
        agent.call("CreateGuestDisks", guest=guest("blocks", {"size": 1}))
        agent.call("CreateSnapshot", id="guests/blocks/disk-0", dest="s")
        validator = StreamValidator()
        validator.feed(agent.download("guests/blocks/disk-0@s").content)
        validator.finish()
    assert [summary.volblocksize_bytes for summary in validator.summaries] == [65536]
