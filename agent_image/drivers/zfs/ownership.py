"""One driver per pool: a lock that ends with the process, on /dev/zfs itself, at the pool's guid."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from imaging.errors import BusyError, UnsupportedError, from_os_error

ZFS_DEVICE = Path("/dev/zfs")
OFFSET_MASK = (1 << 62) - 1
"""Lock offsets are signed."""


def open_zfs_device() -> int:
    """A descriptor of /dev/zfs; UnsupportedError if the kernel has no ZFS."""
    try:
        return os.open(ZFS_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as err:
        raise UnsupportedError(f"this kernel has no ZFS: there is no {ZFS_DEVICE}") from err
    except OSError as err:
        raise from_os_error(err, f"cannot open {ZFS_DEVICE}") from err


def own(pool: str, pool_guid: int) -> int:
    """Lock the pool for this process; the lock lasts as long as the returned descriptor."""
    fd = open_zfs_device()
    request = struct.pack("=hhiqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, pool_guid & OFFSET_MASK, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as err:
        os.close(fd)
        if err.errno in {errno.EAGAIN, errno.EACCES}:
            raise BusyError(f"another process serves pool {pool}", [f"pool {pool}"]) from err
        raise from_os_error(err, f"cannot lock pool {pool}") from err
    return fd
