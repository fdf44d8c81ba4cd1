"""The file driver against a model: any calls in any order, the same outcome, and nothing ever leaves the pool."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent_image.drivers.file import FileDriver
from imaging.errors import InvalidNameError, MistifyError
from imaging.names import DatasetName, PoolName, SnapshotName
from tests.contracts.storage_driver_model import BLOCK_BYTES, Model
from tests.contracts.storage_driver_tools import read_all, stream_of

POOL = PoolName.parse("tank")

Choice = tuple[int, int, SnapshotName]

paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=3)
datasets = st.one_of(
    st.just(POOL.root), paths.map(lambda parts: DatasetName(("tank", *parts))), paths.map(lambda p: POOL.root / p[0])
)
snapshots = st.builds(SnapshotName, datasets, st.sampled_from(["s", "t", "u"]))
choices = st.tuples(st.integers(0, 9), st.integers(0, 99), snapshots)
"""How to choose (mostly a volume that is there), which one, and a name to take if it is to be any."""
sizes = st.sampled_from([0, 1, BLOCK_BYTES, 5 * BLOCK_BYTES, 8 * BLOCK_BYTES - 1, 20 * BLOCK_BYTES])
tags = st.sampled_from(["x", "y"])


class FileDriverMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._tmp = tempfile.TemporaryDirectory()
        self.outside = Path(self._tmp.name)
        (self.outside / "sentinel").write_text("untouched")
        self.driver = FileDriver(POOL, self.outside / "state", volblocksize_default_bytes=BLOCK_BYTES)
        self.driver.open()
        self.model = Model(POOL.root)
        self._begin()

    def _begin(self) -> None:
        """Start with something to work on: random calls rarely make it."""
        self.driver.create_filesystem(POOL.root / "a")
        self.model.create(POOL.root / "a", None)
        for name in (POOL.root / "a" / "b", POOL.root / "c"):
            self.driver.create_volume(name, 8 * BLOCK_BYTES)
            self.model.create(name, bytes(8 * BLOCK_BYTES))
        self.driver.snapshot(POOL.root @ "s", recursive=True)
        self.model.snapshot(POOL.root @ "s", recursive=True)

    def teardown(self) -> None:
        self.driver.close()
        self._tmp.cleanup()

    def both(self, on_driver: Callable[[], object], on_model: Callable[[], object]) -> None:
        """The same outcome on both: nothing, or an error of the same class."""
        expected, got = _outcome(on_model), _outcome(on_driver)
        assert type(got) is type(expected), f"{got!r} instead of {expected!r}"

    def dataset(self, choice: Choice) -> DatasetName:
        how, which, fallback = choice
        volumes = [d for d in self.model.datasets if d.content is not None]
        candidates = volumes if how > 2 and volumes else self.model.datasets
        return candidates[which % len(candidates)].name if how else fallback.dataset

    def snapshot_name(self, choice: Choice) -> SnapshotName:
        how, which, fallback = choice
        if not how or not self.model.snapshots:
            return fallback
        of_volumes = [s for s in self.model.snapshots if s.content is not None]
        candidates = of_volumes if how > 2 and of_volumes else self.model.snapshots
        chosen = candidates[which % len(candidates)]
        return SnapshotName(chosen.dataset.name, chosen.name)

    # -- datasets ----------------------------------------------------------------------------------------------------

    @rule(name=datasets)
    def create_filesystem(self, name: DatasetName) -> None:
        self.both(lambda: self.driver.create_filesystem(name), lambda: self.model.create(name, None))

    @rule(name=datasets, blocks=st.integers(1, 16), thin=st.booleans())
    def create_volume(self, name: DatasetName, blocks: int, *, thin: bool) -> None:
        size_bytes = blocks * BLOCK_BYTES
        self.both(
            lambda: self.driver.create_volume(name, size_bytes, thin=thin),
            lambda: self.model.create(name, bytes(size_bytes)),
        )

    @rule(choice=choices, offset=st.integers(0, 20 * BLOCK_BYTES), data=st.binary(min_size=1, max_size=2000))
    def write(self, choice: Choice, offset: int, data: bytes) -> None:
        name = self.dataset(choice)

        def on_driver() -> None:
            with self.driver.open_volume(name, writable=True) as fd:
                os.pwrite(fd, data, offset)

        self.both(on_driver, lambda: self.model.write(name, offset, data))

    @rule(choice=choices, data=st.binary(min_size=1, max_size=BLOCK_BYTES))
    def write_to_device(self, choice: Choice, data: bytes) -> None:
        name = self.dataset(choice)

        def on_driver() -> None:
            with self.driver.device(name).open("r+b", buffering=0) as device:
                device.write(data)

        def on_model() -> None:
            volume, content = self.model._volume(name)
            volume.content = data[: len(content)] + content[len(data) :]

        self.both(on_driver, on_model)

    @rule(choice=choices, to=datasets)
    def clone(self, choice: Choice, to: DatasetName) -> None:
        snapshot = self.snapshot_name(choice)
        self.both(lambda: self.driver.clone(snapshot, to), lambda: self.model.clone(snapshot, to))

    @rule(choice=choices, size_bytes=sizes)
    def resize(self, choice: Choice, size_bytes: int) -> None:
        name = self.dataset(choice)
        self.both(lambda: self.driver.resize(name, size_bytes), lambda: self.model.resize(name, size_bytes))

    @rule(choice=choices, to=datasets)
    def rename(self, choice: Choice, to: DatasetName) -> None:
        name = self.dataset(choice)
        self.both(lambda: self.driver.rename(name, to), lambda: self.model.rename(name, to))

    @rule(choice=choices)
    def promote(self, choice: Choice) -> None:
        name = self.dataset(choice)
        self.both(lambda: self.driver.promote(name), lambda: self.model.promote(name))

    @rule(choice=choices, recursive=st.booleans())
    def destroy(self, choice: Choice, *, recursive: bool) -> None:
        name = self.dataset(choice)
        self.both(
            lambda: self.driver.destroy(name, recursive=recursive),
            lambda: self.model.destroy(name, recursive=recursive),
        )

    @rule(choice=choices, value=st.sampled_from(["on", "off"]))
    def set_readonly(self, choice: Choice, value: str) -> None:
        name = self.dataset(choice)
        if name in {d.name for d in self.model.datasets if d.content is None}:
            return  # inheritance is the contract suite's
        self.both(
            lambda: self.driver.set_properties(name, {"readonly": value}),
            lambda: self.model.get(name).properties.update(readonly=value),
        )

    # -- snapshots ---------------------------------------------------------------------------------------------------

    @rule(choice=choices, part=st.sampled_from("stu"), recursive=st.booleans())
    def snapshot(self, choice: Choice, part: str, *, recursive: bool) -> None:
        name = self.dataset(choice) @ part
        self.both(
            lambda: self.driver.snapshot(name, recursive=recursive),
            lambda: self.model.snapshot(name, recursive=recursive),
        )

    @rule(choice=choices, recursive=st.booleans(), defer=st.booleans())
    def destroy_snapshot(self, choice: Choice, *, recursive: bool, defer: bool) -> None:
        name = self.snapshot_name(choice)
        self.both(
            lambda: self.driver.destroy_snapshot(name, recursive=recursive, defer=defer),
            lambda: self.model.destroy_snapshot(name, recursive=recursive, defer=defer),
        )

    @rule(choice=choices, destroy_newer=st.booleans())
    def rollback(self, choice: Choice, *, destroy_newer: bool) -> None:
        name = self.snapshot_name(choice)
        self.both(
            lambda: self.driver.rollback(name, destroy_newer=destroy_newer),
            lambda: self.model.rollback(name, destroy_newer=destroy_newer),
        )

    @rule(choice=choices, tag=tags)
    def hold(self, choice: Choice, tag: str) -> None:
        name = self.snapshot_name(choice)
        self.both(lambda: self.driver.hold(name, tag), lambda: self.model.hold(name, tag))

    @rule(choice=choices, tag=tags)
    def release(self, choice: Choice, tag: str) -> None:
        name = self.snapshot_name(choice)
        self.both(lambda: self.driver.release(name, tag), lambda: self.model.release(name, tag))

    @rule(choice=choices, to=snapshots)
    def send_and_receive(self, choice: Choice, to: SnapshotName) -> None:
        name = self.snapshot_name(choice)
        sent = [s for s in self.model.snapshots if (s.dataset.name, s.name) == (name.dataset, name.snapshot)]
        if not sent or sent[0].content is None:
            return
        stream, content = stream_of(self.driver, name), sent[0].content
        self.both(lambda: self.driver.receive(to, io.BytesIO(stream)), lambda: self.model.receive(to, content))

    @rule()
    def close_and_open(self) -> None:
        self.driver.close()
        self.driver.open()

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def lists_agree(self) -> None:
        listed = [(str(d.name), str(d.origin) if d.origin else None) for d in self.driver.list(POOL.root)]
        assert listed == self.model.listing()
        assert [str(s.name) for s in self.driver.list_snapshots(POOL.root)] == self.model.snapshot_listing()

    @invariant()
    def contents_agree(self) -> None:
        for dataset in self.model.datasets:
            if dataset.content is not None:
                assert read_all(self.driver, dataset.name) == dataset.content, dataset.name
        for snapshot in self.model.snapshots:
            name = SnapshotName(snapshot.dataset.name, snapshot.name)
            assert list(self.driver.holds(name)) == sorted(snapshot.holds)
            if snapshot.content is not None:
                assert read_all(self.driver, name) == snapshot.content, name

    @invariant()
    def sizes_make_sense(self) -> None:
        top = [d.name for d in self.driver.list(POOL.root) if d.name.parent == POOL.root]
        assert self.driver.usage(POOL.root).used_bytes == sum(self.driver.usage(name).used_bytes for name in top)
        for snapshot in self.driver.list_snapshots(POOL.root):
            usage = self.driver.usage(snapshot.name)
            assert usage.written_bytes <= usage.referenced_bytes

    @invariant()
    def no_file_is_left_over_or_outside(self) -> None:
        contents = {path.name for path in (self.outside / "state" / "pools" / "tank" / "contents").iterdir()}
        assert contents == self.driver._catalog.contents()
        assert {path.name for path in self.outside.iterdir()} == {"sentinel", "state"}
        assert (self.outside / "sentinel").read_text() == "untouched"


def _outcome(call: Callable[[], object]) -> MistifyError | None:
    try:
        call()
    except MistifyError as err:
        return err
    return None


FileDriverMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestFileDriverModel = FileDriverMachine.TestCase


hostile = st.one_of(
    st.sampled_from(
        ["..", ".", "", "a/..", "../../etc", "a/b", "/etc", "-rf", "a\0b", "a b", "%recv", "é", "a@b", "a#b", "@", "~"]
    ),
    st.text(max_size=12),
)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(hostile, min_size=1, max_size=3), leaf=hostile)
def test_name_that_was_never_parsed_is_refused_unless_it_is_one(parts: list[str], leaf: str) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        outside = Path(tmp)
        driver = FileDriver(POOL, outside / "state")
        driver.open()
        driver.create_volume(POOL.root / "volume", BLOCK_BYTES, thin=True)
        driver.snapshot(POOL.root / "volume" @ "s")
        name = DatasetName(("tank", *parts))
        snapshot = SnapshotName(POOL.root / "volume", leaf)
        _expect(_is_name(name), lambda: driver.create_volume(name, 1 << 20, thin=True, parents=True))
        _expect(_is_name(name), lambda: driver.device(name))
        if not _is_name(name):
            _expect(False, lambda: driver.rename(POOL.root / "volume", name))
            _expect(False, lambda: driver.clone(POOL.root / "volume" @ "s", name))
            _expect(False, lambda: driver.receive(SnapshotName(name, "s"), io.BytesIO()))
            _expect(False, lambda: driver.get(name))
        if leaf != "s":
            _expect(_is_snapshot(snapshot), lambda: driver.snapshot(snapshot))
        driver.close()
        assert [path.name for path in outside.iterdir()] == ["state"]
        assert {path.name for path in (outside / "state").iterdir()} == {"pools", "zvol"}


def _is_name(name: DatasetName) -> bool:
    try:
        return DatasetName.parse(str(name)) == name
    except InvalidNameError:
        return False


def _is_snapshot(name: SnapshotName) -> bool:
    try:
        return SnapshotName.parse(str(name)) == name
    except InvalidNameError:
        return False


def _expect(valid: bool, call: Callable[[], object]) -> None:  # noqa: FBT001 -- reads as a sentence where it is called
    if valid:
        call()
        return
    with pytest.raises(InvalidNameError):
        call()
