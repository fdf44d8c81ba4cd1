"""A thread with descriptors of its own.

Threads share one table of descriptors, which goes with the last of them. A thread that waits in the kernel for a pipe whose other end is in
that table waits for itself: when the process is killed, the end that would wake it stays open as long as it sleeps.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from pathlib import Path

from imaging.errors import from_os_error

CLONE_FILES = 0x400
"""linux/sched.h"""
OWN = Path("/proc/thread-self/fd")
STANDARD = frozenset({0, 1, 2})

_libc = ctypes.CDLL(None, use_errno=True)


def open_on(target: Path) -> frozenset[int]:
    """The calling thread's descriptors of a file."""
    return frozenset(fd for fd in _numbers() if _target(fd) == str(target))


def keep_only(kept: Collection[int]) -> None:
    """Give the calling thread a table of its own with these descriptors and the standard ones alone. Others' stay as they are."""
    if _libc.unshare(CLONE_FILES) != 0:
        number = ctypes.get_errno()
        raise from_os_error(OSError(number, os.strerror(number)), "cannot give a thread descriptors of its own")
    for fd in sorted(_numbers() - STANDARD - set(kept)):
        try:
            os.close(fd)
        except OSError:  # the one the list was read with
            continue


def _numbers() -> set[int]:
    return {int(entry.name) for entry in OWN.iterdir()}


def _target(fd: int) -> str:
    try:
        return str((OWN / str(fd)).readlink())
    except OSError:  # closed meanwhile
        return ""
