"""The index of the pool: answers, changes, and looks at ZFS that come late."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.zfs.index import PoolIndex
from agent_image.drivers.zfs.written import Span
from imaging.names import DatasetName, SnapshotName

ROOT = DatasetName.parse("tank")


def dataset(
    name: str, *, origin: str | None = None, guid: int = 1, kind: DatasetKind = DatasetKind.VOLUME
) -> DatasetInfo:
    source = None if origin is None else SnapshotName.parse(origin)
    return DatasetInfo(DatasetName.parse(name), kind, guid, 1, 1, source)


def snapshot(name: str, *, txg: int = 1) -> SnapshotInfo:
    return SnapshotInfo(SnapshotName.parse(name), txg, txg, txg)


@pytest.fixture
def index() -> PoolIndex:
    index = PoolIndex()
    for name in ("tank", "tank/b", "tank/a", "tank/a-1", "tank/a/x"):
        index.put(dataset(name, kind=DatasetKind.FILESYSTEM if name in {"tank", "tank/a"} else DatasetKind.VOLUME))
    index.put_snapshots([snapshot("tank/a/x@late", txg=9), snapshot("tank/a/x@early", txg=3)])
    index.put(dataset("tank/c", origin="tank/a/x@early"))
    return index


def listed(index: PoolIndex, root: str = "tank") -> list[str]:
    return [str(info.name) for info in index.datasets(DatasetName.parse(root))]


def test_datasets_are_listed_by_component(index: PoolIndex) -> None:
    assert listed(index) == ["tank", "tank/a", "tank/a/x", "tank/a-1", "tank/b", "tank/c"]
    assert listed(index, "tank/a") == ["tank/a", "tank/a/x"]
    assert [info.kind for info in index.datasets(ROOT, DatasetKind.FILESYSTEM)] == [DatasetKind.FILESYSTEM] * 2


def test_snapshots_are_listed_by_age(index: PoolIndex) -> None:
    assert [info.name.snapshot for info in index.snapshots(DatasetName.parse("tank/a/x"))] == ["early", "late"]


def test_rename_moves_what_is_below_and_origins_follow(index: PoolIndex) -> None:
    index.rename(DatasetName.parse("tank/a"), DatasetName.parse("tank/n"))
    assert listed(index) == ["tank", "tank/a-1", "tank/b", "tank/c", "tank/n", "tank/n/x"]
    moved = SnapshotName.parse("tank/n/x@early")
    assert index.find_snapshot(moved) == replace(snapshot("tank/n/x@early", txg=3))
    clone = index.find(DatasetName.parse("tank/c"))
    assert clone is not None
    assert clone.origin == moved
    assert index.clones(moved) == [DatasetName.parse("tank/c")]


def test_remove_takes_everything_below_and_the_link_to_the_origin(index: PoolIndex) -> None:
    index.remove(DatasetName.parse("tank/c"))
    assert index.clones(SnapshotName.parse("tank/a/x@early")) == []
    index.remove(DatasetName.parse("tank/a"))
    assert listed(index) == ["tank", "tank/a-1", "tank/b"]
    assert index.snapshots(DatasetName.parse("tank/a/x")) == []


def test_look_that_began_before_our_change_does_not_undo_it(index: PoolIndex) -> None:
    name = DatasetName.parse("tank/b")
    with index.reading() as reading:
        index.put(dataset("tank/b", guid=77))
        index.apply(reading, name, dataset("tank/b", guid=5))
        index.remove_snapshots([SnapshotName.parse("tank/a/x@late")])
        index.apply_snapshot(reading, SnapshotName.parse("tank/a/x@late"), snapshot("tank/a/x@late", txg=9))
    found = index.find(name)
    assert found is not None
    assert found.guid == 77
    assert index.find_snapshot(SnapshotName.parse("tank/a/x@late")) is None


def test_what_a_look_leaves_is_told_to_be_looked_at_again(index: PoolIndex) -> None:
    """Somebody else's change may be among it."""
    x = DatasetName.parse("tank/a/x")
    with index.reading() as reading:
        index.put_snapshots([snapshot("tank/a/x@ours", txg=20)])
        index.apply_snapshots(reading, x, [snapshot("tank/a/x@theirs", txg=19)])
        assert reading.left == {x}
    with index.reading() as reading:
        index.put(dataset("tank/b", guid=77))
        index.apply(reading, DatasetName.parse("tank/b"), None)
        index.apply(reading, x, dataset("tank/a/x"))
        assert reading.left == {DatasetName.parse("tank/b")}
    with index.reading() as reading:
        index.put(dataset("tank/new"))
        index.apply_all(reading, [dataset("tank"), dataset("tank/new", guid=5)], [])
        assert reading.left == {DatasetName.parse("tank/new")}


def test_what_we_are_receiving_is_not_taken_for_gone(index: PoolIndex) -> None:
    """It keeps its origin from being destroyed, and ZFS does not show it before it is whole."""
    arriving = dataset("tank/.mistify-receive-0123456789abcdef", guid=0)
    index.put(arriving)
    with index.reading() as reading:
        index.apply(reading, arriving.name, None)
        index.apply_all(reading, [dataset("tank")], [])
        assert not reading.left
    assert listed(index) == ["tank", str(arriving.name)]


def test_our_snapshot_does_not_overtake_a_look_at_anothers(index: PoolIndex) -> None:
    theirs = SnapshotName.parse("tank/a/x@theirs")
    with index.reading() as reading:
        index.put_snapshots([snapshot("tank/a/x@ours", txg=20)])
        index.apply(reading, theirs.dataset, dataset("tank/a/x", guid=9))
        index.apply_snapshot(reading, theirs, snapshot(str(theirs), txg=19))
        assert not reading.left
    found = index.find(theirs.dataset)
    assert found is not None
    assert found.guid == 9
    assert [info.name.snapshot for info in index.snapshots(theirs.dataset)][-2:] == ["theirs", "ours"]


def test_look_that_began_after_our_change_counts(index: PoolIndex) -> None:
    name = DatasetName.parse("tank/b")
    with index.reading() as reading:
        index.apply(reading, name, None)
        index.apply_snapshots(reading, DatasetName.parse("tank/a/x"), [snapshot("tank/a/x@new", txg=12)])
    assert index.find(name) is None
    assert [info.name.snapshot for info in index.snapshots(DatasetName.parse("tank/a/x"))] == ["new"]


def test_look_at_everything_keeps_what_changed_meanwhile(index: PoolIndex) -> None:
    with index.reading() as reading:
        index.put(dataset("tank/new"))
        index.remove(DatasetName.parse("tank/b"))
        index.rename(DatasetName.parse("tank/a"), DatasetName.parse("tank/moved"))
        seen = [dataset(name) for name in ("tank", "tank/a", "tank/a/x", "tank/b", "tank/other")]
        index.apply_all(reading, seen, [snapshot("tank/other@s"), snapshot("tank/a/x@late")])
    assert listed(index) == ["tank", "tank/c", "tank/moved", "tank/moved/x", "tank/new", "tank/other"]
    assert index.find_snapshot(SnapshotName.parse("tank/other@s")) is not None


def test_replaced_snapshots_are_all_there_are(index: PoolIndex) -> None:
    name = DatasetName.parse("tank/a/x")
    with index.reading() as reading:
        index.replace_snapshots(name, [snapshot("tank/a/x@only", txg=4)])
        index.apply_snapshots(reading, name, [])
    assert [info.name.snapshot for info in index.snapshots(name)] == ["only"]
    index.replace_snapshots(DatasetName.parse("tank/nowhere"), [snapshot("tank/nowhere@s")])
    assert index.find_snapshot(SnapshotName.parse("tank/nowhere@s")) is None


def test_snapshot_of_an_unknown_dataset_is_left_out(index: PoolIndex) -> None:
    index.put_snapshots([snapshot("tank/nowhere@s")])
    assert index.find_snapshot(SnapshotName.parse("tank/nowhere@s")) is None


def test_index_and_plain_dictionary_agree_after_random_changes() -> None:
    seed = random.randrange(1 << 32)
    chance, index, model = random.Random(seed), PoolIndex(), {"tank"}
    index.put(dataset("tank"))
    for _ in range(300):
        parent = chance.choice(sorted(model))
        name = f"{parent}/{chance.choice('abc')}"
        action = chance.choice(["put", "put", "remove", "rename"])
        if action == "put" and name.count("/") < 5:
            index.put(dataset(name))
            model.add(name)
        elif action == "remove" and parent != "tank":
            index.remove(DatasetName.parse(parent))
            model = {other for other in model if other != parent and not other.startswith(f"{parent}/")}
        elif action == "rename" and parent != "tank":
            target = f"tank/r{chance.randrange(1000)}"
            if target in model:
                continue
            index.rename(DatasetName.parse(parent), DatasetName.parse(target))
            inside = {other for other in model if other == parent or other.startswith(f"{parent}/")}
            model = (model - inside) | {target + other[len(parent) :] for other in inside}
        assert sorted(listed(index)) == sorted(model), f"seed {seed}"


def test_written_is_asked_once_for_each_pair_of_snapshots() -> None:
    index, asked = PoolIndex(), list[Sequence[SnapshotName]]()
    first, second = SnapshotName.parse("tank/v@a"), SnapshotName.parse("tank/v@b")

    def ask(names: Sequence[SnapshotName]) -> dict[SnapshotName, int]:
        asked.append(names)
        return {name: len(asked) for name in names if name != first}

    spans = {first: Span(1, 0), second: Span(2, 1)}
    assert index.written.of(spans, ask) == {second: 1}  # the first is gone
    assert index.written.of({second: Span(2, 1)}, ask) == {second: 1}
    assert index.written.of({second: Span(2, 0)}, ask) == {second: 2}  # its predecessor was destroyed
    with index.reading() as reading:
        index.apply_all(reading, [], [])
    assert index.written.of({second: Span(2, 1)}, ask) == {second: 3}
    assert asked == [[first, second], [second], [second]]
