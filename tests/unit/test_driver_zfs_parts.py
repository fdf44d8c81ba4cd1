"""Parts of the zfs driver that need no ZFS: properties, sizes, lines of the zfs program, names of temporary datasets, the binding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agent_image.drivers.base import DatasetInfo, DatasetKind, SnapshotInfo
from agent_image.drivers.zfs import binding
from agent_image.drivers.zfs.hidden import MARK, Purpose, is_hidden, is_ours, new_name, without_mark
from agent_image.drivers.zfs.programs import dataset_of, snapshot_of, usage_of
from agent_image.drivers.zfs.properties import Changes, check, reservation, round_up
from agent_image.drivers.zfs.survey import parse_line
from imaging.errors import InvalidArgumentError, MistifyError, UnsupportedError, WrongKindError
from imaging.names import DatasetName, SnapshotName

V = DatasetName.parse("tank/images/v")


# -- properties ----------------------------------------------------------------------------------------------------------


def test_changes_are_sorted_by_how_they_are_made() -> None:
    changes = check({"a:b": "1", "a:c": None, "readonly": "on", "quota": "1048576"}, is_volume=False)
    assert changes == Changes({"a:b": "1", "a:c": None}, "on", 1048576)
    assert changes.for_creation() == {"a:b": "1", "readonly": 1, "quota": 1048576}
    assert changes.applied_to({"a:c": "x", "a:d": "y"}) == {"a:b": "1", "a:d": "y", "readonly": "on"}
    assert check(changes.as_given(), is_volume=False) == changes


def test_removed_readonly_is_inherited_again() -> None:
    changes = check({"readonly": None}, is_volume=True)
    assert changes.readonly == "inherit"
    assert changes.applied_to({"readonly": "on"}) == {}
    assert changes.for_creation() == {}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("volsize", "1", InvalidArgumentError),
        ("-a:b", "1", InvalidArgumentError),
        ("A:b", "1", InvalidArgumentError),
        (MARK, "1", InvalidArgumentError),
        ("a:b", "x\0y", InvalidArgumentError),
        ("a:b", "x" * 8192, InvalidArgumentError),
        ("readonly", "yes", InvalidArgumentError),
        ("quota", "1G", InvalidArgumentError),
        ("quota", "1", WrongKindError),
    ],
)
def test_property_that_cannot_be_set_is_refused(name: str, value: str, kind: type[MistifyError]) -> None:
    with pytest.raises(kind):
        check({name: value}, is_volume=kind is WrongKindError)


@pytest.mark.parametrize(
    ("size_bytes", "block_bytes", "expected"),
    [
        (16 << 20, 8192, 16 << 20 | 0),
        (1 << 30, 8192, 1 << 30),
        (10 << 30, 16384, 10 << 30),
    ],
)
def test_reservation_covers_the_pointers_too(size_bytes: int, block_bytes: int, expected: int) -> None:
    reserved = reservation(size_bytes, block_bytes)
    assert reserved > expected
    assert reserved - expected < expected // 8 + (4 << 20)


def test_size_is_rounded_up_and_bounded() -> None:
    assert round_up(1, 8192, V) == 8192
    assert round_up(8192, 8192, V) == 8192
    for size_bytes in (0, -1, 1 << 44):
        with pytest.raises(InvalidArgumentError):
            round_up(size_bytes, 8192, V)


# -- what ZFS prints and answers ---------------------------------------------------------------------------------------------


def test_lines_of_zfs_list_become_infos() -> None:
    line = "tank/images/v\tvolume\t18446744073709551615\t19\t1795226214\ttank/o@s\t16777216\t8192"
    origin = SnapshotName.parse("tank/o@s")
    assert parse_line(line) == DatasetInfo(V, DatasetKind.VOLUME, (1 << 64) - 1, 19, 1795226214, origin, 16777216, 8192)
    line = "tank/fs@s1\tsnapshot\t7\t18\t9\t-\t-\t-"
    assert parse_line(line) == SnapshotInfo(SnapshotName.parse("tank/fs@s1"), 7, 18, 9)


@pytest.mark.parametrize(
    "line",
    [
        "tank/with space\tfilesystem\t1\t1\t1\t-\t-\t-",
        "tank/%recv\tvolume\t1\t1\t1\t-\t512\t512",
        "tank/fs@a b\tsnapshot\t7\t18\t9\t-\t-\t-",
        "tank/too\tfew",
    ],
)
def test_line_that_is_not_of_our_grammar_is_left_out(line: str) -> None:
    assert parse_line(line) is None


def test_negative_numbers_of_channel_programs_are_guids() -> None:
    entry = {b"type": b"volume", b"guid": -2170278026447990784, b"createtxg": 9, b"creation": 5, b"volsize": 4096}
    info = dataset_of(V, entry | {b"volblocksize": 4096, b"user": {b"a:b": b"x"}, b"readonly": b"on"})
    assert info.guid == 16276466047261560832
    assert info.properties == {"a:b": "x", "readonly": "on"}
    assert snapshot_of(V @ "s", entry).volsize_bytes == 4096
    usage = usage_of(V, {b"used": 1, b"referenced": 2, b"written": 3})
    assert (usage.used_bytes, usage.referenced_bytes, usage.written_bytes, usage.available_bytes) == (1, 2, 3, 0)


# -- temporary datasets ---------------------------------------------------------------------------------------------------


def test_temporary_dataset_is_ours_only_with_name_and_mark_of_one_id() -> None:
    name, mark = new_name(V, Purpose.RECEIVE)
    assert name.parent == V.parent
    assert is_hidden(name)
    assert not is_hidden(V)

    def made(properties: dict[str, str], name: DatasetName = name) -> bool:
        return is_ours(DatasetInfo(name, DatasetKind.VOLUME, 1, 1, 1, properties=properties))

    assert made(mark)
    assert not made({})
    assert not made({MARK: "0" * 16})
    assert not made(mark, V)
    assert without_mark({**mark, "a:b": "1"}) == {"a:b": "1"}


# -- the binding -------------------------------------------------------------------------------------------------------------


def test_missing_binding_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, binding.PACKAGE, raising=False)
    with pytest.raises(UnsupportedError, match=r"apt-get install .*python3-pyzfs"):
        binding.load((tmp_path,))


def test_broken_binding_leaves_nothing_half_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, binding.PACKAGE, raising=False)
    (tmp_path / binding.PACKAGE).mkdir()
    (tmp_path / binding.PACKAGE / "__init__.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(UnsupportedError, match="python3-pyzfs"):
        binding.load((tmp_path,))
    assert binding.PACKAGE not in sys.modules


def test_binding_is_found_beside_a_virtual_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, binding.PACKAGE, raising=False)
    (tmp_path / binding.PACKAGE).mkdir()
    (tmp_path / binding.PACKAGE / "__init__.py").write_text("from .inside import ANSWER\n")
    (tmp_path / binding.PACKAGE / "inside.py").write_text("ANSWER = 42\n")
    path_before = list(sys.path)
    try:
        assert binding.load((tmp_path / "absent", tmp_path)).ANSWER == 42
        assert sys.path == path_before
    finally:
        for name in [name for name in sys.modules if name.startswith(binding.PACKAGE)]:
            del sys.modules[name]
