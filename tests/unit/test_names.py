"""Names: no accepted name leaves the pool, every accepted name round-trips, the grammar is ZFS's."""

from __future__ import annotations

import os.path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import InvalidNameError
from imaging.names import (
    NAME_MAX_BYTES,
    DatasetName,
    GuestId,
    ImageId,
    PoolName,
    SnapshotName,
    is_snapshot_part,
    parse_wire_name,
)

POOL = PoolName.parse("tank")

# Hostile by construction: everything a name is made of, and everything that has ever broken one.
PARTS = [
    "a",
    "b0",
    "..",
    ".",
    "",
    "/",
    "@",
    "#",
    "%recv",
    "-r",
    " ",
    "\n",
    "\0",
    "é",
    "tank",
    "..a",
    "a..",
    ":",
    "_",
    "\\",
    "~",
]
hostile = st.lists(st.sampled_from(PARTS), max_size=8).map("".join) | st.lists(st.sampled_from(PARTS), max_size=5).map(
    "/".join
)
wire_ids = hostile | st.text(max_size=40) | st.text(alphabet="ab/@.-:_% ", max_size=300)


@settings(deadline=None)
@given(wire_ids)
def test_wire_name_accepted_never_leaves_the_pool(wire_id: str) -> None:
    try:
        name = parse_wire_name(POOL, wire_id)
    except InvalidNameError:
        return
    dataset = name.dataset if isinstance(name, SnapshotName) else name
    assert dataset.pool == POOL
    assert dataset.is_within(POOL.root)
    assert dataset != POOL.root
    assert str(name) == f"tank/{wire_id}"
    path = os.path.normpath(f"/state/{name}")
    assert path == f"/state/{name}"
    assert path.startswith("/state/tank/")
    assert len(str(name).encode()) <= NAME_MAX_BYTES
    assert not any(part.startswith("-") or "%" in part for part in dataset.parts)


@settings(deadline=None)
@given(wire_ids)
def test_wire_name_accepted_round_trips(wire_id: str) -> None:
    try:
        name = parse_wire_name(POOL, wire_id)
    except InvalidNameError:
        return
    if isinstance(name, SnapshotName):
        assert SnapshotName.parse(str(name)) == name
        assert name.dataset @ name.snapshot == name
        assert is_snapshot_part(name.snapshot)
    else:
        assert DatasetName.parse(str(name)) == name
        assert name.parent is not None
        assert name.parent / name.leaf == name
        assert f"{POOL}/{name.relative}" == str(name)


@settings(deadline=None)
@given(hostile | st.text(max_size=200))
def test_image_id_accepted_is_safe_as_path_dataset_and_url(text: str) -> None:
    try:
        ImageId.parse(text)
    except InvalidNameError:
        with pytest.raises(InvalidNameError):
            GuestId.parse(text)
        return
    assert os.path.basename(text) == text  # noqa: PTH119
    assert text not in {"", ".", ".."}
    assert quote(text, safe="") == text
    assert (POOL.root / text).leaf == text
    assert str(GuestId.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "tank/a", "tank/a/b", "tank/a-b", "tank/a_b.c:d", "tank/.hidden", "tank/..a", "tank/1", "tank", "t-1/x",
        "tank/" + "x" * (NAME_MAX_BYTES - 5),
    ],
)  # fmt: skip
def test_dataset_name_valid_is_accepted(text: str) -> None:
    assert str(DatasetName.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "tank/", "/tank", "tank//a", "tank/.", "tank/..", "tank/../other", "tank/-rf", "tank/a b", "tank/a@b",
        "tank/a#b", "tank/%recv", "tank/a\n", "tank/a\0", "tank/é", "1tank/a", "mirror/a", "raidz/a", "log", "-tank/a",
        "tank/" + "x" * (NAME_MAX_BYTES - 4), "x" * 10_000,
    ],
)  # fmt: skip
def test_dataset_name_invalid_is_refused(text: str) -> None:
    with pytest.raises(InvalidNameError):
        DatasetName.parse(text)


@pytest.mark.parametrize("text", ["tank@s", "tank/a@s-1", "tank/a@-s", "tank/a@2026:1.2_3"])
def test_snapshot_name_valid_is_accepted(text: str) -> None:
    assert str(SnapshotName.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["tank/a", "tank/a@", "@s", "tank/a@b@c", "tank/a@b/c", "tank/a@b c", "tank/../a@s", "tank/a@s\n"]
)
def test_snapshot_name_invalid_is_refused(text: str) -> None:
    with pytest.raises(InvalidNameError):
        SnapshotName.parse(text)


def test_refused_name_says_the_words_old_clients_know_and_keeps_the_name_in_a_note() -> None:
    with pytest.raises(InvalidNameError) as caught:
        parse_wire_name(POOL, "../escape")
    assert caught.value.message == "not a valid dataset"
    assert "../escape" in caught.value.__notes__[0]


def test_dataset_names_order_by_component_as_zfs_lists_them() -> None:
    texts = ["tank/a-b", "tank/a", "tank/a/b", "tank", "tank/b"]
    assert [str(name) for name in sorted(map(DatasetName.parse, texts))] == [
        "tank",
        "tank/a",
        "tank/a/b",
        "tank/a-b",
        "tank/b",
    ]


def test_is_within_goes_by_component_not_by_prefix() -> None:
    assert DatasetName.parse("tank/a/b").is_within(DatasetName.parse("tank/a"))
    assert DatasetName.parse("tank/a").is_within(DatasetName.parse("tank/a"))
    assert not DatasetName.parse("tank/ab").is_within(DatasetName.parse("tank/a"))
    assert not DatasetName.parse("tank").is_within(DatasetName.parse("tank/a"))
    assert POOL.root.parent is None
    assert POOL.root.relative == ""
