"""Channel programs: small Lua programs ZFS runs over datasets by name, and what their answers mean.

They read what is asked of one dataset in a few milliseconds where the zfs program takes tens, and their answers are typed values, not
text to take apart. Reading a property that lives in the dataset itself (``type``, ``volsize``) opens its object set, which is most of
the cost; ``guid``, ``createtxg``, ``creation`` and user properties do not. The Lua there has no way to catch an error, so existence is
asked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo, Usage
from agent_image.drivers.zfs.lzc import GUID_MASK
from imaging.errors import InternalError
from imaging.names import DatasetName, SnapshotName

_LOOP = """
args = ...
out = {}
for _, name in ipairs(args["argv"]) do
  if zfs.exists(name) then
    out[name] = one(name)
  end
end
return out
"""

IDENTITY = (
    """
function one(name)
  return {guid = zfs.get_prop(name, "guid"), createtxg = zfs.get_prop(name, "createtxg"),
          creation = zfs.get_prop(name, "creation")}
end
"""
    + _LOOP
)
"""Cheap: what is new about an object we just made."""

_PROPERTIES = """
function properties(name, e)
  e["user"] = {}
  for key, value, source in zfs.list.user_properties(name) do
    if source == name or source == "$recvd" or source == "received" then e["user"][key] = value end
  end
  local value, source = zfs.get_prop(name, "readonly")
  if source == name or source == "$recvd" or source == "received" then e["readonly"] = value end
end
"""

PROPERTIES = (
    _PROPERTIES
    + """
function one(name)
  local e = {}
  properties(name, e)
  return e
end
"""
    + _LOOP
)
"""User properties and readonly, as far as they were set on the dataset itself."""

NATIVE_PROPERTIES = (
    """
function one(name)
  local e = {}
  for _, key in ipairs({"compression", "readonly", "refreservation"}) do
    local value, source = zfs.get_prop(name, key)
    if source == name or source == "$recvd" or source == "received" then e[key] = value end
  end
  return e
end
"""
    + _LOOP
)
"""What a package tells of a volume besides its user properties, as far as it was set on the volume itself."""

DESCRIBE = (
    _PROPERTIES
    + """
function one(name)
  local e = {}
  if zfs.get_prop(name, "inconsistent") == 1 then return nil end
  for _, key in ipairs({"type", "guid", "createtxg", "creation", "volsize"}) do e[key] = zfs.get_prop(name, key) end
  if e["type"] == "snapshot" then return e end
  e["origin"] = zfs.get_prop(name, "origin")
  e["volblocksize"] = zfs.get_prop(name, "volblocksize")
  properties(name, e)
  return e
end
"""
    + _LOOP
)
"""Everything the index keeps about a dataset or snapshot. One that is being received is not there yet, as for ``zfs list``."""

SNAPSHOTS = """
args = ...
out = {}
name = args["argv"][1]
if zfs.exists(name) then
  for snapshot in zfs.list.snapshots(name) do
    out[snapshot] = {guid = zfs.get_prop(snapshot, "guid"), createtxg = zfs.get_prop(snapshot, "createtxg"),
                     creation = zfs.get_prop(snapshot, "creation"), volsize = zfs.get_prop(snapshot, "volsize")}
  end
end
return out
"""
"""The snapshots of one dataset."""

USAGE = (
    """
function one(name)
  local e = {}
  for _, key in ipairs({"used", "referenced", "written", "available", "quota", "refreservation"}) do
    e[key] = zfs.get_prop(name, key)
  end
  return e
end
"""
    + _LOOP
)

USAGE_OF_SNAPSHOT = (
    """
function one(name)
  return {used = zfs.get_prop(name, "used"), referenced = zfs.get_prop(name, "referenced"),
          written = zfs.get_prop(name, "written")}
end
"""
    + _LOOP
)

WRITTEN = (
    """
function one(name)
  return {written = zfs.get_prop(name, "written")}
end
"""
    + _LOOP
)
"""What was written between a snapshot and the one before."""

READONLY = (
    """
function one(name)
  return {readonly = zfs.get_prop(name, "readonly")}
end
"""
    + _LOOP
)
"""Whether a dataset is read-only, by its own or an inherited property."""

SET_USER_PROPERTIES = """
args = ...
argv = args["argv"]
for i = 2, #argv, 3 do
  local result
  if argv[i] == "set" then
    result = zfs.sync.set_prop(argv[1], argv[i + 1], argv[i + 2])
  else
    result = zfs.sync.inherit(argv[1], argv[i + 1])
  end
  if result ~= 0 then return {failed = result} end
end
return {failed = 0}
"""
"""argv: the dataset, then triples of set|inherit, name, value; all in one transaction group."""


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _number(entry: Mapping[bytes, Any], key: bytes) -> int | None:
    value = entry.get(key)
    return value & GUID_MASK if isinstance(value, int) else None


def _required(entry: Mapping[bytes, Any], key: bytes, name: object) -> int:
    value = _number(entry, key)
    if value is None:
        raise InternalError(f"ZFS gives no {key.decode()} of {name}")
    return value


def properties_of(entry: Mapping[bytes, Any]) -> dict[str, str]:
    """User properties and ``readonly`` of an answer of PROPERTIES or DESCRIBE."""
    found = {_text(key): _text(value) for key, value in (entry.get(b"user") or {}).items()}
    if b"readonly" in entry:
        found["readonly"] = _text(entry[b"readonly"])
    return found


def dataset_of(name: DatasetName, entry: Mapping[bytes, Any]) -> DatasetInfo:
    """A dataset as DESCRIBE answered."""
    origin = entry.get(b"origin")
    return DatasetInfo(
        name=name,
        kind=DatasetKind.VOLUME if entry.get(b"type") == b"volume" else DatasetKind.FILESYSTEM,
        guid=_required(entry, b"guid", name),
        createtxg=_required(entry, b"createtxg", name),
        creation_s=_required(entry, b"creation", name),
        origin=SnapshotName.parse(_text(origin)) if origin else None,
        volsize_bytes=_number(entry, b"volsize"),
        volblocksize_bytes=_number(entry, b"volblocksize"),
        properties=properties_of(entry),
    )


def snapshot_of(name: SnapshotName, entry: Mapping[bytes, Any], volsize_bytes: int | None = None) -> SnapshotInfo:
    """A snapshot as DESCRIBE, SNAPSHOTS or (with the size we know) IDENTITY answered."""
    size = _number(entry, b"volsize")
    return SnapshotInfo(
        name=name,
        guid=_required(entry, b"guid", name),
        createtxg=_required(entry, b"createtxg", name),
        creation_s=_required(entry, b"creation", name),
        volsize_bytes=size or volsize_bytes,  # a filesystem's snapshot says 0
    )


def usage_of(name: object, entry: Mapping[bytes, Any]) -> Usage:
    """Sizes as USAGE or USAGE_OF_SNAPSHOT answered."""
    return Usage(
        used_bytes=_required(entry, b"used", name),
        referenced_bytes=_required(entry, b"referenced", name),
        written_bytes=_required(entry, b"written", name),
        available_bytes=_number(entry, b"available") or 0,
        quota_bytes=_number(entry, b"quota") or 0,
        refreservation_bytes=_number(entry, b"refreservation") or 0,
    )


def written_of(name: object, entry: Mapping[bytes, Any]) -> int:
    """The size WRITTEN answered."""
    return _required(entry, b"written", name)


@dataclass(frozen=True, slots=True)
class Identity:
    """What ZFS chose for a new object."""

    guid: int
    createtxg: int
    creation_s: int


@dataclass(frozen=True, slots=True)
class Described:
    """A dataset with all its snapshots, or the news that it is gone."""

    dataset: DatasetInfo | None
    snapshots: tuple[SnapshotInfo, ...] = field(default=())


def identity_of(name: object, entry: Mapping[bytes, Any]) -> Identity:
    """An answer of IDENTITY."""
    return Identity(
        _required(entry, b"guid", name), _required(entry, b"createtxg", name), _required(entry, b"creation", name)
    )
