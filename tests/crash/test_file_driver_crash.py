"""SIGKILL the file driver anywhere in any call, open the pool again: what was acknowledged is there, the rest is done or undone.

The child (this module as a program) makes random calls and writes each one down before and after. It kills itself before or after its
n-th step at the border to the operating system, or is killed from outside. The parent replays what was written down on the model and
compares: the call that was cut off may have happened or not, everything else is certain. Round after round works on the same pool, so that
what one recovery left is what the next one finds.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_image.drivers.base import DatasetInfo, DatasetKind
from agent_image.drivers.file import FileDriver
from agent_image.drivers.file_store import RecordStore
from imaging.errors import MistifyError
from imaging.names import DatasetName, PoolName, SnapshotName
from tests.contracts.storage_driver_model import BLOCK_BYTES, Model
from tests.contracts.storage_driver_tools import read_all, stream_of
from tests.waiting import wait_until

POOL = PoolName.parse("tank")
CHECKOUT = Path(__file__).parents[2]
ROUNDS = 60
OUTSIDE_KILLS = 12
STEPS_MAX = 220
"""A call takes about ten steps; opening takes some, so that recoveries are killed too."""

Call = list[Any]


def open_driver(state_dir: Path) -> FileDriver:
    driver = FileDriver(POOL, state_dir, volblocksize_default_bytes=BLOCK_BYTES)
    driver.open()
    return driver


# -- one call, on the driver and on the model ----------------------------------------------------------------------------


def on_driver(driver: FileDriver, call: Call) -> None:
    verb, arguments = call[0], call[1:]
    dataset: Callable[[str], DatasetName] = DatasetName.parse
    snapshot: Callable[[str], SnapshotName] = SnapshotName.parse
    calls: dict[str, Callable[..., object]] = {
        "filesystem": lambda name: driver.create_filesystem(dataset(name)),
        "volume": lambda name, size: driver.create_volume(dataset(name), size, thin=False),
        "write": lambda name, offset, text: _write(driver, dataset(name), offset, text),
        "device": lambda name: driver.device(dataset(name)),
        "resize": lambda name, size: driver.resize(dataset(name), size),
        "clone": lambda name, target: driver.clone(snapshot(name), dataset(target)),
        "rename": lambda name, target: driver.rename(dataset(name), dataset(target)),
        "promote": lambda name: driver.promote(dataset(name)),
        "destroy": lambda name, recursive: driver.destroy(dataset(name), recursive=recursive),
        "snapshot": lambda name, recursive: driver.snapshot(snapshot(name), recursive=recursive),
        "drop": lambda name, defer: driver.destroy_snapshot(snapshot(name), defer=defer),
        "rollback": lambda name: driver.rollback(snapshot(name), destroy_newer=True),
        "hold": lambda name, tag: driver.hold(snapshot(name), tag),
        "release": lambda name, tag: driver.release(snapshot(name), tag),
        "receive": lambda name, target: driver.receive(snapshot(target), io.BytesIO(stream_of(driver, snapshot(name)))),
    }
    calls[verb](*arguments)


def _write(driver: FileDriver, name: DatasetName, offset: int, text: str) -> None:
    with driver.open_volume(name, writable=True) as fd:
        os.pwrite(fd, bytes.fromhex(text), offset)


def on_model(model: Model, call: Call) -> None:
    verb, arguments = call[0], call[1:]
    dataset: Callable[[str], DatasetName] = DatasetName.parse
    snapshot: Callable[[str], SnapshotName] = SnapshotName.parse
    calls: dict[str, Callable[..., object]] = {
        "filesystem": lambda name: model.create(dataset(name), None),
        "volume": lambda name, size: model.create(dataset(name), bytes(size)),
        "write": lambda name, offset, text: model.write(dataset(name), offset, bytes.fromhex(text)),
        "device": lambda name: model._volume(dataset(name)),
        "resize": lambda name, size: model.resize(dataset(name), size),
        "clone": lambda name, target: model.clone(snapshot(name), dataset(target)),
        "rename": lambda name, target: model.rename(dataset(name), dataset(target)),
        "promote": lambda name: model.promote(dataset(name)),
        "destroy": lambda name, recursive: model.destroy(dataset(name), recursive=recursive),
        "snapshot": lambda name, recursive: model.snapshot(snapshot(name), recursive=recursive),
        "drop": lambda name, defer: model.destroy_snapshot(snapshot(name), recursive=False, defer=defer),
        "rollback": lambda name: model.rollback(snapshot(name), destroy_newer=True),
        "hold": lambda name, tag: model.hold(snapshot(name), tag),
        "release": lambda name, tag: model.release(snapshot(name), tag),
        "receive": lambda name, target: model.receive(snapshot(target), _sent(model, snapshot(name))),
    }
    calls[verb](*arguments)


def _sent(model: Model, name: SnapshotName) -> bytes:
    content = model.get_snapshot(name).content
    if content is None:
        raise MistifyError("a filesystem has nothing to send")
    return content


# -- the child -----------------------------------------------------------------------------------------------------------


class Chooser:
    """Chooses calls that mostly can be done."""

    def __init__(self, driver: FileDriver, seed: int) -> None:
        self._driver, self._random = driver, random.Random(seed)

    def next_call(self) -> Call:
        draw = self._random
        datasets = self._driver.list(POOL.root)
        snapshots = [str(s.name) for s in self._driver.list_snapshots(POOL.root)] or ["tank@none"]
        volume = str(draw.choice([d for d in datasets if d.kind is DatasetKind.VOLUME] or datasets).name)
        if len(datasets) > 12:
            return ["destroy", str(draw.choice(datasets[1:]).name), True]
        return draw.choice(
            [
                ["filesystem", self._free(datasets)],
                ["volume", self._free(datasets), 8 * BLOCK_BYTES],
                *[["write", volume, draw.randrange(8) * BLOCK_BYTES, draw.randbytes(BLOCK_BYTES).hex()]] * 5,
                ["device", volume],
                ["resize", volume, draw.choice([4, 8, 12]) * BLOCK_BYTES],
                *[["clone", draw.choice(snapshots), self._free(datasets)]] * 2,
                ["rename", str(draw.choice(datasets).name), self._free(datasets)],
                ["promote", volume],
                ["destroy", str(draw.choice(datasets).name), draw.random() < 0.3],
                *[["snapshot", f"{draw.choice([volume, 'tank'])}@{draw.choice('stuvwx')}", draw.random() < 0.5]] * 3,
                *[["drop", draw.choice(snapshots), draw.random() < 0.5]] * 2,
                ["rollback", draw.choice(snapshots)],
                ["hold", draw.choice(snapshots), "tag"],
                ["release", draw.choice(snapshots), "tag"],
                ["receive", draw.choice(snapshots), f"{self._free(datasets)}@r"],
            ]
        )

    def _free(self, datasets: list[DatasetInfo] | Any) -> str:
        above = self._random.choice([d for d in datasets if d.kind is DatasetKind.FILESYSTEM])
        return f"{above.name}/n{self._random.randrange(1 << 30)}"


def child(state_dir: Path, log_path: Path, seed: int, kill_at: int) -> None:
    """Make calls until killed."""
    install_failpoints(kill_at)
    log = log_path.open("ab", buffering=0)
    driver = open_driver(state_dir)
    chooser = Chooser(driver, seed)
    while True:
        call = chooser.next_call()
        log.write(json.dumps(call).encode() + b"\n")
        try:
            on_driver(driver, call)
        except MistifyError as err:
            log.write(json.dumps([type(err).__name__, str(err)]).encode() + b"\n")
        else:
            log.write(b"[]\n")


def install_failpoints(kill_at: int) -> None:
    """Count every step at the border to the operating system, before and after it, and die at the one that was asked for."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            result = function(*args, **kwargs)
            step()
            return result

        return call

    for name in (
        "fsync",
        "ftruncate",
        "utime",
        "unlink",
        "replace",
        "symlink",
        "rmdir",
        "copy_file_range",
        "pwrite",
        "fchmod",
    ):
        setattr(os, name, watched(getattr(os, name)))
    RecordStore.commit = watched(RecordStore.commit)  # type: ignore[method-assign]


# -- the parent ----------------------------------------------------------------------------------------------------------


class Rounds:
    """One pool that is killed again and again, and the model of what it must hold."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.state_dir, self.log_path = directory / "state", directory / "log"
        self.seed = seed
        self.model = Model(POOL.root)
        self.calls = 0

    def run(self, number: int, *, kill_at: int, lines: int | None = None) -> None:
        """Start a child, let it die (or kill it after so many lines of its log), and check what it left."""
        self.log_path.write_bytes(b"")
        arguments = [str(self.state_dir), str(self.log_path), str(self.seed + number), str(kill_at)]
        process = subprocess.Popen([sys.executable, "-m", __name__, *arguments], stderr=subprocess.PIPE, cwd=CHECKOUT)
        try:
            if lines is not None:
                wait_until(
                    lambda: self.log_path.read_bytes().count(b"\n") >= lines or process.poll() is not None,
                    f"{lines} lines of the log",
                )
                process.kill()
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL, stderr.decode()
        self.check(f"seed {self.seed}, round {number}, killed at step {kill_at} (or {lines} lines)")

    def check(self, where: str) -> None:
        log = [json.loads(line) for line in self.log_path.read_bytes().splitlines() if line.endswith(b"]")]
        calls, outcomes = log[0::2], log[1::2]
        for call, outcome in zip(calls, outcomes, strict=False):
            self.replay(call, outcome, where)
        self.calls += len(outcomes)
        candidates = [self.model]
        if len(calls) > len(outcomes):
            done = copy.deepcopy(self.model)
            try:
                on_model(done, calls[-1])
            except MistifyError:
                done = self.model
            candidates.append(done)
        found = self.observe(where)
        fitting = [model for model in candidates if expected(model) == found]
        differences = [difference(expected(model), found) for model in candidates]
        assert fitting, f"{where}: {calls[-1:]} neither undone nor done, (expected, found): {differences}"
        self.model = fitting[0]

    def replay(self, call: Call, outcome: list[str], where: str) -> None:
        try:
            on_model(self.model, call)
        except MistifyError:
            assert outcome, f"{where}: {call} should have been refused"
        else:
            assert not outcome, f"{where}: {call} was refused: {outcome}"

    def observe(self, where: str) -> dict[str, object]:
        """What the pool holds after recovery; nothing may be left over."""
        driver = open_driver(self.state_dir)
        try:
            contents = {path.name for path in (self.state_dir / "pools" / "tank" / "contents").iterdir()}
            assert contents == driver._catalog.contents(), where
            links = [path for path in (self.state_dir / "zvol").rglob("*") if path.is_symlink()]
            private = {str(driver._catalog.name_of(d)) for d in driver._catalog.all_datasets() if d.private}
            assert {str(link.relative_to(self.state_dir / "zvol")) for link in links} == private, where
            assert all(link.exists() for link in links), where
            assert not list((self.state_dir / "zvol").rglob(".tmp-*")), where
            return observed(driver)
        finally:
            driver.close()


def difference(one: dict[str, object], other: dict[str, object]) -> dict[str, tuple[str, str]]:
    """What differs, short enough for a message."""
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return {key: (str(one.get(key))[-100:], str(other.get(key))[-100:]) for key in differing}


def observed(driver: FileDriver) -> dict[str, object]:
    found: dict[str, object] = {}
    for info in driver.list(POOL.root):
        content = read_all(driver, info.name).hex() if info.kind is DatasetKind.VOLUME else None
        found[str(info.name)] = (content, str(info.origin) if info.origin else None)
    for snapshot in driver.list_snapshots(POOL.root):
        content = read_all(driver, snapshot.name).hex() if snapshot.volsize_bytes else None
        deferred = driver._snapshot(snapshot.name).deferred  # the one thing a call changes that nobody sees at once
        found[str(snapshot.name)] = (content, list(driver.holds(snapshot.name)), deferred)
    return found


def expected(model: Model) -> dict[str, object]:
    found: dict[str, object] = {}
    origins = dict(model.listing())
    for dataset in model.below(model.root):
        content = dataset.content.hex() if dataset.content is not None else None
        found[str(dataset.name)] = (content, origins[str(dataset.name)])
        for snapshot in model.of(dataset):
            content = snapshot.content.hex() if snapshot.content is not None else None
            found[f"{dataset.name}@{snapshot.name}"] = (content, sorted(snapshot.holds), snapshot.deferred)
    return found


@pytest.mark.slow
def test_pool_killed_at_any_step_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rounds = Rounds(tmp_path, seed)
    draw = random.Random(seed)
    for number in range(ROUNDS):
        rounds.run(number, kill_at=draw.randrange(1, STEPS_MAX))
    assert rounds.calls > ROUNDS, f"seed {seed}: hardly anything happened between the kills"


@pytest.mark.slow
def test_pool_killed_from_outside_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    rounds = Rounds(tmp_path, seed)
    draw = random.Random(seed)
    for number in range(OUTSIDE_KILLS):
        rounds.run(number, kill_at=0, lines=draw.randrange(1, 120))
    assert rounds.calls > OUTSIDE_KILLS, f"seed {seed}: hardly anything happened between the kills"


def test_pool_in_use_by_another_process_is_busy_until_it_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"")
    arguments = [str(tmp_path / "state"), str(log), "1", "0"]
    process = subprocess.Popen([sys.executable, "-m", __name__, *arguments], cwd=CHECKOUT)
    try:
        wait_until(lambda: log.read_bytes() or process.poll() is not None, "the child at work")
        with pytest.raises(MistifyError) as caught:
            open_driver(tmp_path / "state")
        assert type(caught.value).__name__ == "BusyError"
        assert str(process.pid) in str(caught.value)
    finally:
        process.kill()
        process.wait()
    open_driver(tmp_path / "state").close()


if __name__ == "__main__":
    tempfile.tempdir = sys.argv[1].removesuffix("state")
    child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
