"""Encode, verify and apply of volume streams against sha256 of the same data."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.disks import write_disk
from bench.harness import Report, compare, mb_per_s, stopwatch
from imaging.sendstream import backend
from imaging.sendstream.validator import StreamValidator
from imaging.sendstream.volume import StreamHeader, apply_stream, make_stream

SIZE_MIB = 256
BLOCK_KIB = (16, 8)
"""The defaults of ZFS since 2.2 and before."""
PIECE_BYTES = 1 << 20


def run(report: Report, workdir: Path) -> None:
    """Measure on a disk of SIZE_MIB in the page cache."""
    raw = write_disk(workdir / "codec.raw", SIZE_MIB)
    for block_kib in BLOCK_KIB:
        _compare(report, raw, block_kib, workdir / "applied.raw")
    report.note(f"inner loops in: {backend.name()}")


def _compare(report: Report, raw: Path, block_kib: int, target: Path) -> None:
    stream = b"".join(_encode(raw, block_kib))
    for title, data, ours in (
        ("stream encode", raw.read_bytes(), lambda: _drain(_encode(raw, block_kib))),
        ("stream verify (all checksums and rules)", stream, lambda: _verify(stream)),
        ("stream apply to a sparse file", raw.read_bytes(), lambda: _apply(stream, target)),
    ):
        sha256 = _speed(len(data), functools.partial(_sha256, data))
        name = f"{title}, {block_kib}K blocks"
        report.add(compare(name, "MB/s", _speed(len(data), ours), ("sha256", sha256)))


def _speed(size_bytes: int, work: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        with stopwatch() as elapsed:
            work()
        return mb_per_s(size_bytes, elapsed())

    return measure


def _encode(raw: Path, block_kib: int) -> Iterator[bytes]:
    header = StreamHeader(toname="bench/disk@1", guid=1, creation_s=1, volblocksize_bytes=block_kib << 10)
    with raw.open("rb") as file:
        yield from make_stream(file.fileno(), raw.stat().st_size, header)


def _drain(pieces: Iterator[bytes]) -> int:
    return sum(len(piece) for piece in pieces)


def _verify(stream: bytes) -> int:
    validator = StreamValidator()
    passed = 0
    for start in range(0, len(stream), PIECE_BYTES):
        passed += len(validator.feed(stream[start : start + PIECE_BYTES]))
    return passed + len(validator.finish())


def _apply(stream: bytes, target: Path) -> None:
    with target.open("w+b") as file:
        apply_stream(io.BytesIO(stream), file.fileno())
        os.ftruncate(file.fileno(), 0)


def _sha256(data: bytes) -> str:
    hasher = hashlib.sha256()
    for start in range(0, len(data), PIECE_BYTES):
        hasher.update(memoryview(data)[start : start + PIECE_BYTES])
    return hasher.hexdigest()
