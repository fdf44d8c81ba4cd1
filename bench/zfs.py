"""The zfs driver beside the zfs program called once per request, on the pool of the lab.

    tests/lab/zfs-vm -- .venv/bin/python -m bench.zfs [--volumes N] [--snapshots N]

Answers of the agent are asked over its socket; snapshots and clones are made through the driver. Both sides take turns in one run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from agent_image.drivers.zfs import ZfsDriver
from bench import harness
from bench.harness import Report, compare
from imaging.names import DatasetName, PoolName
from tests.acceptance.daemons import Agent, start_agent

VOLUMES = 2_000
SNAPSHOTS = 10_000
SNAPSHOTS_OF_ONE = 10
VOLUME_BYTES = 1 << 20
PROGRAM_TIMEOUT_S = 3600
CALL_TIMEOUT_S = 3600.0
AT_LEAST_S = 1.0
"""A turn repeats a quick call for that long."""
MADE_PER_TURN = 20


def main() -> None:
    """Fill the pool, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.zfs", description=__doc__)
    parser.add_argument("--volumes", type=int, default=VOLUMES)
    parser.add_argument("--snapshots", type=int, default=SNAPSHOTS)
    arguments = parser.parse_args()
    pool = PoolName.parse(os.environ["MISTIFY_LAB_POOL"])
    report = Report()
    print(harness.machine(), flush=True)
    _fill(report, pool, arguments.volumes, arguments.snapshots)
    with tempfile.TemporaryDirectory(prefix="mistify-bench-") as directory:
        _changes(report, pool)
        with start_agent(Path(directory) / "state", driver="zfs", zpool=str(pool)) as agent:
            _answers(report, pool, agent)
    print(report.markdown())


def _opened(pool: PoolName) -> ZfsDriver:
    driver = ZfsDriver(pool)
    driver.open()
    return driver


def _fill(report: Report, pool: PoolName, volumes: int, snapshots: int) -> None:
    driver = _opened(pool)
    with harness.stopwatch() as elapsed_s:
        place = driver.create_filesystem(pool.root / "bench").name
        for number in range(volumes):
            driver.create_volume(place / f"v{number}", VOLUME_BYTES, thin=True)
        for number in range(max(1, snapshots // volumes)):
            driver.snapshot(place @ f"s{number}", recursive=True)
        while len(driver.list_snapshots(place / "v0")) < SNAPSHOTS_OF_ONE:
            driver.snapshot((place / "v0") @ f"more{len(driver.list_snapshots(place / 'v0'))}")
        made = len(driver.list_snapshots(pool.root))
    driver.close()
    report.note(f"{volumes:,} volumes and {made:,} snapshots, made in {elapsed_s():.0f} s")


def _zfs(*words: object) -> None:
    """The program as an agent of old would call it: its output is read whole."""
    subprocess.run(["/usr/sbin/zfs", *map(str, words)], check=True, stdout=subprocess.PIPE, timeout=PROGRAM_TIMEOUT_S)


def _rate(call: Callable[[], object]) -> float:
    """Calls per second."""
    begin, count = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - begin) < AT_LEAST_S:
        call()
        count += 1
    return count / elapsed_s


def _answers(report: Report, pool: PoolName, agent: Agent) -> None:
    one, snapshots = f"{pool}/bench/v0", ("list", "-Hp", "-r", "-t", "snapshot", "-o", "name,written")
    volume = ("-o", "name,volsize")
    requests = {
        f"ListSnapshots of a volume with {SNAPSHOTS_OF_ONE}": (
            ("ListSnapshots", {"id": "bench/v0"}),
            (*snapshots, one),
        ),
        "ListSnapshots of the pool": (("ListSnapshots", {}), (*snapshots, pool)),
        "GetVolume": (("GetVolume", {"id": "bench/v0"}), ("list", "-Hp", *volume, one)),
        "ListVolumes": (("ListVolumes", {}), ("list", "-Hp", "-r", "-t", "volume", *volume, pool)),
    }
    for title, ((method, request), words) in requests.items():
        reference = ("zfs", _programs_per_s(words))
        report.add(compare(title, "/s", _answers_per_s(agent, method, request), reference))


def _answers_per_s(agent: Agent, method: str, request: dict[str, str]) -> Callable[[], float]:
    return lambda: _rate(lambda: agent.call(method, timeout_s=CALL_TIMEOUT_S, **request))


def _programs_per_s(words: tuple[object, ...]) -> Callable[[], float]:
    return lambda: _rate(lambda: _zfs(*words))


def _changes(report: Report, pool: PoolName) -> None:
    driver, place = _opened(pool), pool.root / "bench"
    numbers = iter(range(1 << 30))
    source = (place / "v0") @ "s0"

    def many(make: Callable[[str], object]) -> Callable[[], float]:
        def turn() -> float:
            with harness.stopwatch() as elapsed_s:
                for _ in range(MADE_PER_TURN):
                    make(f"made{next(numbers)}")
            return MADE_PER_TURN / elapsed_s()

        return turn

    def volume(number: int) -> DatasetName:
        return place / f"v{number}"

    taking = (
        many(lambda leaf: driver.snapshot(volume(1) @ leaf)),
        many(lambda leaf: _zfs("snapshot", volume(1) @ leaf)),
    )
    cloning = (
        many(lambda leaf: driver.clone(source, place / leaf)),
        many(lambda leaf: _zfs("clone", source, place / leaf)),
    )
    report.add(compare("snapshots of a volume", "/s", taking[0], ("zfs", taking[1])))
    report.add(compare("clones of a snapshot", "/s", cloning[0], ("zfs", cloning[1])))
    driver.close()


if __name__ == "__main__":
    main()
