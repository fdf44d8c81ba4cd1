"""Block devices of volumes: which device is which volume, and who holds it.

udev's links below /dev/zvol come late, sometimes wrongly and, where udev is missing, never. So a link is only a hint: the kernel is asked
what a device is (the BLKZNAME ioctl answers with the volume's name), and if no link leads there, /dev/zd* are asked one by one. Asking
opens the device for a moment, so each is asked once and remembered by its device number; what is handed out is always asked again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from imaging.errors import UnavailableError

BLKZNAME = 0x8100127D
"""_IOR(0x12, 125, char[256]): the name of the volume behind a device."""
BLKFLSBUF = 0x1261
NAME_BUFFER_BYTES = 256
LINK_TIMEOUT_S = 5.0
"""udev's link comes 35-400 ms after the device where nothing else happens; its name is the better answer, as numbers are used again."""
UDEV_CONTROL = Path("/run/udev/control")
"""There while udev runs."""
CONFIRMED_MAX = 50_000
"""Some 10 MiB, and more volumes than a pool has."""
POLL_FIRST_S = 0.01
POLL_MAX_S = 0.25
DEVICE_NAME = re.compile(r"zd\d+\Z")
PARTITION = re.compile(r"p\d+\Z")
SYS_BLOCK = Path("/sys/block")
UDEV_COMMANDS = frozenset(
    {"systemd-udevd", "(udev-worker)", "(spawn)", "udevd", "blkid", "zvol_id", "udevadm", "multipathd"}
)
"""Programs that look at each new device for a moment; waiting for them ends. (spawn) is a child of udev on its way to become one."""


class Number(NamedTuple):
    """What tells one device from another, for as long as it is there: its number, and the inode of its node."""

    device: int
    inode: int


class Confirmed(NamedTuple):
    """A link that led to a volume's device when it was asked. The text is for lists of thousands."""

    link: Path
    text: str
    number: Number


def number_of(device: Path | str) -> Number | None:
    """The number of a device behind a path; None if there is none."""
    try:
        found = os.stat(device)  # noqa: PTH116 - asked for each volume of a list
    except OSError:
        return None
    return Number(found.st_rdev, found.st_ino) if stat.S_ISBLK(found.st_mode) else None


def volume_of(device: Path) -> str | None:
    """The name of the volume behind a device node; None if it is not one, or is gone."""
    buffer = bytearray(NAME_BUFFER_BYTES)
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            return None
        fcntl.ioctl(fd, BLKZNAME, buffer)
    except OSError:
        return None
    finally:
        os.close(fd)
    return buffer.split(b"\0", 1)[0].decode("utf-8", "replace")


class Node(NamedTuple):
    """One device node. The name alone is used again for another volume, with another inode."""

    name: str
    inode: int


class Devices:
    """Finds devices of volumes by name."""

    def __init__(
        self,
        device_directory: Path = Path("/dev"),
        *,
        link_directory: Path | None = None,
        link_timeout_s: float = LINK_TIMEOUT_S,
    ) -> None:
        self._link_timeout_s = link_timeout_s
        self._linkless: set[str] = set()
        """Volumes whose links were waited for in vain once."""
        self._devices = device_directory
        self._links = link_directory or device_directory / "zvol"
        self._lock = threading.Lock()
        self._asked: dict[Node, str] = {}
        self._confirmed: dict[tuple[int, str], Confirmed] = {}
        """Devices behind links of volumes, by guid and name: opening a device to ask costs much more than looking at its number."""

    def find(self, volume: str) -> Path | None:
        """The path of the volume's device: udev's link if it leads there, else the node itself; None if there is none."""
        link = self._links / volume
        if volume_of(link) == volume:
            return link
        return self._search(volume)

    def _search(self, volume: str) -> Path | None:
        with self._lock:
            nodes = self._nodes()
            likely = [node for node in nodes if self._asked.get(node) == volume]
            unknown = [node for node in nodes if node not in self._asked]
            for node in likely + unknown:
                if self._ask(node) == volume:
                    return self._devices / node.name
        return None

    def _nodes(self) -> list[Node]:
        """Device nodes there are; forgets what was known of others, as their numbers are used again."""
        found = (
            Node(entry.name, entry.inode()) for entry in os.scandir(self._devices) if DEVICE_NAME.match(entry.name)
        )
        nodes = list(found)
        for gone in self._asked.keys() - set(nodes):
            del self._asked[gone]
        return nodes

    def _ask(self, node: Node) -> str | None:
        name = volume_of(self._devices / node.name)
        if name is None:
            self._asked.pop(node, None)
        else:
            self._asked[node] = name
        return name

    def forget(self) -> None:
        """Names moved (rename): ask again."""
        with self._lock:
            self._asked.clear()
            self._linkless.clear()
            self._confirmed.clear()

    def wait(self, volume: str, timeout_s: float) -> Path:
        """The path of the volume's device once it is there; UnavailableError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        tick, pause_s = threading.Event(), POLL_FIRST_S
        while True:
            found = self.find(volume)
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                raise UnavailableError(f"the device of {volume} did not appear within {timeout_s:g} s")
            if pause_s >= POLL_MAX_S:
                self.forget()  # a name seen before its rename came through would hide the volume
            tick.wait(pause_s)
            pause_s = min(pause_s * 2, POLL_MAX_S)

    def wait_linked(self, volume: str, timeout_s: float, *, guid: int = 0) -> Path:
        """The same, and while udev runs by its link, so that all who ask are told one path; the node if the link does not come.

        With the volume's ``guid``, a link that still leads to the device that was asked before is not asked again: as long as the
        node lasts, its device is this volume.
        """
        known = self._confirmed.get((guid, volume)) if guid else None
        if known is not None and number_of(known.text) == known.number:
            return known.link
        link = self._links / volume
        before = number_of(link)
        path = self._wait_linked(volume, timeout_s)
        if guid and path == link and before is not None and number_of(link) == before:  # the same when it was asked
            with self._lock:
                if len(self._confirmed) >= CONFIRMED_MAX:
                    self._confirmed.clear()
                self._confirmed[guid, volume] = Confirmed(link, str(link), before)
        return path

    def _wait_linked(self, volume: str, timeout_s: float) -> Path:
        deadline = time.monotonic() + timeout_s
        found, link = self.wait(volume, timeout_s), self._links / volume
        if found == link or volume in self._linkless or not UDEV_CONTROL.exists():
            return found
        link_deadline = min(deadline, time.monotonic() + self._link_timeout_s)
        tick, pause_s = threading.Event(), POLL_FIRST_S
        while time.monotonic() < link_deadline:
            tick.wait(pause_s)
            pause_s = min(pause_s * 2, POLL_MAX_S)
            if volume_of(link) == volume:
                return link
        if link_deadline < deadline:
            with self._lock:
                self._linkless.add(volume)
        return self.wait(volume, max(0.0, deadline - time.monotonic()))

    def flush(self, volume: str) -> None:
        """Write what the block layer still has of the volume and forget it: its contents are about to change, or just did."""
        device = self.find(volume)
        if device is not None:
            with contextlib.suppress(OSError):  # gone meanwhile
                fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, BLKFLSBUF, 0)
                finally:
                    os.close(fd)

    def holders(self, volumes: Iterable[str]) -> list[str]:
        """Who has the volumes' devices open, as text: processes, mounts, devices stacked on them. Best effort, one look for all."""
        found = ((volume, self.find(volume)) for volume in volumes)
        nodes = {str(path.resolve()): volume for volume, path in found if path is not None}
        if not nodes:
            return []
        holders = [*_stacked(nodes), *_mounts(nodes), *_processes(nodes)]
        return [f"{volume} is open: {holder}" for volume, holder in holders]


def is_passing(holder: str) -> bool:
    """Whether the holder is a program that looks at new devices and lets go by itself."""
    return any(f"({command})" in holder for command in UDEV_COMMANDS)


def _volume_behind(path: str, nodes: Mapping[str, str]) -> str | None:
    """The volume of a device or of one of its partitions."""
    return nodes.get(path) or nodes.get(PARTITION.sub("", path))


def _stacked(nodes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for node, volume in nodes.items():
        block = SYS_BLOCK / Path(node).name
        for place in (block / "holders", *block.glob("zd*p*/holders")):
            if place.is_dir():
                yield from ((volume, f"device /dev/{entry.name}") for entry in sorted(place.iterdir()))


def _mounts(nodes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, place = line.split(" ")[:2]
        volume = _volume_behind(os.path.realpath(source), nodes) if source.startswith("/dev/") else None
        if volume is not None:
            yield volume, f"mount {place}"


def _processes(nodes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Processes end while we look, and some are not ours to see: those are left out."""
    for process in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # noqa: PTH208 - see below
        targets = {target for target in _open_files(process) if target.startswith("/dev/")}
        held = {_volume_behind(target, nodes) for target in targets} - {None}
        if held:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{process}/comm").read_text().strip()
                yield from ((str(volume), f"process {process} ({name})") for volume in held)


def _open_files(process: int) -> Iterator[str]:
    """Hundreds of processes with dozens of files: pathlib would cost four times as much."""
    directory = f"/proc/{process}/fd"
    with contextlib.suppress(OSError):
        for fd in os.listdir(directory):  # noqa: PTH208
            with contextlib.suppress(OSError):  # closed meanwhile, like the listing's own descriptor
                yield os.readlink(f"{directory}/{fd}")  # noqa: PTH115
