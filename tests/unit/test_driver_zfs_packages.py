"""What stands around the kernel's stream in a package, without a kernel."""

from __future__ import annotations

from typing import Any

import pytest

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.zfs.packages import head_of
from imaging.names import DatasetName, SnapshotName
from imaging.sendstream import nvlist
from imaging.sendstream.package import package_end, packaged_datasets
from imaging.sendstream.records import HEADER_BYTES, RecordType, payload_size
from imaging.sendstream.validator import StreamValidator
from tests.codec import samples

NAME = SnapshotName.parse("tank/v@s1")
SENT = SnapshotInfo(NAME, 77, 5, 1, 1 << 20)


def dataset(**properties: str) -> DatasetInfo:
    info = {name.replace("_", ":"): text for name, text in properties.items()}
    return DatasetInfo(DatasetName.parse("tank/v"), DatasetKind.VOLUME, 99, 4, 1, properties=info)


def payload_of(head: bytes) -> bytes:
    return head[HEADER_BYTES : HEADER_BYTES + payload_size(RecordType.BEGIN, head)]


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ({}, {}),
        ({b"compression": b"lz4", b"readonly": b"on"}, {"compression": 15, "readonly": 1}),
        ({b"compression": b"off", b"readonly": b"off"}, {"compression": 2, "readonly": 0}),
        ({b"compression": b"gzip-9"}, {"compression": 13}),
        ({b"compression": b"zstd-19"}, {}),
        ({b"compression": b"something new"}, {}),
        ({b"refreservation": 5 << 20}, {"refreservation": 5 << 20}),
        ({b"refreservation": 0}, {}),
    ],
)
def test_native_properties_are_numbers_or_left_out(native: dict[bytes, Any], expected: dict[str, int]) -> None:
    (described,) = packaged_datasets(payload_of(head_of(SENT, dataset(), native, base=None, origin_guid=0)))
    assert described.properties == expected


def test_package_names_the_volume_its_users_properties_and_the_snapshot() -> None:
    head = head_of(SENT, dataset(org_id="x y", readonly="on"), {}, base="tank/v@s0", origin_guid=12)
    (described,) = packaged_datasets(payload_of(head))
    assert (described.name, described.origin_guid, described.snapshots) == ("tank/v", 12, {"s1": 77})
    assert described.properties == {"org:id": "x y"}
    values = nvlist.decode(payload_of(head))
    assert (values["tosnap"], values["fromsnap"]) == ("s1", "s0")
    assert "fromsnap" not in nvlist.decode(payload_of(head_of(SENT, dataset(), {}, base="tank/v#b", origin_guid=0)))


def test_package_around_a_stream_of_the_kernel_is_valid() -> None:
    head = head_of(SENT, dataset(org_id="x"), {b"compression": b"lz4"}, base=None, origin_guid=0)
    validator = StreamValidator()
    validator.feed(head + samples.load("plain-full-s1") + package_end())
    validator.finish()
    assert [str(summary.guid) for summary in validator.summaries] == [
        samples.manifest()["plain-full-s1"]["result"]["guid"]
    ]
