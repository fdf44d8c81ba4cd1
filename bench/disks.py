"""Disks to measure with: about as compressible as a real system disk (gzip -6 makes a third of it)."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

MIB = 1 << 20


def write_disk(path: Path, size_mib: int, seed: int = 1) -> Path:
    """Fill a file with half noise, half text, in 64 KiB runs; no two runs are equal."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randint(3, 9)).hex().encode() for _ in range(2000)]
    text = b" ".join(rng.choices(words, k=200_000))
    with path.open("wb") as file:
        for _ in range(size_mib * 8):
            start = rng.randrange(len(text) - (64 << 10))
            file.write(rng.randbytes(32 << 10) + text[start : start + (96 << 10)])
    return path


def gzip_disk(path: Path) -> Path:
    """``path.gz`` as gzip(1) makes it."""
    target = path.with_name(path.name + ".gz")
    with target.open("wb") as out:
        subprocess.run(["gzip", "-6", "-c", str(path)], stdout=out, check=True, timeout=600)
    return target
