"""qcow2 files of ours, read by our reader and by qemu-img."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from imaging.diskimage.probe import content_digest, open_disk
from imaging.diskimage.qcow2_writer import CLUSTER_BYTES, write_qcow2

SEED = random.SystemRandom().randrange(1 << 32)


def written(raw: Path, target: Path) -> Path:
    with raw.open("rb") as source, target.open("w+b") as file:
        write_qcow2(open_disk(source.fileno()), file.fileno())
    return target


def make_raw(path: Path, size: int, *data: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
        for offset, piece in data:
            os.pwrite(file.fileno(), piece, offset)
    return path


DISKS = {
    "empty": (1 << 20, []),
    "start and end": (700 << 20, [(0, b"a"), ((700 << 20) - 1, b"z")]),
    "across clusters": (1 << 20, [(CLUSTER_BYTES - 3, b"across")]),
    "odd sectors": (512 * 1001, [(512 * 1000, b"x" * 512)]),
    "random": (5 << 20, [(12345, random.Random(SEED).randbytes(2 << 20))]),
}


@pytest.mark.parametrize("case", list(DISKS))
def test_qcow2_holds_the_disk_and_qemu_finds_no_fault(tmp_path: Path, case: str) -> None:
    size, data = DISKS[case]
    raw = make_raw(tmp_path / "disk.raw", size, *data)
    image = written(raw, tmp_path / "disk.qcow2")
    with raw.open("rb") as plain, image.open("rb") as packed:
        assert content_digest(open_disk(packed.fileno())) == content_digest(open_disk(plain.fileno())), SEED
    check = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(image)], capture_output=True, check=False, timeout=120
    )
    assert check.returncode == 0, check.stderr
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(image)]
    assert subprocess.run(compare, capture_output=True, check=False, timeout=120).returncode == 0
    again = written(image, tmp_path / "again.qcow2")
    assert again.read_bytes() == image.read_bytes(), "equal disks are equal files"
