"""The demo: an image becomes a guest's disk. Every step is a call that an operator or a hypervisor's software would make."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from demo import daemons, disks, guest, qemu
from demo.errors import DemoError
from demo.narrator import Narrator, mib, short
from rpc.client import AgentClient, ImageServiceClient
from rpc.messages import Disk, Guest, GuestRequest, ImageRequest, Message, SnapshotRequest

GUEST_ID = "demo-guest"
DISK = f"guests/{GUEST_ID}/disk-0"
EMPTY_DISK_MIB = 64
APPLY_TIMEOUT_S = 600.0
CACHE = Path(".cache")
T = TypeVar("T")
ANY_TEXT = r"[^\s\x00-\x1f][^\r\n]{3,}"


@dataclass
class Stage:
    """What the steps hand to each other."""

    narrator: Narrator
    directory: Path
    image: Path
    is_ours: bool
    """Our own guest has a marker sector; about a disk the caller gave we know nothing."""
    greeting: str
    token: str = field(default_factory=lambda: f"word-{secrets.token_hex(6)}")
    image_id: str = ""
    disks: list[Path] = field(default_factory=list)
    disk_digest: str = ""
    service: ImageServiceClient = field(init=False)
    agent: AgentClient = field(init=False)


def tell(narrator: Narrator, directory: Path, given: str | None, greeting: str | None) -> None:
    """Run the whole story in ``directory``; DemoError if anything is not as it should be."""
    stage = prepare(narrator, directory, given, greeting)
    with contextlib.ExitStack() as servers:
        start(stage, servers)
        act(stage)
        stop(stage, servers)


def act(stage: Stage) -> None:
    """Do everything with an image that a fleet does: between starting the daemons and stopping them."""
    upload(stage)
    pull(stage)
    create_disks(stage)
    if stage.is_ours:
        mark(stage)
    snapshot(stage)
    damage_and_roll_back(stage)
    download_and_apply(stage)
    boot(stage)
    delete(stage)


def prepare(narrator: Narrator, directory: Path, given: str | None = None, greeting: str | None = None) -> Stage:
    """Have an image: the one that was given, or one of our own making."""
    if given:
        with narrator.step("Take the image you gave", "Any raw disk or ZFS volume stream, compressed or not.") as say:
            image = Path(given)
            if not image.is_file():
                raise DemoError(f"IMAGE={given}: no such file")
            say(f"{image}, {mib(image.stat().st_size)}")
        return Stage(narrator, directory, image, is_ours=False, greeting=greeting or ANY_TEXT)
    why = "Debian's kernel, busybox and boot loader on a disk of our own making; kept in .cache/ for the next time."
    with narrator.step("Make a bootable disk", why) as say:
        image = guest.ensure_image(CACHE.resolve())
        say(f"{image.name}, {mib(image.stat().st_size)}")
    return Stage(narrator, directory, image, is_ours=True, greeting=greeting or guest.GREETING + r" \[.*?\]")


def start(stage: Stage, servers: contextlib.ExitStack) -> None:
    """Start both daemons; ``servers`` stops them."""
    why = "image-service is the central server; agent-image runs on every hypervisor. Here: one machine, no ZFS, a temporary directory."
    with stage.narrator.step("Start both daemons", why) as say:
        place = stage.directory
        service = servers.enter_context(daemons.image_service(place / "image-service", log=place / "image-service.log"))
        agent = servers.enter_context(daemons.agent(place / "agent", service.port, log=place / "agent.log"))
        stage.service = servers.enter_context(ImageServiceClient(service.url))
        stage.agent = servers.enter_context(AgentClient(agent.url))
        say(f"image-service on {service.url}, agent-image on {agent.url}")


def upload(stage: Stage) -> None:
    """Put the image into the image service."""
    why = "An operator's PUT /images. The service shows the image only when it is whole, verified and on disk."
    with stage.narrator.step("Upload the image", why) as say:
        with stage.image.open("rb") as file:
            record = stage.service.upload_image(file, image_type="kvm", comment="the demo's image")
        expect(record.status == "complete", f"the upload ended as {record.status}")
        stage.image_id = record.id
        say(f"image {record.id}: {mib(record.size_bytes)}, {short(record.digest)}")


def pull(stage: Stage) -> None:
    """Have the agent fetch the image."""
    why = "RequestImage on the hypervisor: download, check the digest, receive as a volume with a snapshot. Asked again, it is there."
    with stage.narrator.step("The agent pulls it", why) as say:
        image = only(stage.agent.request_image(ImageRequest(id=stage.image_id)).images)
        say(f"volume {image.volume}, snapshot {image.snapshot}, {image.size_mib} MiB, {image.status}")
        again = only(stage.agent.request_image(ImageRequest(id=stage.image_id)).images)
        expect(again.snapshot == image.snapshot, "the second request gave another snapshot")


def create_disks(stage: Stage) -> None:
    """Verify and create a guest's disks: one from the image, one empty."""
    wanted = Guest(id=GUEST_ID, disks=[Disk(image=stage.image_id), Disk(size_mib=EMPTY_DISK_MIB)])
    why = "VerifyDisks says whether a guest's disks would fit, and fills in their sizes. Nothing is created yet."
    with stage.narrator.step("Verify the guest's disks", why) as say:
        verified = stage.agent.verify_disks(GuestRequest(guest=wanted)).guest
        say(" + ".join(f"{disk.size_mib} MiB" for disk in verified.disks))
    why = "CreateGuestDisks: a clone of the image, which costs no space until it is written to, and an empty volume."
    with stage.narrator.step("Create the guest's disks", why) as say:
        created = stage.agent.create_guest_disks(GuestRequest(guest=wanted)).guest
        for disk in created.disks:
            say(f"{disk.volume}: {disk.size_mib} MiB at {_shown(stage, disk.source)}")
        stage.disks = [Path(disk.source) for disk in created.disks]


def mark(stage: Stage) -> None:
    """Write a random word onto the disk, that the guest will read aloud."""
    why = "The guest prints this sector when it boots. If it says this word, it has read this disk and no other."
    with stage.narrator.step("Write a random word onto the disk", why) as say:
        guest.write_marker(stage.disks[0], stage.token)
        say(f"{stage.token!r} in sector {guest.MARKER_LBA}")


def snapshot(stage: Stage) -> None:
    """Freeze the disk as it is now."""
    why = "CreateSnapshot: whatever happens to the disk from here on, this state can be had back."
    with stage.narrator.step("Snapshot the disk", why) as say:
        stage.disk_digest = disks.sha256_of(stage.disks[0])
        made = only(stage.agent.create_snapshot(SnapshotRequest(id=DISK, dest="before")).snapshots)
        say(f"{made.id}, the disk's digest is {short(stage.disk_digest)}")


def damage_and_roll_back(stage: Stage) -> None:
    """Spoil the disk and get the snapshot back."""
    disk = stage.disks[0]
    with stage.narrator.step(
        "Damage the disk", "A guest gone wild: its boot sector is overwritten. It could not boot now."
    ) as say:
        disks.spoil(disk)
        damaged = disks.sha256_of(disk)
        expect(damaged != stage.disk_digest, "writing to the disk changed nothing")
        say(f"the disk's digest is {short(damaged)}")
    with stage.narrator.step("Roll back", "RollbackSnapshot: the disk is again what it was, byte for byte.") as say:
        stage.agent.rollback_snapshot(SnapshotRequest(id=f"{DISK}@before"))
        restored = disks.sha256_of(disk)
        expect(restored == stage.disk_digest, f"after the rollback the digest is {restored}, not {stage.disk_digest}")
        say(f"the disk's digest is {short(restored)}, as before")


def download_and_apply(stage: Stage) -> None:
    """Take the snapshot out as a ZFS send stream, make a disk of it elsewhere, compare."""
    stream = stage.directory / "disk.zfs"
    why = "/snapshots/download sends what 'zfs send' would: any machine with ZFS can receive it. It is a backup and a transport."
    with stage.narrator.step("Download the snapshot as a stream", why) as say:
        with stream.open("wb") as file, stage.agent.download_snapshot(f"{DISK}@before") as pieces:
            file.writelines(pieces)
        say(f"{mib(stream.stat().st_size)}, for a disk of {mib(disks.size_bytes_of(stage.disks[0]))}")
    why = "'mistify-image stream apply' checks every record of the stream and writes the disk it describes. No ZFS needed."
    with stage.narrator.step("Make a disk from the stream and compare", why) as say:
        applied = _apply(stream, stage.directory / "copy.raw")
        expect(applied == stage.disk_digest, f"the copy's digest is {applied}, the disk's {stage.disk_digest}")
        say(f"the copy's digest is {short(applied)}, the disk's the same")


def _apply(stream: Path, copy: Path) -> str:
    program = Path(sys.executable).with_name("mistify-image")
    command = [str(program), "stream", "apply", str(stream), str(copy), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=APPLY_TIMEOUT_S, check=False)  # noqa: S603
    expect(ended.returncode == 0, f"mistify-image stream apply: {ended.stderr.strip()}")
    told = str(json.loads(ended.stdout)["sha256"]).removeprefix("sha256:")
    expect(told == disks.sha256_of(copy), "mistify-image tells another digest than its file has")
    return told


def boot(stage: Stage) -> None:
    """Boot a guest from its disks and listen."""
    why = "qemu opens the paths the agent handed out, as a hypervisor would. We wait for words on the guest's serial console."
    with stage.narrator.step("Boot the guest", why) as say:
        booted = qemu.boot(stage.disks, stage.greeting, say=say)
        say(f"after {booted.seconds:.1f} s under {booted.accelerator} the guest says: {booted.matched.strip()}")
        if stage.is_ours:
            expect(stage.token in booted.matched, f"the guest read another word than {stage.token}")
            written = guest.read_marker(stage.disks[1], 0)
            expect(written == stage.token, f"the second disk says {written!r}")
            say("and it wrote the same word onto its second disk, where we found it")


def delete(stage: Stage) -> None:
    """Delete everything, on both sides."""
    why = "DeleteGuestsDisks and DeleteImage on the hypervisor, DELETE on the server. Both then have nothing."
    with stage.narrator.step("Delete everything", why) as say:
        stage.agent.delete_guests_disks(GuestRequest(guest=Guest(id=GUEST_ID)))
        expect(not any(disk.exists() for disk in stage.disks), "a deleted disk is still there")
        stage.agent.delete_image(ImageRequest(id=stage.image_id))
        stage.service.delete_image(stage.image_id)
        left: list[Message] = [*stage.agent.list_volumes().volumes, *stage.agent.list_snapshots().snapshots]
        left += [*stage.agent.list_images().images, *stage.service.list_images()]
        expect(not left, f"something is left: {left}")
        say("no volumes, no snapshots, no images")


def stop(stage: Stage, servers: contextlib.ExitStack) -> None:
    """Stop both daemons, as a service manager would."""
    why = "SIGTERM: each finishes its requests, parks what is unfinished, and ends within ten seconds."
    with stage.narrator.step("Stop both daemons", why) as say:
        servers.close()
        say(f"both have ended, with status 0; {stage.directory} will be removed")


def expect(condition: object, otherwise: str) -> None:
    """DemoError with the sentence ``otherwise`` unless the condition holds."""
    if not condition:
        raise DemoError(otherwise)


def only(answer: Sequence[T]) -> T:
    """Return the one thing an answer holds; DemoError if it holds another number."""
    expect(len(answer) == 1, f"the answer holds {len(answer)} things instead of one: {answer}")
    return answer[0]


def _shown(stage: Stage, path: str) -> str:
    return path.replace(str(stage.directory), "…")
