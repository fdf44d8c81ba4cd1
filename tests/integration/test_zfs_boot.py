"""A guest boots from a volume on a real pool: cloned from an image that came as qcow2 from the image service."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import pytest

from demo import guest, qemu
from rpc.client import AgentClient, ImageServiceClient
from rpc.messages import Disk, Guest, GuestRequest, ImageRequest
from tests.acceptance.daemons import start_agent, start_image_service
from tests.integration.zfs_pool import PROGRAM_TIMEOUT_S, lab_pool, run
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.backend("zfs"), pytest.mark.backend("qemu")]

BOOT_TIMEOUT_S = 120 * PATIENCE
"""In the lab the guest is emulated by an emulated machine, and says good-bye only when its second disk is written."""


def test_guest_boots_from_a_clone_of_an_image_pulled_as_qcow2(checkout: Path, tmp_path: Path) -> None:
    pool, raw, packed = lab_pool(), guest.ensure_image(checkout / ".cache"), tmp_path / "guest.qcow2"
    subprocess.run(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(packed)],
        check=True,
        timeout=PROGRAM_TIMEOUT_S,
    )
    word = f"word-{secrets.token_hex(6)}"
    with (
        start_image_service(tmp_path / "service") as service,
        start_agent(
            tmp_path / "agent", driver="zfs", zpool=str(pool), image_service=f"127.0.0.1:{service.port}"
        ) as agent,
        ImageServiceClient(service.url) as images,
        AgentClient(agent.url) as calls,
    ):
        with packed.open("rb") as file:
            record = images.upload_image(file, image_type="kvm", comment="as qcow2")
        assert record.format == "qcow2"
        (image,) = calls.request_image(ImageRequest(id=record.id)).images
        wanted = Guest(id="boots", disks=[Disk(image=record.id), Disk(size_mib=1)])
        disks = calls.create_guest_disks(GuestRequest(guest=wanted)).guest.disks
        assert run("zfs", "get", "-H", "-o", "value", "origin", disks[0].volume).strip() == image.snapshot
        guest.write_marker(Path(disks[0].source), word)
        booted = qemu.boot([Path(disk.source) for disk in disks], guest.FAREWELL, timeout_s=BOOT_TIMEOUT_S)
        assert f"{guest.GREETING} [{word}]" in booted.console
        assert guest.read_marker(Path(disks[1].source), 0) == word, "what the guest wrote onto its second disk"
        calls.delete_guests_disks(GuestRequest(guest=Guest(id="boots")))
        calls.delete_image(ImageRequest(id=record.id))
