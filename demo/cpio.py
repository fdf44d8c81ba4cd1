"""An initramfs written by hand: the ``newc`` cpio format, which needs neither root nor the cpio program.

A device node (``/dev/console``) in an archive is only a header, so anybody may write one. Times are zero: the same files give
the same bytes.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

_MAGIC = "070701"
_ALIGN = 4


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)


@dataclass
class Initramfs:
    """Entries in the order they are added; parents must come before their children."""

    _parts: list[bytes] = field(default_factory=list)

    def directory(self, path: str) -> None:
        """Add a directory."""
        self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """Add a character device node."""
        self._entry(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def to_bytes(self) -> bytes:
        """Return the archive, closed by its trailer."""
        return b"".join([*self._parts, self._header("TRAILER!!!", 0, 0, (0, 0))])

    def _entry(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._parts += [self._header(path, mode, len(data), device), _padded(data)]

    def _header(self, path: str, mode: int, size_bytes: int, device: tuple[int, int]) -> bytes:
        name = path.encode() + b"\0"
        inode = len(self._parts) + 1
        numbers = (inode, mode, 0, 0, 1, 0, size_bytes, 0, 0, *device, len(name), 0)
        return _padded((_MAGIC + "".join(f"{number:08X}" for number in numbers)).encode() + name)
