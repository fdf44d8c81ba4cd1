"""The zfs driver beside the zfs program called once per request, on the pool of the lab.

    make bench-zfs
    tests/lab/zfs-vm --cpus 1 --udev light -- .venv/bin/python -m bench.zfs [--volumes N] [--snapshots N]
    python -m bench.zfs --without-pool

Answers of the agent are asked over its socket; snapshots, clones and streams go through the driver. Both sides take turns in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent_image.drivers.zfs import ZfsDriver
from agent_image.drivers.zfs.firewall import pour
from bench import harness
from bench.harness import Figure, Report, Row, compare
from imaging.names import PoolName, SnapshotName
from imaging.sendstream.volume import StreamHeader, make_stream
from tests.acceptance.daemons import Agent, start_agent
from tests.waiting import wait_until

VOLUMES = 2_000
SNAPSHOTS = 10_000
SNAPSHOTS_OF_ONE = 10
VOLUME_BYTES = 1 << 20
STREAM_BYTES = 128 << 20
BLOCK_BYTES = 16 << 10
PROGRAM_TIMEOUT_S = 3600
AT_LEAST_S = 1.0
"""A turn repeats a quick call for that long."""
MADE_PER_TURN = 16
CALLERS = 8
"""As many ask at once where the title says so."""
SEEN_TIMEOUT_S = 60.0
DEVICE_BUSY_TIMEOUT_S = 60.0
"""udev looks at hundreds of devices, in the lab under emulation."""
RECEIVE_BYTES = 1 << 20


def main() -> None:
    """Fill the pool, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.zfs", description=__doc__)
    parser.add_argument("--volumes", type=int, default=VOLUMES)
    parser.add_argument("--snapshots", type=int, default=SNAPSHOTS)
    parser.add_argument("--without-pool", action="store_true", help="only the firewall, into a pipe somebody empties")
    parser.add_argument("--only", choices=("streams", "changes", "answers"), help="one part of it")
    arguments = parser.parse_args()
    if arguments.without_pool:
        _firewall_alone()
        return
    pool = PoolName.parse(os.environ["MISTIFY_LAB_POOL"])
    report = Report()
    print(harness.machine(), flush=True)
    driver = ZfsDriver(pool, device_busy_timeout_s=DEVICE_BUSY_TIMEOUT_S)
    driver.open()
    if arguments.only in {None, "streams"}:
        _streams(report, driver)
    if arguments.only in {None, "changes"}:
        _changes(report, driver)
    if arguments.only in {None, "answers"}:
        _fill(report, driver, arguments.volumes, arguments.snapshots)
    driver.close()
    if arguments.only in {None, "answers"}:
        _ask(report, pool)
    print(report.markdown())


def _zfs(*words: object) -> None:
    """The program as an agent of old would call it: its output is read whole."""
    subprocess.run(["/usr/sbin/zfs", *map(str, words)], check=True, stdout=subprocess.PIPE, timeout=PROGRAM_TIMEOUT_S)


# -- streams -------------------------------------------------------------------------------------------------------------


def _streams(report: Report, driver: ZfsDriver) -> None:
    """The same stream through the firewall, and from a file straight into the kernel."""
    place = driver.create_filesystem(driver.pool.root / "streams").name
    with tempfile.TemporaryFile() as stream:
        _make_stream(driver, (place / "source") @ "s", stream)
        numbers = iter(range(1 << 30))

        shares = []

        def through() -> float:
            stream.seek(0)
            target = place / f"through{next(numbers)}"
            with harness.stopwatch() as elapsed_s:
                checked_s, busy_s = time.thread_time(), harness.busy_s()
                driver.receive(target @ "s", stream)  # this thread checks and pours, another one is in the kernel
                checked_s, busy_s = time.thread_time() - checked_s, harness.busy_s() - busy_s
            shares.append(checked_s / busy_s)
            driver.destroy(target, recursive=True)
            return harness.mb_per_s(STREAM_BYTES, elapsed_s())

        def straight() -> float:  # what an agent without the firewall would do
            os.lseek(stream.fileno(), 0, os.SEEK_SET)
            target = f"{place}/straight{next(numbers)}"
            with harness.stopwatch() as elapsed_s:
                subprocess.run(["/usr/sbin/zfs", "receive", f"{target}@s"], stdin=stream, check=True)
            _zfs("destroy", "-r", target)
            return harness.mb_per_s(STREAM_BYTES, elapsed_s())

        report.add(compare("receive of a stream, every record checked", "MB/s", through, ("zfs receive", straight)))
    share = statistics.median(shares)
    report.note(
        f"of what the processors do during a receive, the firewall's reading, checking and pouring are {share:.0%}"
    )
    driver.destroy(place, recursive=True)


def _make_stream(driver: ZfsDriver, name: SnapshotName, stream: io.BufferedRandom) -> None:
    driver.create_volume(name.dataset, STREAM_BYTES, thin=True)
    with driver.open_volume(name.dataset, writable=True) as fd:
        for offset in range(0, STREAM_BYTES, RECEIVE_BYTES):
            os.pwrite(fd, os.urandom(RECEIVE_BYTES), offset)
    driver.snapshot(name)
    driver.send(name, stream.fileno())


def _firewall_alone() -> None:
    """Beside cat, which moves the same bytes through as many pipes."""
    report = Report()
    print(harness.machine(), flush=True)
    with tempfile.TemporaryFile() as image, tempfile.TemporaryFile() as stream:
        for _ in range(0, STREAM_BYTES, RECEIVE_BYTES):
            image.write(os.urandom(RECEIVE_BYTES))
        header = StreamHeader(guid=1, toname="tank/v@s", volblocksize_bytes=BLOCK_BYTES)
        stream.writelines(make_stream(image.fileno(), STREAM_BYTES, header))

        def checked() -> float:
            stream.seek(0)
            with harness.stopwatch() as elapsed_s:
                pour(stream, None, _empty)
            return harness.mb_per_s(STREAM_BYTES, elapsed_s())

        def copied() -> float:
            os.lseek(stream.fileno(), 0, os.SEEK_SET)
            with harness.stopwatch() as elapsed_s:
                subprocess.run(["/bin/sh", "-c", "cat | cat > /dev/null"], stdin=stream, check=True)
            return harness.mb_per_s(STREAM_BYTES, elapsed_s())

        report.add(compare("a stream through the firewall into a pipe", "MB/s", checked, ("cat", copied)))
        begin_s = time.process_time()
        checked()
        spent_s = (time.process_time() - begin_s) * 1e9 / STREAM_BYTES
    report.note(f"the firewall and the emptying of its pipe take {spent_s:.2f} CPU seconds a GB")
    print(report.markdown())


def _empty(fd: int) -> None:
    while os.read(fd, RECEIVE_BYTES):
        pass


# -- changes -------------------------------------------------------------------------------------------------------------


def _changes(report: Report, driver: ZfsDriver) -> None:
    place = driver.create_filesystem(driver.pool.root / "made").name
    volumes = [driver.create_volume(place / f"v{number}", VOLUME_BYTES, thin=True).name for number in range(CALLERS)]
    source = driver.snapshot(volumes[0] @ "s0")[0].name
    made: deque[int] = deque()
    numbers = iter(range(1 << 30))

    def another() -> int:
        made.append(number := next(numbers))
        return number

    def is_noticed() -> bool:
        """What the other side made is in our index: looking at it must not be part of our turn."""
        there = len(driver.list(place)) + len(driver.list_snapshots(place))
        return there == len((place, source, *volumes, *made))

    def snapshots(make: Callable[[SnapshotName], object]) -> Callable[[], object]:
        def one() -> None:
            number = another()
            make(volumes[number % CALLERS] @ f"made{number}")

        return one

    def clones(make: Callable[[str], object]) -> Callable[[], object]:
        return lambda: make(f"made{another()}")

    pairs = {
        "snapshots of volumes": (snapshots(driver.snapshot), snapshots(lambda name: _zfs("snapshot", name))),
        "clones of a snapshot": (
            clones(lambda leaf: driver.clone(source, place / leaf)),
            clones(lambda leaf: _zfs("clone", source, place / leaf)),
        ),
    }
    for title, (ours, reference) in pairs.items():
        for callers in (1, CALLERS):
            words = f"{title}, {callers} at a time"
            turns = [_made_per_s(make, callers, is_noticed) for make in (ours, reference)]
            report.add(compare(words, "/s", turns[0], ("zfs", turns[1])))
    driver.destroy(place, recursive=True)


@contextlib.contextmanager
def _udev_later() -> Iterator[None]:
    """Each new device has udev run programs, which on two emulated processors takes longer than what is measured: after the turn."""
    _udevadm("control", "--stop-exec-queue")
    try:
        yield
    finally:
        _udevadm("control", "--start-exec-queue")
        _udevadm("settle", "--timeout=300")


def _udevadm(*words: str) -> None:
    subprocess.run(["udevadm", *words], check=False)


def _made_per_s(make: Callable[[], object], callers: int, is_noticed: Callable[[], bool]) -> Callable[[], float]:
    def turn() -> float:
        wait_until(is_noticed, "what was made to be in the index", timeout_s=SEEN_TIMEOUT_S)
        with _udev_later(), ThreadPoolExecutor(callers) as threads, harness.stopwatch() as elapsed_s:
            for made in [threads.submit(make) for _ in range(MADE_PER_TURN)]:
                made.result()
        return MADE_PER_TURN / elapsed_s()

    return turn


def _ask(report: Report, pool: PoolName) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mistify-bench-") as directory,
        harness.stopwatch() as elapsed_s,
        start_agent(Path(directory) / "state", driver="zfs", zpool=str(pool), log_level="warning") as agent,
    ):
        report.note(f"the agent was ready {elapsed_s():.0f} s after its start, with its index of all of them")
        _first_lists(report, agent)
        _outside(report, pool, agent)
        _answers(report, pool, agent)


# -- answers -------------------------------------------------------------------------------------------------------------


def _fill(report: Report, driver: ZfsDriver, volumes: int, snapshots: int) -> None:
    place = driver.create_filesystem(driver.pool.root / "bench").name
    with harness.stopwatch() as elapsed_s, ThreadPoolExecutor(CALLERS) as threads:
        names = [place / f"v{number}" for number in range(volumes)]
        list(threads.map(lambda name: driver.create_volume(name, VOLUME_BYTES, thin=True), names))
        print(f"{volumes} volumes made in {elapsed_s():.0f} s", flush=True)
        for number in range(max(1, snapshots // volumes)):
            driver.snapshot(place @ f"s{number}", recursive=True)
        for number in range(len(driver.list_snapshots(names[0])), SNAPSHOTS_OF_ONE):
            driver.snapshot(names[0] @ f"s{number}")
    made = len(driver.list_snapshots(driver.pool.root))
    report.note(f"{volumes:,} volumes and {made:,} snapshots, made in {elapsed_s():.0f} s")


class Caller:
    """Asks the agent over one connection, and does no more with the answer than to read it whole."""

    def __init__(self, agent: Agent) -> None:
        self._socket = socket.create_connection(("127.0.0.1", agent.port), timeout=PROGRAM_TIMEOUT_S)
        self._file = self._socket.makefile("rb")

    def ask(self, method: str, **request: str) -> bytes:
        """The body of the answer."""
        body = json.dumps({"method": f"ImageStore.{method}", "params": [request], "id": 1}).encode()
        head = f"POST /_mistify_RPC_ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self._socket.sendall(head.encode() + b"\r\n\r\n" + body)
        size = 0
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        answer = self._file.read(size)
        assert b'"error":null' in answer[-64:], answer[-200:]
        return answer


def _first_lists(report: Report, agent: Agent) -> None:
    caller = Caller(agent)
    for method in ("ListVolumes", "ListSnapshots"):
        with harness.stopwatch() as elapsed_s:
            caller.ask(method)
        report.note(
            f"the first {method} of the pool after a start, which asks ZFS once for each, took {elapsed_s():.1f} s"
        )


def _outside(report: Report, pool: PoolName, agent: Agent) -> None:
    """How long the agent takes to show what the zfs program changed."""
    caller, one, root = Caller(agent), f"{pool}/bench/v1", f"{pool}/bench"
    changes: Sequence[tuple[tuple[str, ...], Callable[[], bool]]] = (
        (("snapshot", f"{one}@outside"), lambda: b"@outside" in caller.ask("ListSnapshots", id="bench/v1")),
        (("set", "volsize=9M", one), lambda: b'"size":9' in caller.ask("GetVolume", id="bench/v1")),
        (("clone", f"{one}@outside", f"{root}/c"), lambda: b"bench/c" in caller.ask("ListVolumes")),
        (("rename", f"{root}/c", f"{root}/d"), lambda: b"bench/d" in caller.ask("ListVolumes")),
        (("destroy", f"{root}/d"), lambda: b"bench/d" not in caller.ask("ListVolumes")),
        (("destroy", f"{one}@outside"), lambda: b"@outside" not in caller.ask("ListSnapshots", id="bench/v1")),
    )
    seconds = []
    for words, shows in changes:
        _zfs(*words)
        with harness.stopwatch() as elapsed_s:
            wait_until(shows, f"zfs {words[0]} to show", timeout_s=SEEN_TIMEOUT_S)
        seconds.append(f"{words[0]} {elapsed_s():.1f} s")
    report.note("a change made with the zfs program shows after: " + ", ".join(seconds))


def _answers(report: Report, pool: PoolName, agent: Agent) -> None:
    caller, one, snapshots = (
        Caller(agent),
        f"{pool}/bench/v0",
        ("list", "-Hp", "-r", "-t", "snapshot", "-o", "name,written"),
    )
    volume = ("-o", "name,volsize")

    def ours(method: str, **request: str) -> Callable[[], float]:
        return lambda: _rate(lambda: caller.ask(method, **request))

    def program(*words: object) -> tuple[str, Callable[[], float]]:
        return "zfs", lambda: _rate(lambda: _zfs(*words))

    title = f"ListSnapshots of a volume with {SNAPSHOTS_OF_ONE}"
    report.add(compare(title, "/s", ours("ListSnapshots", id="bench/v0"), program(*snapshots, one)))
    report.add(compare("GetVolume", "/s", ours("GetVolume", id="bench/v0"), program("list", "-Hp", *volume, one)))
    everything = program("list", "-Hp", "-r", "-t", "volume", *volume, pool)
    report.add(_compare_once("ListVolumes", ours("ListVolumes"), everything))
    report.add(_compare_once("ListSnapshots of the pool", ours("ListSnapshots"), program(*snapshots, pool)))


def _rate(call: Callable[[], object]) -> float:
    """Calls per second."""
    begin, count = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - begin) < AT_LEAST_S or not count:
        call()
        count += 1
    return count / elapsed_s


def _compare_once(title: str, ours: Callable[[], float], reference: tuple[str, Callable[[], float]]) -> Row:
    """The program takes minutes over the whole pool: one turn."""
    row = Row(title, Figure("ours", "/s"), Figure(reference[0], "/s"))
    row.ours.values.append(ours())
    row.reference.values.append(reference[1]())
    return row


if __name__ == "__main__":
    main()
