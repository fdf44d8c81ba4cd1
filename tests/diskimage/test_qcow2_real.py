"""qcow2 images made by qemu-img read back as the disk they were made from."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from imaging.diskimage import DiskFormat, content_digest, open_disk, write_raw
from imaging.errors import UnsupportedError

pytestmark = pytest.mark.backend("qemu")

SIZE_BYTES = (5 << 20) + 512 * 3
"""Not a multiple of any cluster size."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with noise, text, zeros that are stored and holes."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    rng = random.Random(20261121)
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for offset, data in (
            (0, rng.randbytes(70_000)),
            (1 << 20, b"compressible " * 20_000),
            (2 << 20, bytes(200_000)),
            ((3 << 20) + 1234, rng.randbytes(10)),
            (SIZE_BYTES - 512, rng.randbytes(512)),
        ):
            file.seek(offset)
            file.write(data)
    return path


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def raw_digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


VARIANTS = {
    "v2": ["-o", "compat=0.10"],
    "v3": ["-o", "compat=1.1"],
    "small-clusters": ["-o", "cluster_size=512"],
    "large-clusters": ["-o", "cluster_size=2M"],
    "zlib": ["-c"],
    "zlib-4k": ["-c", "-o", "cluster_size=4k"],
    "zstd": ["-c", "-o", "compression_type=zstd"],
    "zstd-2M": ["-c", "-o", "compression_type=zstd,cluster_size=2M"],
    "stored-zeros": ["-S", "0"],
    "lazy-refcounts": ["-o", "lazy_refcounts=on"],
    "refcounts-1-bit": ["-o", "refcount_bits=1"],
    "preallocated": ["-o", "preallocation=metadata"],
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_qcow2_of_every_variant_is_the_disk_it_was_made_from(raw: Path, tmp_path: Path, options: list[str]) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
    copy = tmp_path / "copy.raw"
    with image.open("rb") as file, copy.open("wb") as out:
        disk = open_disk(file.fileno())
        assert disk.format is DiskFormat.QCOW2
        assert disk.virtual_size_bytes == SIZE_BYTES
        assert str(content_digest(disk)) == raw_digest(raw)
        out.truncate(disk.virtual_size_bytes)
        write_raw(disk, out.fileno())
    assert raw_digest(copy) == raw_digest(raw)


def test_qcow2_with_internal_snapshot_reads_the_active_state(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    qemu_img("snapshot", "-c", "before", image)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 64k", "-c", "write -z 0 64k", str(image)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    expected = bytearray(raw.read_bytes())
    expected[1 << 20 : (1 << 20) + (64 << 10)] = b"\x5a" * (64 << 10)
    expected[: 64 << 10] = bytes(64 << 10)
    with image.open("rb") as file:
        assert content_digest(open_disk(file.fileno())).hex == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-b", "/etc/hostname", "-F", "raw"], "backing file"),
        (["-o", "data_file={dir}/data,data_file_raw=on"], "external data file"),
        (["-o", "extended_l2=on"], "extended L2"),
        (["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"], "encryption"),
    ],
    ids=["backing", "data-file", "extended-l2", "aes"],
)
def test_qcow2_that_reaches_elsewhere_is_refused_by_name(tmp_path: Path, options: list[str], words: str) -> None:
    image = tmp_path / "bad.qcow2"
    qemu_img("create", "-f", "qcow2", *(option.format(dir=tmp_path) for option in options), image, "1M")
    with image.open("rb") as file, pytest.raises(UnsupportedError, match=words):
        open_disk(file.fileno())


def test_raw_disk_reads_only_its_data_runs(raw: Path) -> None:
    with raw.open("rb") as file:
        disk = open_disk(file.fileno())
        assert disk.format is DiskFormat.RAW
        assert sum(extent.size_bytes for extent in disk.extents()) <= raw.stat().st_blocks * 512
        assert str(content_digest(disk)) == raw_digest(raw)
