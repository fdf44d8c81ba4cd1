"""What a daemon asks of the system for itself, before it does anything."""

from __future__ import annotations

import ctypes
import logging
import resource

OPEN_FILES_MAX = 65536
"""Connections and files at once. Shells start programs with 1024, which a fleet that reconnects uses up."""

MMAP_THRESHOLD_BYTES = 4 << 20
"""Buffers of this size and more go back to the system when they are freed.

Left alone, the allocator raises this threshold as it goes, and every thread's arena keeps the buffers of its own peak. A lower one costs
more than it saves: pieces of 256 KiB to 1 MiB pass through by the thousand, and each would be mapped, filled with zeros by the
kernel and unmapped (measured: half of the processor time of an upload).
"""

TRIM_THRESHOLD_BYTES = 8 << 20
"""What an arena may keep at its end for the next such piece."""

ARENAS_MAX = 2
"""Parts of the heap; with the above they keep 16 MiB at most. Threads that allocate large pieces are few."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h

log = logging.getLogger(__name__)


def claim_resources() -> None:
    """Raise the limit on open files as far as allowed, and keep freed buffers from piling up. Never fails: it works without, too."""
    _raise_open_files()
    _return_freed_buffers()


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(OPEN_FILES_MAX, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as err:
        log.warning("can't raise the limit on open files", extra={"limit": soft, "cause": repr(err)})


def _return_freed_buffers() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    wanted = {
        _M_MMAP_THRESHOLD: MMAP_THRESHOLD_BYTES,
        _M_TRIM_THRESHOLD: TRIM_THRESHOLD_BYTES,
        _M_ARENA_MAX: ARENAS_MAX,
    }
    if mallopt is None or not all(mallopt(parameter, value) for parameter, value in wanted.items()):
        log.debug("this C library has no thresholds to set")
