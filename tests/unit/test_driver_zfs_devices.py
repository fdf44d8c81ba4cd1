"""Who holds a device, found in /proc; shown with a file in the device's place."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from agent_image.drivers.zfs import devices
from tests.waiting import wait_until

SEEN = devices.Seen("tank/v", devices.Number(0xE600, 7))


def test_own_process_is_found_as_holder_of_what_it_has_open() -> None:
    """Listing one's own descriptors opens one more, which is gone when it is looked at."""
    with Path("/dev/null").open("rb"):
        found = list(devices._processes({"/dev/null": "tank/v"}))
    assert any(text.startswith(f"process {os.getpid()} (") for volume, text in found if volume == "tank/v")


def test_own_process_is_no_holder_of_what_it_only_looks_at() -> None:
    """What :func:`devices.look` has open for a moment must not be told to a caller as what is in the way."""
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = list(devices._processes({"/dev/zero": "tank/v"}))
    finally:
        os.close(fd)
    assert not any(text.startswith(f"process {os.getpid()} (") for _, text in found)


def test_partition_belongs_to_its_volume() -> None:
    nodes = {"/dev/zd16": "tank/v"}
    assert devices._volume_behind("/dev/zd16", nodes) == "tank/v"
    assert devices._volume_behind("/dev/zd16p1", nodes) == "tank/v"
    assert devices._volume_behind("/dev/zd160", nodes) is None


def test_what_is_no_volume_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert devices.volume_of(tmp_path / "file") is None
    assert devices.volume_of(tmp_path / "absent") is None
    assert devices.volume_of(Path("/dev/null")) is None


def test_programs_of_udev_let_go_by_themselves() -> None:
    assert devices.is_passing("tank/v is open: process 12 (systemd-udevd)")
    assert devices.is_passing("tank/v is open: process 12 ((spawn))")
    assert not devices.is_passing("tank/v is open: process 12 (qemu-system-x86)")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the device of tank/v, and udev running."""
    node = tmp_path / "zd16"
    node.touch()
    (tmp_path / "zvol" / "tank").mkdir(parents=True)
    monkeypatch.setattr(devices, "UDEV_CONTROL", node)
    monkeypatch.setattr(devices, "look", lambda path: SEEN if path.resolve() == node else None)
    return node


def test_device_is_told_by_its_link_once_udev_made_it(node: Path) -> None:
    link = node.parent / "zvol/tank/v"
    made = threading.Timer(0.05, link.symlink_to, [node])
    made.start()
    assert devices.Devices(node.parent, link_timeout_s=60.0).wait_linked("tank/v", 60.0) == link
    made.join()


def test_device_whose_link_does_not_come_is_told_by_its_node(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = devices.Devices(node.parent, link_timeout_s=0.05)
    assert blind.wait_linked("tank/v", 60.0) == node
    blind = devices.Devices(node.parent, link_timeout_s=1e9)
    monkeypatch.setattr(devices, "UDEV_CONTROL", node / "absent")
    assert blind.wait_linked("tank/v", 1e9) == node


def test_link_is_waited_for_in_vain_only_once(node: Path) -> None:
    blind = devices.Devices(node.parent, link_timeout_s=0.05)
    blind.wait_linked("tank/v", 60.0)
    blind._link_timeout_s = 1e9
    assert blind.wait_linked("tank/v", 1e9) == node


def test_link_is_waited_for_in_vain_only_once_also_by_those_with_less_patience(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list waits for less time than a link may take: the time of all lists counts together."""
    blind, looks = devices.Devices(node.parent, link_timeout_s=0.05), list[Path]()

    def look(path: Path) -> devices.Seen | None:
        looks.append(path)
        return SEEN if path.resolve() == node else None

    def is_told_for_good() -> bool:
        looks.clear()
        assert blind.wait_linked("tank/v", 0.0, guid=11) == node  # who has no time at all is told what there is
        return looks == []

    monkeypatch.setattr(devices, "look", look)
    monkeypatch.setattr(devices, "number_of", lambda _: SEEN.number)
    assert not is_told_for_good()
    wait_until(is_told_for_good, "the end of waiting")


def test_confirmed_device_is_not_asked_again_until_another_stands_behind_the_link(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, asked = node.parent / "zvol/tank/v", list[Path]()
    link.symlink_to(node)
    numbers = {str(link): SEEN.number}

    def look(path: Path) -> devices.Seen:
        asked.append(path)
        return devices.Seen("tank/v", numbers[str(path)])

    monkeypatch.setattr(devices, "number_of", numbers.get)
    monkeypatch.setattr(devices, "look", look)
    known = devices.Devices(node.parent)
    for _ in range(3):
        assert known.wait_linked("tank/v", 60.0, guid=11) == link
    assert len(asked) == 1
    numbers[str(link)] = devices.Number(0xE600, 8)  # the number is used again: another node, another inode
    known.wait_linked("tank/v", 60.0, guid=11)
    assert len(asked) == 2
    known.wait_linked("tank/v", 60.0, guid=12)  # another volume of that name
    assert len(asked) == 3
    known.wait_linked("tank/v", 60.0)
    assert len(asked) == 4
    known.forget()  # a guid does not move with a name
    known.wait_linked("tank/v", 60.0, guid=12)
    assert len(asked) == 4


def test_number_is_of_a_block_device_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert devices.number_of(str(tmp_path / "file")) is None
    assert devices.number_of(str(tmp_path / "absent")) is None
    assert devices.number_of("/dev/null") is None


def test_renamed_volume_is_found_without_asking_those_that_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of volumes, asking each of their devices takes longer than anybody waits."""
    names, asked = {f"zd{16 * number}": f"tank/v{number}" for number in range(20)}, list[str]()
    for node in names:
        (tmp_path / node).touch()

    def look(path: Path) -> devices.Seen | None:
        if path.name not in names:
            return None
        asked.append(path.name)
        return devices.Seen(names[path.name], devices.Number(0xE600, path.stat().st_ino))

    monkeypatch.setattr(devices, "look", look)
    monkeypatch.setattr(devices, "UDEV_CONTROL", tmp_path / "absent")
    known = devices.Devices(tmp_path)
    for number in range(20):
        known.wait_linked(f"tank/v{number}", 60.0, guid=100 + number)
    names["zd16"] = "tank/renamed"
    known.forget()
    asked.clear()
    assert known.wait_linked("tank/renamed", 60.0, guid=101) == tmp_path / "zd16"
    assert asked == ["zd16"]
    assert known.wait("tank/v7", 60.0) == tmp_path / "zd112", "who does not know the guid is answered as well"
