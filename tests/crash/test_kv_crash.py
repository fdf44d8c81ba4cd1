"""The embedded key/value engine under SIGKILL: every acknowledged transaction is there, whole, and the store opens clean."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imaging.errors import BusyError
from imaging.kv.base import put
from imaging.kv.sqlite import SqliteKeyValue

KILLS = 20
ACKNOWLEDGED_MAX = 120

# Each transaction moves a counter, adds an entry and its twin, and deletes an old pair; then its number is acknowledged.
WRITER = """
import os, sys
from imaging.kv.base import Compare, Delete, Put
from imaging.kv.sqlite import SqliteKeyValue
store = SqliteKeyValue(sys.argv[1])
counter = store.get("counter")
number, revision = (int(counter.value), counter.revision) if counter else (0, 0)
while True:
    number += 1
    value = b"%d " % number * (number % 700)
    operations = [Put("counter", b"%d" % number), Put(f"one/{number:08d}", value), Put(f"two/{number:08d}", value)]
    if number > 50:
        operations += [Delete(f"one/{number - 50:08d}"), Delete(f"two/{number - 50:08d}")]
    revision = store.transact(operations, [Compare("counter", revision)])
    os.write(1, b"%d\\n" % number)
"""


def _write_until_killed(path: Path, acknowledged_min: int) -> int:
    """Run a writer, kill it some time after so many acknowledgements; the last number it acknowledged."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(acknowledged_min)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        assert writer.wait(timeout=60) == -signal.SIGKILL
    return int([line for line in lines if line.endswith(b"\n")][-1])


def _check(path: Path, acknowledged: int, context: str) -> int:
    with SqliteKeyValue(path) as store:
        counter = store.get("counter")
        assert counter is not None, context
        last = int(counter.value)
        assert last in {acknowledged, acknowledged + 1}, context
        numbers = range(max(1, last - 49), last + 1)
        for half in ("one", "two"):
            found = {entry.key: entry.value for entry in store.list(f"{half}/")}
            assert found == {f"{half}/{n:08d}": b"%d " % n * (n % 700) for n in numbers}, context
        assert counter.revision == max(entry.revision for entry in store.list()), context
    return last


def test_kill_at_random_instants_every_acknowledged_transaction_is_there(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    path, last = tmp_path / "store.db", 0
    for kill in range(KILLS):
        acknowledged = _write_until_killed(path, chance.randint(1, ACKNOWLEDGED_MAX))
        assert acknowledged > last
        last = _check(path, acknowledged, f"seed {seed}, kill {kill}")


# Writes under a file size limit until a commit fails, says so, is given room again, and goes on; killed in the end.
SQUEEZED = """
import os, resource, sys
from imaging.errors import MistifyError
from imaging.kv.base import put
from imaging.kv.sqlite import SqliteKeyValue
store = SqliteKeyValue(sys.argv[1])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
number = 0
while True:
    number += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 if number % 8 < 4 else soft, hard))
    try:
        put(store, f"{number:08d}", b"x" * 20_000)
    except MistifyError as err:
        os.write(1, f"failed {number} {err.code}\\n".encode())
    else:
        os.write(1, f"done {number}\\n".encode())
"""


def test_kill_among_failing_commits_keeps_what_was_acknowledged_and_nothing_that_failed(tmp_path: Path) -> None:
    for kill in range(3):
        path = tmp_path / f"store{kill}.db"
        with subprocess.Popen([sys.executable, "-c", SQUEEZED, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(60 + kill)]
            writer.kill()
            lines += writer.stdout.readlines()
        told = [line.split() for line in lines if line.endswith(b"\n")]
        done = {f"{int(line[1]):08d}" for line in told if line[0] == b"done"}
        failed = {f"{int(line[1]):08d}" for line in told if line[0] == b"failed"}
        assert {line[2] for line in told if line[0] == b"failed"} <= {b"unavailable", b"no_space"}
        assert len(failed) > 5
        assert max(done) > min(failed)
        with SqliteKeyValue(path) as store:
            found = {entry.key for entry in store.list()}
            assert done <= found
            assert not failed & found
            assert len(found - done) <= 1
            put(store, "after", b"")


def test_killed_owner_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline()
        with pytest.raises(BusyError, match=f"process {writer.pid}"):
            SqliteKeyValue(path)
        writer.kill()
    SqliteKeyValue(path).close()
