"""Packages: streams of one volume in order, the choice among several, filesystems passed over."""

from __future__ import annotations

import io

import pytest

from imaging.errors import BadDataError, ConflictError, InvalidArgumentError
from imaging.sendstream import nvlist
from imaging.sendstream.package import package_end, packaged_datasets
from imaging.sendstream.records import MAGIC, Begin
from imaging.sendstream.validator import Policy, StreamValidator
from imaging.sendstream.volume import VolumeState, apply_stream
from imaging.sendstream.writer import StreamWriter
from tests.codec import samples


def package(*names: str, payload: bytes = b"") -> bytes:
    writer = StreamWriter()
    begin = Begin(0, MAGIC, 2, 0, 0, 0, 0, 0, b"mistify/all@s1".ljust(256, b"\0"))
    head = writer.begin(begin, payload) + writer.package_head_end()
    return head + b"".join(map(samples.load, names)) + package_end()


def apply(data: bytes, dataset: str | None = None) -> VolumeState:
    with samples.scratch() as fd:
        return apply_stream(io.BytesIO(data), fd, dataset=dataset)


def test_full_stream_and_its_increments_are_applied_in_order() -> None:
    state = apply(package("plain-full-s1", "plain-inc-s1-s2", "plain-inc-s2-s3-shrink"))
    assert (state.toname, state.volsize_bytes) == ("mistify/plain@s3", 12582912)


def test_increments_out_of_order_are_refused() -> None:
    with pytest.raises(ConflictError, match="needs a volume with guid"):
        apply(package("plain-full-s1", "plain-inc-s2-s3-shrink", "plain-inc-s1-s2"))


def test_several_volumes_need_a_choice() -> None:
    data = package("b512-full", "empty-full")
    with pytest.raises(InvalidArgumentError, match=r"mistify/b512.*mistify/empty"):
        apply(data)
    assert apply(data, "mistify/b512").volsize_bytes == 1 << 20
    assert apply(data, "mistify/empty").volsize_bytes == 8 << 20
    with pytest.raises(BadDataError, match="no stream of the volume"):
        apply(data, "mistify/absent")


def test_filesystem_beside_the_volume_is_passed_over_but_verified() -> None:
    data = package("fs-inc", "empty-full", "fs-Lec")
    assert apply(data).toname == "mistify/empty@s1"
    damaged = bytearray(data)
    damaged[-1000] ^= 1
    with pytest.raises(BadDataError, match="checksum mismatch"):
        apply(bytes(damaged))


def test_package_of_nothing_is_refused() -> None:
    with pytest.raises(BadDataError, match="no stream"):
        apply(package())
    validator = StreamValidator(policy=Policy(opaque=True))
    validator.verify(package())
    with pytest.raises(BadDataError, match="no stream"):
        validator.finish()


def test_firewall_lets_one_dataset_through() -> None:
    validator = StreamValidator()
    with pytest.raises(BadDataError, match="several datasets"):
        validator.feed(package("b512-full", "empty-full"))


@pytest.mark.parametrize(
    "values",
    [{"fss": 5}, {"fss": {"0x1": 5}}, {"fss": {"0x1": {}}}, {"fss": {"0x1": {"name": "a", "props": 5}}}],
)
def test_malformed_list_of_datasets_is_refused(values: nvlist.NvList) -> None:
    with pytest.raises(BadDataError):
        packaged_datasets(nvlist.encode_xdr(values))
    with pytest.raises(BadDataError):
        apply(package("b512-full", payload=nvlist.encode_xdr(values)))
