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


class Seen(NamedTuple):
    """What the kernel said of a device when it was asked."""

    volume: str
    number: Number


class Found(NamedTuple):
    """A path that led to a volume's device when it was asked. The text is for lists of thousands."""

    path: Path
    text: str
    number: Number

    def is_there(self) -> bool:
        """Whether the same device is behind it still: as long as a node lasts, its device is one volume."""
        return number_of(self.text) == self.number


def number_of(device: str) -> Number | None:
    """The number of a device behind a path; None if there is none."""
    try:
        found = os.stat(device)  # noqa: PTH116 - asked for each volume of a list
    except OSError:
        return None
    return Number(found.st_rdev, found.st_ino) if stat.S_ISBLK(found.st_mode) else None


def look(device: Path) -> Seen | None:
    """Ask a device node which volume it is; None if it is not one, or is gone."""
    buffer = bytearray(NAME_BUFFER_BYTES)
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        node = os.fstat(fd)
        if not stat.S_ISBLK(node.st_mode):
            return None
        fcntl.ioctl(fd, BLKZNAME, buffer)
    except OSError:
        return None
    finally:
        os.close(fd)
    return Seen(buffer.split(b"\0", 1)[0].decode("utf-8", "replace"), Number(node.st_rdev, node.st_ino))


def volume_of(device: Path) -> str | None:
    """The name of the volume behind a device node; None if it is not one, or is gone."""
    seen = look(device)
    return None if seen is None else seen.volume


class Node(NamedTuple):
    """One device node. The name alone is used again for another volume, with another inode."""

    name: str
    inode: int


Key = tuple[int, str]
"""The guid of a volume, 0 if the caller does not know it, and its name."""


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
        self._devices = device_directory
        self._links = link_directory or device_directory / "zvol"
        self._lock = threading.Lock()
        self._asked: dict[Node, str] = {}
        self._confirmed: dict[Key, Found] = {}
        """What was told of volumes, by guid and name: opening a device to ask costs much more than looking at its number."""
        self._links_due_s: dict[Key, float] = {}
        """Until when links are waited for, however many ask meanwhile: one that does not come must not delay every list."""

    def find(self, volume: str) -> Path | None:
        """The path of the volume's device: udev's link if it leads there, else the node itself; None if there is none."""
        found = self._find(volume)
        return None if found is None else found.path

    def _find(self, volume: str, guid: int = 0) -> Found | None:
        return self._find_link(volume) or self._search(volume, guid)

    def _find_link(self, volume: str) -> Found | None:
        link = self._links / volume
        seen = look(link)
        return Found(link, str(link), seen.number) if seen is not None and seen.volume == volume else None

    def _search(self, volume: str, guid: int) -> Found | None:
        with self._lock:
            nodes = self._nodes()
            likely = [node for node in nodes if self._asked.get(node) == volume]
            others = self._inodes_of_others(guid)
            unknown = [node for node in nodes if node not in self._asked and node.inode not in others]
            for node in likely + unknown:
                seen = self._ask(node)
                if seen is not None and seen.volume == volume:
                    path = self._devices / node.name
                    return Found(path, str(path), seen.number)
        return None

    def _inodes_of_others(self, guid: int) -> set[int]:
        """Nodes that were confirmed to be of volumes with another guid, which does not change whatever they are called by now."""
        return {found.number.inode for (of, _), found in self._confirmed.items() if of != guid} if guid else set()

    def _nodes(self) -> list[Node]:
        """Device nodes there are; forgets what was known of others, as their numbers are used again."""
        found = (
            Node(entry.name, entry.inode()) for entry in os.scandir(self._devices) if DEVICE_NAME.match(entry.name)
        )
        nodes = list(found)
        for gone in self._asked.keys() - set(nodes):
            del self._asked[gone]
        return nodes

    def _ask(self, node: Node) -> Seen | None:
        seen = look(self._devices / node.name)
        if seen is None:
            self._asked.pop(node, None)
        else:
            self._asked[node] = seen.volume
        return seen

    def forget(self) -> None:
        """Names moved (rename): ask again which node has which. What is confirmed is so by guid, which does not move."""
        with self._lock:
            self._asked.clear()

    def wait(self, volume: str, timeout_s: float, *, guid: int = 0) -> Path:
        """The path of the volume's device once it is there; UnavailableError after ``timeout_s``."""
        return self._wait(volume, timeout_s, guid).path

    def _wait(self, volume: str, timeout_s: float, guid: int) -> Found:
        deadline = time.monotonic() + timeout_s
        tick, pause_s = threading.Event(), POLL_FIRST_S
        while True:
            found = self._find(volume, guid)
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

        With the volume's ``guid``, what was told before and is still the same device is told again without asking.
        """
        key = guid, volume
        known = self._confirmed.get(key) if guid else None
        if known is not None and known.is_there():
            return known.path
        deadline = time.monotonic() + timeout_s
        found, is_last_word = self._wait(volume, timeout_s, guid), True
        if found.path != self._links / volume and UDEV_CONTROL.exists():
            is_last_word = self._wait_for_link(key, deadline)
            found = self._wait(volume, max(0.0, deadline - time.monotonic()), guid)
        if guid and is_last_word:
            self._confirm(key, found)
        return found.path

    def _wait_for_link(self, key: Key, deadline: float) -> bool:
        """Whether the link is there, or was waited for in vain for as long as links are; False if time ran out before."""
        with self._lock:
            if len(self._links_due_s) >= CONFIRMED_MAX:
                self._links_due_s.clear()
            due_s = self._links_due_s.setdefault(key, time.monotonic() + self._link_timeout_s)
        tick, pause_s = threading.Event(), POLL_FIRST_S
        while self._find_link(key[1]) is None:
            now_s = time.monotonic()
            if now_s >= min(due_s, deadline):
                return now_s >= due_s
            tick.wait(min(pause_s, min(due_s, deadline) - now_s))
            pause_s = min(pause_s * 2, POLL_MAX_S)
        return True

    def _confirm(self, key: Key, found: Found) -> None:
        with self._lock:
            if len(self._confirmed) >= CONFIRMED_MAX:
                self._confirmed.clear()
            self._confirmed[key] = found
            self._links_due_s.pop(key, None)

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
                target = os.readlink(f"{directory}/{fd}")  # noqa: PTH115
                if process != os.getpid() or not _only_looks(int(fd)):
                    yield target


def _only_looks(fd: int) -> bool:
    """Whether a descriptor of ours is one of :func:`look`, which is closed at once: who uses a volume's bytes opens it blocking."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)
