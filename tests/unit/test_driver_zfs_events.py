"""Pool events: taken apart, and what has to be looked at because of them."""

from __future__ import annotations

import pytest

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.zfs.events import EVERYTHING, MISSED, NOTHING, Event, Look, look_for, parse
from agent_image.drivers.zfs.index import PoolIndex
from imaging.names import DatasetName, SnapshotName

PRINTED = b"""Nov 21 2026 01:56:54.368783122\tsysevent.fs.zfs.history_event
        version = 0x0
        class = "sysevent.fs.zfs.history_event"
        pool = "tank"
        pool_guid = 0x1f0bea494fa496f6
        history_dsname = "tank/fs/c"
        history_internal_str = "mistify:id=clone"
        history_internal_name = "set"
        history_dsid = 0x91
        history_txg = 0x15
        time = 0x6b00fa66 0x15fb2f12
        eid = 0x35

Nov 21 2026 01:56:55.0\tsysevent.fs.zfs.pool_export
        class = "sysevent.fs.zfs.pool_export"
        time = 0x6b00fa67 0x0
        eid = 0x36

dropped 12 events
Nov 21 2026 01:56:56.0\tsysevent.fs.zfs.pool_import
        class = "sysevent.fs.zfs.pool_import"
        time = 0x6b00fa68 0x0

Nov 21 2026 01:56:57.0\tsysevent.fs.zfs.half_of_it
        class = "sysevent.fs"""
EVENTS = [
    Event("sysevent.fs.zfs.history_event", "tank/fs/c", "set", "mistify:id=clone", 0x15, 0x6B00FA66),
    Event("sysevent.fs.zfs.pool_export", time_s=0x6B00FA67),
    MISSED,
    Event("sysevent.fs.zfs.pool_import", time_s=0x6B00FA68),
]


@pytest.mark.parametrize("size", [1, 7, 100, len(PRINTED)])
def test_printed_events_are_taken_apart_however_they_arrive(size: int) -> None:
    assert list(parse(PRINTED[start : start + size] for start in range(0, len(PRINTED), size))) == EVENTS


def test_output_that_is_no_event_is_not_kept_for_ever() -> None:
    assert list(parse([b"x" * 700_000, b"y" * 700_000, b"\n\n", PRINTED])) == [MISSED, *EVENTS]


def test_value_with_line_ends_does_not_become_another_event_field() -> None:
    lines = [
        b'        history_dsname = "tank/v"\n',
        b'        history_internal_str = "a:b=x\n',
        b'        history_dsname = "tank/w""\n',
    ]
    (event,) = parse([*lines, b"\n"])
    assert event.dataset == "tank/v"


@pytest.fixture
def index() -> PoolIndex:
    index = PoolIndex()
    for name, origin in (("tank", None), ("tank/v", None), ("tank/c", "tank/v@s")):
        source = None if origin is None else SnapshotName.parse(origin)
        properties = {"a:b": "1", "readonly": "on"}
        index.put(DatasetInfo(DatasetName.parse(name), DatasetKind.VOLUME, 1, 10, 1, source, properties=properties))
    index.put(DatasetInfo(DatasetName.parse("tank/.mistify-receive-0123456789abcdef"), DatasetKind.VOLUME, 0, 0, 0))
    index.put_snapshots([SnapshotInfo(SnapshotName.parse("tank/v@s"), 1, 20, 1)])
    return index


def event(dataset: str, action: str, detail: str = "", txg: int = 0) -> Event:
    return Event("sysevent.fs.zfs.history_event", dataset, action, detail, txg, 1)


@pytest.mark.parametrize(
    "own",
    [
        event("tank/v", "create", txg=10),
        event("tank/v", "set", "a:b=1"),
        event("tank/v", "set", "readonly=1"),
        event("tank/v", "set", "refreservation=99"),
        event("tank/v", "inherit", "x:y=1"),
        event("tank/v@s", "snapshot", txg=20),
        event("tank/gone", "destroy"),
        event("tank/v@gone", "destroy"),
        event("tank/gone", "rename", "-> tank/v"),
        event("tank/v", "promote"),
        event("tank/v@s", "hold", "tag=x"),
        event("tank/v", "bookmark", "name=b"),
        event("tank/.mistify-receive-0123456789abcdef", "receive", txg=30),
        event("tank/.mistify-receive-0123456789abcdef", "set", "a:b=1"),
        event("tank/.mistify-view-0123456789abcdef", "destroy"),
        event("", "set", "feature@x=enabled"),
        event("tank/$ORIGIN", "create"),
        event("tank/with space", "create"),
    ],
)
def test_event_of_what_the_index_shows_already_needs_no_look(index: PoolIndex, own: Event) -> None:
    assert look_for(own, index) == NOTHING


def names(*texts: str) -> tuple[DatasetName, ...]:
    return tuple(DatasetName.parse(text) for text in texts)


MOVE = (DatasetName.parse("tank/v"), DatasetName.parse("tank/w"))


@pytest.mark.parametrize(
    ("foreign", "look"),
    [
        (event("tank/new", "create", txg=30), Look(datasets=names("tank/new"))),
        (event("tank/v", "create", txg=30), Look(datasets=names("tank/v"))),
        (event("tank/v", "set", "a:b=2"), Look(datasets=names("tank/v"))),
        (event("tank/v", "inherit", "a:b="), Look(datasets=names("tank/v"))),
        (event("tank/v", "destroy"), Look(datasets=names("tank/v"))),
        (event("tank/v/%rollback", "clone swap", "parent=v"), Look(datasets=names("tank/v"))),
        (event("tank/v@new", "snapshot", txg=30), Look(snapshots=(SnapshotName.parse("tank/v@new"),))),
        (event("tank/v@s", "destroy"), Look(snapshots=(SnapshotName.parse("tank/v@s"),))),
        (event("tank/v", "rename", "-> tank/w"), Look(moves=(MOVE,))),
        (
            event("tank/.mistify-view-0123456789abcdef", "create"),
            Look(datasets=names("tank/.mistify-view-0123456789abcdef")),
        ),
        (event("tank/c", "promote"), EVERYTHING),
        (Event("dropped"), EVERYTHING),
    ],
)
def test_event_of_somebody_else_says_what_to_look_at(index: PoolIndex, foreign: Event, look: Look) -> None:
    assert look_for(foreign, index) == look
