"""The firewall before the kernel, with a pipe's reader in the kernel's place: what passes, and that END does not."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from agent_image.drivers.zfs import firewall
from agent_image.drivers.zfs.firewall import PeekedSource, pour
from imaging.errors import BadDataError, BusyError, ConflictError, UnavailableError, UnsupportedError
from imaging.sendstream.records import HEADER_BYTES, RecordType
from imaging.sendstream.state import VolumeState
from imaging.sendstream.validator import StreamValidator
from tests.codec import samples

FULL = "gen-full-8k"


class Kernel:
    """Reads the pipe as lzc_receive does; fails if the stream ends without END, or after ``limit_bytes`` on purpose."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.got = b""
        self._limit_bytes = limit_bytes

    def __call__(self, fd: int) -> None:
        while data := os.read(fd, 1 << 16):
            self.got += data
            if self._limit_bytes is not None and len(self.got) > self._limit_bytes:
                raise BusyError("the kernel has enough")
        if self.got[-HEADER_BYTES:][:4] != RecordType.END.to_bytes(4, "little"):
            raise BadDataError("the stream ends early")


def base_of(name: str) -> VolumeState:
    entry = samples.manifest()[name]["result"]
    return VolumeState(int(entry["guid"]), 0, entry["volsize"], entry["volblocksize"], entry["creation"], "tank/v@s")


def test_good_stream_passes_byte_for_byte() -> None:
    kernel = Kernel()
    guid = pour(io.BytesIO(samples.load(FULL)), None, kernel)
    assert kernel.got == samples.load(FULL)
    assert guid == int(samples.manifest()[FULL]["result"]["guid"])


def test_increment_passes_onto_its_base_only() -> None:
    kernel = Kernel()
    pour(io.BytesIO(samples.load("gen-inc-8k")), base_of(FULL), kernel)
    assert kernel.got == samples.load("gen-inc-8k")
    for base in (None, base_of("gen-empty")):
        kernel = Kernel()
        with pytest.raises(ConflictError):
            pour(io.BytesIO(samples.load("gen-inc-8k")), base, kernel)
        assert kernel.got == b""


@pytest.mark.parametrize("name", samples.names(expect="error"))
def test_damaged_or_dangerous_stream_never_gets_its_end_through(name: str) -> None:
    kernel = Kernel()
    bases = samples.manifest()[name].get("base", [])
    base = None
    if bases:
        validator = StreamValidator()
        validator.verify(samples.load(bases[-1]))
        summary = validator.summaries[-1]
        assert summary.volsize_bytes is not None
        assert summary.volblocksize_bytes is not None
        base = VolumeState(summary.guid, 0, summary.volsize_bytes, summary.volblocksize_bytes, 1, "tank/v@s")
    with pytest.raises((BadDataError, UnsupportedError)):
        pour(io.BytesIO(samples.load(name)), base, kernel)
    assert samples.load(name).startswith(kernel.got) or name.startswith("pkg-")
    if kernel.got:
        with pytest.raises(BadDataError):
            Kernel()(_pipe_with(kernel.got))


def _pipe_with(data: bytes) -> int:
    read_fd = os.memfd_create("stream")
    os.write(read_fd, data)
    os.lseek(read_fd, 0, os.SEEK_SET)
    return read_fd


def test_package_of_one_stream_is_unwrapped() -> None:
    kernel = Kernel()
    package = samples.load("gen-props-package")
    peeked = PeekedSource(io.BytesIO(package))
    assert peeked.fromguid() == 0
    guid = pour(peeked, None, kernel)
    assert guid == int(samples.manifest()["gen-props-package"]["result"]["guid"])
    assert kernel.got in package
    assert package.endswith(kernel.got[-HEADER_BYTES:] + package[-HEADER_BYTES:])


def test_package_of_several_streams_stops_before_the_first_end() -> None:
    kernel = Kernel()
    package = samples.load("plain-I-s1-s3-package")
    peeked = PeekedSource(io.BytesIO(package))
    assert peeked.fromguid() == int(samples.manifest()["plain-full-s1"]["result"]["guid"])
    with pytest.raises(UnsupportedError, match="several streams"):
        pour(peeked, base_of("plain-full-s1"), kernel)
    assert kernel.got[-HEADER_BYTES:][:4] != RecordType.END.to_bytes(4, "little")


def test_refusal_of_the_kernel_reaches_the_caller() -> None:
    with pytest.raises(BusyError, match="has enough"):
        pour(io.BytesIO(samples.load(FULL)), None, Kernel(limit_bytes=1000))


class BrokenSource:
    """Gives some bytes, then fails."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int = -1, /) -> bytes:
        if not self._data:
            raise UnavailableError("the sender went away")
        data, self._data = self._data, b""
        return data


def test_source_that_fails_is_reported_and_the_kernel_gets_no_end() -> None:
    kernel = Kernel()
    with pytest.raises(UnavailableError, match="sender went away"):
        pour(BrokenSource(samples.load(FULL)[:100_000]), None, kernel)
    assert 0 < len(kernel.got) < 100_000


def test_what_is_wrong_with_the_source_is_reported_however_the_kernel_fails() -> None:
    def confused(fd: int) -> None:
        while os.read(fd, 1 << 16):
            pass
        raise ValueError("not a whole record")

    with pytest.raises(UnavailableError, match="sender went away"):
        pour(BrokenSource(samples.load(FULL)[:100_000]), None, confused)


def test_kernel_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "STALL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(firewall, "PIPE_BYTES", 4096)
    release_fd, hold_fd = os.pipe()

    def stuck(fd: int) -> None:
        os.read(release_fd, 1)

    try:
        with pytest.raises(UnavailableError, match="took nothing"):
            pour(io.BytesIO(samples.load(FULL)), None, stuck, keeps={release_fd})
    finally:
        os.close(hold_fd)


def test_kernel_has_no_other_descriptors_than_its_own_and_those_kept() -> None:
    """Or our death would not end its wait, and a client's connection would stay open as long as a receive lasts."""
    kept_fd, other_fd = os.memfd_create("kept"), os.memfd_create("other")
    seen: list[set[int]] = []

    def look(fd: int) -> None:
        seen.append({int(entry.name) for entry in Path("/proc/thread-self/fd").iterdir()} - {0, 1, 2, fd})
        Kernel()(fd)

    before = len(list(Path("/proc/self/fd").iterdir()))
    pour(io.BytesIO(samples.load(FULL)), None, look, keeps={kept_fd})
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert kept_fd in seen[0]
    assert other_fd not in seen[0]
    assert len(seen[0]) == 2  # the other is the one the list is read with
    for fd in (kept_fd, other_fd):
        os.fstat(fd)
        os.close(fd)


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 311, b"\0" * 312, b"\xff" * 1000])
def test_what_is_no_stream_is_refused_at_the_first_look(data: bytes) -> None:
    with pytest.raises((BadDataError, UnsupportedError)):
        PeekedSource(io.BytesIO(data)).fromguid()


def test_peeked_source_gives_everything_afterwards() -> None:
    peeked = PeekedSource(io.BytesIO(samples.load("gen-inc-8k")))
    assert peeked.fromguid() == int(samples.manifest()[FULL]["result"]["guid"])
    data = b""
    while piece := peeked.read(1000):
        data += piece
    assert data == samples.load("gen-inc-8k")
