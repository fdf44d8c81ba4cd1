from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.errors import InvalidArgumentError
from rpc import messages
from rpc.messages import (
    Disk,
    Guest,
    GuestRequest,
    GuestResponse,
    Image,
    ImageRecord,
    ImageRequest,
    ImagesAnswer,
    Message,
    Nic,
    Progress,
    Snapshot,
    SnapshotRequest,
    SnapshotsAnswer,
    Volume,
    VolumeRequest,
    VolumesAnswer,
    bytes_from_mib,
    from_wire,
    mib_from_bytes,
    to_wire,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
REQUESTS = [ImageRequest, VolumeRequest, SnapshotRequest, GuestRequest]


def written(message: Message) -> Any:
    return msgspec.json.decode(msgspec.json.encode(to_wire(message)))


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (Image(), {"id": "", "type": "", "size": 0}),
        (
            Image(id="a", type="kvm", volume="p/images/a", snapshot="p/images/a@s", size_mib=3, status="complete"),
            {
                "id": "a",
                "type": "kvm",
                "volume": "p/images/a",
                "snapshot": "p/images/a@s",
                "size": 3,
                "status": "complete",
            },
        ),
        (
            Image(progress=Progress(stage="waiting")),
            {
                "id": "",
                "type": "",
                "size": 0,
                "progress": {"stage": "waiting", "received_bytes": 0, "expected_bytes": -1},
            },
        ),
        (Volume(), {"id": "", "size": 0, "device": ""}),
        (Snapshot(), {"id": "", "size": 0}),
        (ImageRequest(), {"id": "", "type": "", "dest": "", "source": ""}),
        (
            ImageRequest(wait=False, pending=True),
            {"id": "", "type": "", "dest": "", "source": "", "wait": False, "pending": True},
        ),
        (VolumeRequest(), {"id": "", "size": 0}),
        (
            SnapshotRequest(destroy_more_recent=True),
            {"id": "", "dest": "", "recursive": False, "destroyMoreRecent": True},
        ),
        (GuestRequest(), {"guest": {"id": ""}, "action": "", "args": None}),
        (GuestResponse(), {"guest": {"id": ""}}),
        (GuestResponse(message="m", retry=2), {"guest": {"id": ""}, "message": "m", "retry": 2}),
        (Guest(), {"id": ""}),
        (Disk(), {"bus": "", "device": "", "size": 0, "volume": "", "image": "", "source": ""}),
        (Nic(), {"network": "", "model": "", "address": "", "netmask": "", "gateway": "", "vlans": None}),
        (ImagesAnswer(), {"images": []}),
        (VolumesAnswer(), {"volumes": []}),
        (SnapshotsAnswer(), {"snapshots": []}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Message) else "",
)
def test_to_wire_of_each_struct_writes_what_the_table_says(message: Message, wire: Any) -> None:
    assert written(message) == wire


def test_to_wire_of_empty_image_record_writes_all_fields_and_zero_times() -> None:
    zero = "0001-01-01T00:00:00Z"
    assert written(ImageRecord(expected_size_bytes=-1)) == {
        **dict.fromkeys(["id", "source", "type", "comment", "status"], ""),
        "size": 0,
        "expected_size": -1,
        "download_start": zero,
        "download_end": zero,
    }


def test_from_wire_of_go_times_with_nanoseconds_keeps_microseconds() -> None:
    record = from_wire(
        ImageRecord, {"download_start": "2026-11-20T22:58:23.93157014Z", "download_end": "0001-01-01T00:00:00Z"}
    )
    assert record.download_start == datetime(2026, 11, 20, 22, 58, 23, 931570, UTC)
    assert record.download_end == messages.ZERO_TIME


@pytest.mark.parametrize(
    ("size_bytes", "size_mib"), [(0, 0), (1, 0), ((1 << 20) - 1, 0), (1 << 20, 1), ((5 << 20) + 7, 5)]
)
def test_mib_from_bytes_rounds_down(size_bytes: int, size_mib: int) -> None:
    assert mib_from_bytes(size_bytes) == size_mib


def test_bytes_from_mib_of_the_largest_size_fits_in_63_bits() -> None:
    assert bytes_from_mib(messages.SIZE_MIB_MAX) < 1 << 63


@pytest.mark.parametrize("kind", REQUESTS)
def test_from_wire_of_null_gives_defaults(kind: type[Message]) -> None:
    assert from_wire(kind, None) == kind()
    assert from_wire(kind, {}) == kind()


@pytest.mark.parametrize(
    "key", ["destroyMoreRecent", "destroymorerecent", "DESTROYMORERECENT", "De\u017ftroyMoreRecent"]
)
def test_from_wire_matches_keys_without_regard_to_case(key: str) -> None:
    assert from_wire(SnapshotRequest, {key: True}).destroy_more_recent


@pytest.mark.parametrize("value", [{"id": "exact", "ID": "other"}, {"ID": "other", "id": "exact"}])
def test_from_wire_of_two_spellings_prefers_the_exact_one(value: dict[str, str]) -> None:
    assert from_wire(ImageRequest, value).id == "exact"


def test_from_wire_of_null_fields_leaves_the_defaults() -> None:
    request = from_wire(
        GuestRequest, {"guest": {"id": None, "disks": None, "nics": [None], "cpu": None}, "action": None}
    )
    assert request == GuestRequest(guest=Guest(nics=[Nic()]))


def test_from_wire_ignores_unknown_keys_of_requests() -> None:
    assert from_wire(VolumeRequest, {"id": "v", "colour": "red"}) == VolumeRequest(id="v")


def test_unknown_keys_of_guest_disk_and_nic_come_back_as_they_came() -> None:
    guest = {
        "id": "g1",
        "owner": {"nested": [1, None, {"*": 2}]},
        "*": "a key like the one used inside",
        "disks": [{"bus": "virtio", "boot": 1, "*": {}}],
        "nics": [{"network": "n", "mtu": 9000}],
        "metadata": {"*": {"kept": True}, "Name": "x"},
    }
    back = written(from_wire(GuestRequest, {"guest": guest}))["guest"]
    assert back["owner"] == guest["owner"]
    assert back["*"] == guest["*"]
    assert back["metadata"] == guest["metadata"]
    assert back["disks"][0] | {"boot": 1, "*": {}} == back["disks"][0]
    assert back["nics"][0]["mtu"] == 9000


@pytest.mark.parametrize(
    ("kind", "value", "field"),
    [
        (ImageRequest, {"id": 5}, "id"),
        (ImageRequest, {"WAIT": "yes"}, "wait"),
        (VolumeRequest, {"size": "8"}, "size"),
        (VolumeRequest, {"size": 1.5}, "size"),
        (VolumeRequest, {"size": True}, "size"),
        (VolumeRequest, {"size": messages.SIZE_MIB_MAX + 1}, "size"),
        (VolumeRequest, {"size": 10**40}, "size"),
        (GuestRequest, {"guest": 1}, "guest"),
        (GuestRequest, {"guest": {"disks": {}}}, "guest.disks"),
        (GuestRequest, {"guest": {"disks": [{}, {"Size": []}]}}, "guest.disks[1].size"),
        (GuestRequest, {"guest": {"nics": [{"vlans": ["1"]}]}}, "guest.nics[0].vlans[0]"),
    ],
)
def test_from_wire_of_wrong_type_names_the_field(kind: type[Message], value: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^invalid argument: ") as caught:
        from_wire(kind, value)
    assert f" {field}: " in caught.value.message


@pytest.mark.parametrize("value", [5, "x", [], True])
def test_from_wire_of_no_object_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="invalid argument"):
        from_wire(ImageRequest, value)


def test_from_wire_reads_sizes_below_zero_for_the_method_to_refuse() -> None:
    assert from_wire(VolumeRequest, {"size": -1}).size_mib == -1


@given(kind=st.sampled_from(REQUESTS), value=JSON)
def test_from_wire_of_any_json_gives_a_struct_or_the_one_error(kind: type[Message], value: Any) -> None:
    try:
        message = from_wire(kind, value)
    except InvalidArgumentError as err:
        assert err.message.startswith("invalid argument")  # noqa: PT017
        return
    assert from_wire(kind, written(message)) == message


@given(extra=st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_guest_with_any_unknown_keys_returns_them(extra: dict[str, Any]) -> None:
    known = {
        name.casefold()
        for name in ("id", "type", "image", "nics", "disks", "state", "memory", "cpu", "vnc", "metadata")
    }
    foreign = {key: value for key, value in extra.items() if key.casefold() not in known}
    request = from_wire(GuestRequest, {"guest": {**foreign, "id": "g"}})
    assert to_wire(request)["guest"] == {**foreign, "id": "g"}
