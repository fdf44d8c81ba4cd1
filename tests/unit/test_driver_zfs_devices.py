"""Who holds a device, found in /proc; shown with a file in the device's place."""

from __future__ import annotations

import os
from pathlib import Path

from agent_image.drivers.zfs import devices


def test_own_process_is_found_as_holder_of_what_it_has_open() -> None:
    """Listing one's own descriptors opens one more, which is gone when it is looked at."""
    with Path("/dev/null").open("rb"):
        found = list(devices._processes({"/dev/null": "tank/v"}))
    assert any(text.startswith(f"process {os.getpid()} (") for volume, text in found if volume == "tank/v")


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
    assert not devices.is_passing("tank/v is open: process 12 (qemu-system-x86)")
