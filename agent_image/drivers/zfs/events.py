"""Pool events as ``zpool events -f -H -v`` prints them, and what they mean for the index. Pure functions.

Every change of names and properties is a *history event* that carries the dataset, what was done and the transaction group. A change of
``volsize`` alone leaves none; :mod:`watch` looks at the devices' sizes for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent_image.drivers.zfs.index import PoolIndex
from imaging.errors import InvalidNameError
from imaging.names import DatasetName, SnapshotName

_FIELD = re.compile(
    rb"^[ \t]+(class|history_dsname|history_internal_name|history_internal_str|history_txg|time) = (.*)$", re.MULTILINE
)
"""The others are not read: each change has some twenty lines, and taking them apart one by one would slow down the calls that make them."""
_DROPPED = re.compile(rb"^dropped ", re.MULTILINE)
_IGNORED = frozenset({"hold", "release", "bookmark", "remove bookmark", "user hold", "unlink"})
_NAMES_THAT_MOVE = frozenset({"rename", "promote"})
_PROPERTY_CHANGES = frozenset({"set", "inherit"})
_EVENT_MAX_BYTES = 1 << 20
"""An event has some hundred bytes and at most a user's property; what goes on without an empty line is none."""


@dataclass(frozen=True, slots=True)
class Event:
    """One pool event."""

    kind: str
    """The class: ``sysevent.fs.zfs.history_event``, ``sysevent.fs.zfs.pool_export``, ..."""
    dataset: str = ""
    action: str = ""
    detail: str = ""
    txg: int = 0
    time_s: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What has to be looked at again because of an event."""

    datasets: tuple[DatasetName, ...] = ()
    snapshots: tuple[SnapshotName, ...] = ()
    trees: tuple[DatasetName, ...] = ()
    moves: tuple[tuple[DatasetName, DatasetName], ...] = ()
    everything: bool = False


MISSED = Event("dropped")
"""What the kernel's own notice of lost events says."""
NOTHING = Look()
EVERYTHING = Look(everything=True)


def parse(pieces: Iterable[bytes]) -> Iterator[Event]:
    """Events from the program's output as it comes; an event ends with an empty line."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for text in whole:
            yield from _events(text)
        if len(rest) > _EVENT_MAX_BYTES:
            rest = b""
            yield MISSED


def _events(text: bytes) -> Iterator[Event]:
    """The event, and before it the notice of others that were lost."""
    if _DROPPED.search(text):
        yield MISSED
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text):  # the first counts: a user's property may have lines like these in it
        fields.setdefault(name.decode(), value.decode("utf-8", "surrogateescape"))
    if fields:
        yield _event(fields)


def _event(fields: dict[str, str]) -> Event:
    return Event(
        kind=_unquoted(fields.get("class", "")),
        dataset=_unquoted(fields.get("history_dsname", "")),
        action=_unquoted(fields.get("history_internal_name", "")),
        detail=_unquoted(fields.get("history_internal_str", "")),
        txg=_number(fields.get("history_txg", "")),
        time_s=_number(fields.get("time", "").split(" ")[0]),
    )


def _unquoted(text: str) -> str:
    return text.removeprefix('"').removesuffix('"')


def _number(text: str) -> int:
    return int(text, 16) if re.fullmatch(r"0x[0-9a-f]+", text) else 0


def look_for(event: Event, index: PoolIndex) -> Look:
    """What must be looked at; nothing if the index shows the event's outcome already, as after our own calls."""
    if event == MISSED:
        return EVERYTHING
    if not event.dataset or event.action in _IGNORED:
        return NOTHING
    name = _parse(event.dataset)
    if name is None:
        return NOTHING
    if isinstance(name, SnapshotName):
        return NOTHING if _is_known_snapshot(event, name, index) else Look(snapshots=(name,))
    if event.action in _NAMES_THAT_MOVE:
        return _look_for_move(event, name, index)
    return NOTHING if _is_known(event, name, index) else Look(datasets=(name,))


def _parse(text: str) -> DatasetName | SnapshotName | None:
    """The dataset; for ZFS's own ``x/%recv`` and ``x/%rollback`` the dataset they serve."""
    text = text.split("/%", 1)[0]
    try:
        return SnapshotName.parse(text) if "@" in text else DatasetName.parse(text)
    except InvalidNameError:
        return None


def _target(event: Event) -> DatasetName | None:
    if event.action != "rename":
        return None
    target = _parse(event.detail.removeprefix("-> "))
    return target if isinstance(target, DatasetName) else None


def _look_for_move(event: Event, name: DatasetName, index: PoolIndex) -> Look:
    if event.action == "promote":
        info = index.find(name)
        return NOTHING if info is not None and info.origin is None else EVERYTHING
    target = _target(event)
    if target is None:
        return Look(datasets=(name,))
    known = index.find(name) is None and index.find(target) is not None
    return NOTHING if known else Look(moves=((name, target),))


def _is_known_snapshot(event: Event, name: SnapshotName, index: PoolIndex) -> bool:
    info = index.find_snapshot(name)
    if event.action == "destroy":
        return info is None
    return info is not None and info.createtxg == event.txg


def _is_known(event: Event, name: DatasetName, index: PoolIndex) -> bool:
    info = index.find(name)
    if event.action == "destroy":
        return info is None
    if info is None:
        return False
    if info.guid == 0:  # we are receiving it
        return True
    if event.action in _PROPERTY_CHANGES:
        key, _, value = event.detail.partition("=")
        if key == "readonly":
            value = {"0": "off", "1": "on"}.get(value, value)
        elif ":" not in key:
            return True  # not in the index
        return info.properties.get(key) == (None if event.action == "inherit" else value)
    return info.createtxg == event.txg
