"""What goes around the kernel's stream to make a package with properties, as ``zfs send -p`` does. Pure functions.

The kernel sends streams only; packages are the zfs program's. A stream's checksums begin anew at its BEGIN, so the kernel writes its
part itself and we write the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_image.drivers.base import DatasetInfo, SnapshotInfo
from imaging.sendstream.nvlist import NvList
from imaging.sendstream.package import PackagedDataset, package_head

_ON_OFF = {b"on": 1, b"off": 0}
_COMPRESSIONS = {b"on": 1, b"off": 2, b"lzjb": 3, b"gzip": 10, b"zle": 14, b"lz4": 15, b"zstd": 16} | {
    f"gzip-{level}".encode(): 4 + level for level in range(1, 10)
}
"""As numbers: a receiver's kernel aborts on the words. Levels of zstd are left out, they have no plain number."""


def head_of(
    sent: SnapshotInfo, dataset: DatasetInfo, native: Mapping[bytes, Any], *, base: str | None, origin_guid: int
) -> bytes:
    """The package's bytes before the stream. ``native``: an answer of NATIVE_PROPERTIES."""
    properties: NvList = {name: value for name, value in dataset.properties.items() if ":" in name}
    properties |= _native(native)
    described = PackagedDataset(
        name=str(dataset.name),
        origin_guid=origin_guid,
        properties=properties,
        snapshots={sent.name.snapshot: sent.guid},
    )
    fromsnap = base.partition("@")[2] if base is not None and "@" in base else None
    return package_head(str(sent.name), dataset.guid, described, fromsnap=fromsnap)


def _native(found: Mapping[bytes, Any]) -> NvList:
    values: NvList = {}
    readonly, compression = found.get(b"readonly"), found.get(b"compression")
    if readonly in _ON_OFF:
        values["readonly"] = _ON_OFF[readonly]
    if compression in _COMPRESSIONS:
        values["compression"] = _COMPRESSIONS[compression]
    reserved_bytes = found.get(b"refreservation")
    if isinstance(reserved_bytes, int) and reserved_bytes > 0:
        values["refreservation"] = reserved_bytes
    return values
