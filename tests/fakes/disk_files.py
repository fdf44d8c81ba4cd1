"""Disks for tests of formats: sparse, deterministic, and the same disk in every format."""

from __future__ import annotations

import gzip
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

QEMU_TIMEOUT_S = 120.0
BLOCK_BYTES = 16 << 10


def disk_bytes(seed: int, blocks: int = 64) -> bytes:
    """A disk of blocks: some random, some that repeat, some zero."""
    rng = random.Random(seed)
    kinds: list[Callable[[int], bytes]] = [rng.randbytes, bytes, lambda size: bytes([seed % 251 + 1]) * size]
    return b"".join(rng.choice(kinds)(BLOCK_BYTES) for _ in range(blocks))


def changed(data: bytes, *blocks: int) -> bytes:
    """The disk with other data in these blocks, and nothing in the one after each."""
    disk = bytearray(data)
    for number in blocks:
        start = number * BLOCK_BYTES
        disk[start : start + BLOCK_BYTES] = random.Random(number).randbytes(BLOCK_BYTES)
        disk[start + BLOCK_BYTES : start + 2 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    return bytes(disk)


def qcow2(directory: Path, data: bytes, *options: str) -> bytes:
    """The disk as qemu-img writes it."""
    raw, image = directory / "disk.raw", directory / "disk.qcow2"
    raw.write_bytes(data)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=QEMU_TIMEOUT_S)
    return image.read_bytes()


def encodings(directory: Path, data: bytes) -> dict[str, bytes]:
    """The disk in every format that is no stream."""
    return {
        "raw": data,
        "raw.gz": gzip.compress(data, 1, mtime=0),
        "qcow2": qcow2(directory, data),
        "qcow2 v2": qcow2(directory, data, "-o", "compat=0.10"),
        "qcow2 packed": qcow2(directory, data, "-c"),
        "qcow2 zstd": qcow2(directory, data, "-c", "-o", "compression_type=zstd"),
        "qcow2 small": qcow2(directory, data, "-o", "cluster_size=4096"),
        "qcow2.gz": gzip.compress(qcow2(directory, data), 1, mtime=0),
    }
