"""Measuring side by side: runs take turns, medians and their ratio are what counts."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

ROUNDS = 3
"""Turns of each side; odd, so that the median is one of the measurements."""


def busy_s() -> float:
    """Seconds all processors of this machine have worked so far, for whomever (proc(5): user, nice, system, irq, softirq)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    return (ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Figure:
    """One contestant's measurements, in ``unit``."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:,.1f} {self.unit} ({min(self.values):,.1f} to {max(self.values):,.1f})"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report: ours against a reference."""

    title: str
    ours: Figure
    reference: Figure

    @property
    def ratio(self) -> float:
        """Median over rounds of ours / reference, pair by pair."""
        return statistics.median(a / b for a, b in zip(self.ours.values, self.reference.values, strict=True) if b)

    def markdown(self) -> str:
        return f"| {self.title} | {self.ours} | {self.reference.name}: {self.reference} | {self.ratio:.2f} |"


@dataclass(slots=True)
class Report:
    """What one run of the benchmarks found."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.markdown(), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def markdown(self) -> str:
        head = ["| what | ours: median (min to max) | reference | ours / reference |", "| --- | --- | --- | --- |"]
        table = [*head, *(row.markdown() for row in self.rows), ""] if self.rows else []
        return "\n".join([*table, *(f"- {note}" for note in self.notes)])


def compare(
    title: str, unit: str, ours: Callable[[], float], reference: tuple[str, Callable[[], float]], rounds: int = ROUNDS
) -> Row:
    """Run both in turn, once unmeasured to warm up, then ``rounds`` times."""
    row = Row(title, Figure("ours", unit), Figure(reference[0], unit))
    for turn in range(rounds + 1):
        pair = (ours(), reference[1]())
        if turn:
            row.ours.values.append(pair[0])
            row.reference.values.append(pair[1])
    return row


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block was entered; the value stops growing when it ends."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: (ended[0] if ended else time.perf_counter()) - started
    ended.append(time.perf_counter())


def mb_per_s(size_bytes: int, seconds: float) -> float:
    """Decimal megabytes per second."""
    return size_bytes / 1e6 / seconds


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB (``VmRSS``)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class PeakMemory:
    """Samples the resident memory of processes while a block runs."""

    SAMPLE_S = 0.05

    def __init__(self, pids: Sequence[int]) -> None:
        self.peak_mib = dict.fromkeys(pids, 0.0)
        self._stop = Event()
        self._thread = Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self.SAMPLE_S):
            for pid in self.peak_mib:
                self.peak_mib[pid] = max(self.peak_mib[pid], resident_mib(pid))

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def machine() -> str:
    """One line about where the figures come from."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{os.cpu_count()} CPUs ({cpu}), Linux {platform.release().split('-')[0]}, CPython {platform.python_version()}"
    )
