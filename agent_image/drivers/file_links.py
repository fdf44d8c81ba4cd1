"""The tree of links from volume names to their files, as ``/dev/zvol`` is for real volumes.

A convenience of the present: the records say what is true, and :meth:`DeviceLinks.rebuild` makes the tree say the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from imaging import files
from imaging.names import DatasetName, PoolName


class DeviceLinks:
    """Keeps ``ROOT/pool/path/of/volume`` pointing at the volume's file, for one pool."""

    def __init__(self, root: Path, pool: PoolName) -> None:
        self._root = root
        self._pool_root = root / pool.text
        files.make_directory(self._pool_root)

    def path(self, name: DatasetName) -> Path:
        """Where the link of a volume is. Names are parsed again: a path must never come from an unchecked one."""
        return self._root / Path(*DatasetName.parse(str(name)).parts)

    def point(self, name: DatasetName, target: Path) -> Path:
        """Make the link of a volume point at its file, in one step; returns the link."""
        link = self.path(name)
        with files.os_errors(f"cannot link {link}"):
            if _target(link) == target:
                return link
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary = files.temporary_beside(link)
            temporary.symlink_to(target)
            temporary.replace(link)
        return link

    def drop(self, name: DatasetName) -> None:
        """Remove a link and the directories it leaves empty; absent is fine."""
        link = self.path(name)
        with suppress(OSError):  # the record is gone, so the link means nothing; the next rebuild removes it
            link.unlink(missing_ok=True)
            for above in link.parents:
                if above == self._pool_root:
                    return
                above.rmdir()

    def rebuild(self, wanted: Mapping[DatasetName, Path]) -> None:
        """Make the tree hold these links and no others."""
        keep = {self.path(name) for name in wanted}
        with files.os_errors(f"cannot clean {self._pool_root}"):
            for directory, subdirectories, names in os.walk(self._pool_root, topdown=False):
                for entry in (Path(directory, name) for name in (*names, *subdirectories)):
                    _remove_unless(entry, keep)
        for name, target in wanted.items():
            self.point(name, target)


def _target(link: Path) -> Path | None:
    try:
        return link.readlink()
    except FileNotFoundError:
        return None


def _remove_unless(entry: Path, keep: set[Path]) -> None:
    if entry.is_dir() and not entry.is_symlink():
        with suppress(OSError):  # not empty: something below is kept
            entry.rmdir()
    elif entry not in keep:
        entry.unlink()
