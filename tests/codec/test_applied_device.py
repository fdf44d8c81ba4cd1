"""A volume that is a block device: cannot be replaced, cannot change its size, shows no time of its last write.

Devices need privileges, so a plain file is passed off as one: the two calls that tell them apart are replaced.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import struct
from pathlib import Path

import pytest

from imaging.errors import BusyError, ConflictError, MistifyError, NoSpaceError
from imaging.sendstream.applied import AppliedVolume
from tests.codec import samples

DEVICE_BYTES = 32 << 20


@pytest.fixture(name="device")
def _device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "dev"
    path.write_bytes(random.Random(1).randbytes(DEVICE_BYTES))
    monkeypatch.setattr(stat, "S_ISBLK", stat.S_ISREG)
    monkeypatch.setattr(
        "imaging.sendstream.image.ioctl", lambda fd, _request, _room: struct.pack("Q", os.fstat(fd).st_size)
    )
    return path


def apply(device: Path, name: str, *, replace: bool = False) -> str:
    return AppliedVolume(device).apply(io.BytesIO(samples.load(name)), replace=replace).digest.hex


def result(name: str) -> str:
    return str(samples.manifest()[name]["result"]["sha256"])


def test_chain_onto_a_device_gives_the_stated_content(device: Path) -> None:
    inode = device.stat().st_ino
    assert apply(device, "plain-full-s1", replace=True) == result("plain-full-s1")
    for name in ("plain-inc-s1-s2", "plain-inc-s2-s3-shrink"):
        assert apply(device, name) == result(name)
    size = samples.manifest()["plain-inc-s2-s3-shrink"]["result"]["volsize"]
    assert hashlib.sha256(device.read_bytes()[:size]).hexdigest() == result("plain-inc-s2-s3-shrink")
    assert (device.stat().st_ino, device.stat().st_size) == (inode, DEVICE_BYTES)


def test_full_stream_onto_a_device_clears_what_was_there(device: Path) -> None:
    apply(device, "gen-empty", replace=True)
    assert not any(device.read_bytes())


def test_device_that_no_stream_made_is_not_overwritten(device: Path) -> None:
    before = device.read_bytes()
    with pytest.raises(MistifyError, match="no stream has been applied to the device"):
        apply(device, "plain-full-s1")
    assert device.read_bytes() == before


def test_device_changed_since_is_found_out_by_its_content(device: Path) -> None:
    """Even if everything ``stat`` tells is as it was."""
    apply(device, "plain-full-s1", replace=True)
    status = device.stat()
    with device.open("r+b") as file:
        file.write(b"a guest wrote here")
    os.utime(device, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ConflictError, match="changed after the last stream"):
        apply(device, "plain-inc-s1-s2")


def test_device_with_a_broken_apply_is_marked_until_a_full_stream_comes(device: Path) -> None:
    apply(device, "plain-full-s1", replace=True)
    with pytest.raises(MistifyError, match="truncated"):
        AppliedVolume(device).apply(io.BytesIO(samples.load("plain-inc-s1-s2")[:-1]))
    with pytest.raises(ConflictError, match="left incomplete"):
        apply(device, "plain-inc-s1-s2")
    assert apply(device, "plain-full-s1", replace=True) == result("plain-full-s1")


def test_device_too_small_is_no_space(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imaging.sendstream.image.ioctl", lambda *_: struct.pack("Q", 1 << 20))
    with pytest.raises(NoSpaceError):
        apply(device, "plain-full-s1", replace=True)


def test_device_is_locked_itself_while_a_stream_is_applied(device: Path) -> None:
    class Second:
        """A source in whose middle another apply begins."""

        data = io.BytesIO(samples.load("plain-full-s1"))

        def read(self, size: int = -1, /) -> bytes:
            with pytest.raises(BusyError, match="another process"):
                apply(device, "plain-full-s1", replace=True)
            return self.data.read(size)

    AppliedVolume(device).apply(Second(), replace=True)
    assert sorted(path.name for path in device.parent.iterdir()) == ["dev", "dev.stream.json"]
