"""What a daemon asks of the system for itself, before it does anything."""

from __future__ import annotations

import ctypes
import logging
import resource

OPEN_FILES_MAX = 65536
"""Connections and files at once. Shells start programs with 1024, which a fleet that reconnects uses up."""

MMAP_THRESHOLD_BYTES = 128 << 10
"""Buffers of this size and more go back to the system when they are freed.

Left alone, the allocator raises this threshold as it goes, and every thread's arena keeps the buffers of its own peak.
"""

_M_MMAP_THRESHOLD = -3  # malloc.h

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
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES):
        log.debug("this C library has no threshold to set")
