"""What the codec's inner loops run on: the C extension where it was built, numpy otherwise. Both give the same bytes.

MISTIFY_CODEC=numpy in the environment leaves the extension out: to compare, or to rule it out when something looks wrong.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any, Protocol, TypeAlias, cast

ENVIRONMENT = "MISTIFY_CODEC"
_MODULE = "imaging.sendstream.native"
_REVISION = 1
"""Of the functions in native.c; a checkout may still hold what was built from an older one."""
_State: TypeAlias = tuple[int, int, int, int]
_Buffer: TypeAlias = Any  # whatever has the buffer protocol, arrays too

log = logging.getLogger(__name__)


class Native(Protocol):
    """The extension's functions. They take any bytes, and ValueError tells of sizes and positions that do not fit.

    Positions are arrays of native 64-bit integers: ascending, inside the data, multiples of four.
    """

    def trace(self, state: _State, data: _Buffer, positions: _Buffer, /) -> tuple[_State, bytes]:
        """The Fletcher-4 state after ``data``, and 32 bytes for the state at each position."""

    def seal(self, state: _State, data: _Buffer, starts: _Buffer, /) -> _State:
        """Put checksums into the whole records that start there; the state after ``data``."""

    def seal_writes(self, state: _State, header: _Buffer, rows: _Buffer, block_bytes: int, /) -> tuple[_State, bytes]:
        """One WRITE for each block of ``rows``, the offset counting on from the header's; the state after them."""

    def zero_blocks(self, data: _Buffer, stride_bytes: int, skip_bytes: int, /) -> bytes:
        """A byte for each block, 1 if it is all zeros but for its first ``skip_bytes``."""

    def walk(self, state: _State, data: _Buffer, start: int, /) -> tuple[_State, int, list[tuple[int, int, int]]]:
        """Take whole WRITE and FREE records whose checksums hold: the state after them, where they end, and runs of like ones.

        A run is its start, how many records, and bytes from one to the next.
        """


def _load() -> Native | None:
    """The extension if it is to be used."""
    if os.environ.get(ENVIRONMENT, "") == "numpy":
        return None
    try:
        built = importlib.import_module(_MODULE)
    except ImportError as err:
        log.debug("the codec runs on numpy", extra={"reason": str(err)})
        return None
    if built.REVISION != _REVISION:
        log.warning("the codec runs on numpy: its extension was built from another source")
        return None
    return cast(Native, built)


native = _load()
"""The extension, or None; readers, writers and images look here when they are made."""


def name() -> str:
    """``c`` or ``numpy``."""
    return "numpy" if native is None else "c"
