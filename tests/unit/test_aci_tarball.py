"""Walking tar archives: the same entries as Python's own reader sees, for every dialect; only our errors for garbage."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import BadDataError, TooLargeError
from imaging.tarball import read_entry, walk_tar

DIALECTS = ["v7", "ustar", "gnu", "oldgnu", "posix"]


def _tree(directory: Path) -> Path:
    root = directory / "tree"
    (root / "sub" / ("d" * 60)).mkdir(parents=True)
    (root / "empty").write_bytes(b"")
    (root / "file").write_bytes(b"x" * 1500)
    (root / "sub" / ("d" * 60) / ("n" * 30)).write_bytes(b"deep")
    os.link(root / "file", root / "hard")
    (root / "soft").symlink_to("../outside")
    with (root / "sparse").open("wb") as file:
        for offset in range(0, 40 << 16, 2 << 16):
            file.seek(offset)
            file.write(b"data")
    return root


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("sparse", ["", "--sparse"])
def test_walk_sees_what_tar_wrote(tmp_path: Path, dialect: str, sparse: str) -> None:
    if sparse and dialect in {"v7", "ustar"}:  # these dialects know no holes: the same archive again
        sparse = ""
    archive = tmp_path / "tree.tar"
    command = ["tar", "-C", _tree(tmp_path), f"--format={dialect}", *([sparse] if sparse else []), "-cf", archive, "."]
    subprocess.run([str(word) for word in command], check=True, timeout=60)
    with tarfile.open(archive) as theirs, archive.open("rb") as file:
        ours = list(walk_tar(file.fileno()))
        members = theirs.getmembers()
        assert [entry.clean_name for entry in ours] == [os.path.normpath(member.name) for member in members]
        assert [entry.is_directory for entry in ours] == [member.isdir() for member in members]
        assert [entry.is_hard_link for entry in ours] == [member.islnk() for member in members]
        for entry, member in zip(ours, members, strict=True):
            if entry.is_file and not member.issparse():
                stored = theirs.extractfile(member)
                assert stored is not None
                assert read_entry(file.fileno(), entry, 1 << 30) == stored.read()


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("manifest", "rootfs/" + "n" * 150, "rootfs/b"):
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(bytes(700)))
    return buffer.getvalue()


ARCHIVE = _archive()


def _walk(data: bytes) -> list[str]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return [entry.name for entry in walk_tar(file.fileno())]


def _outcome(data: bytes) -> list[str]:
    """The names, or the error of ours; any other one leaves the test."""
    try:
        return _walk(data)
    except (BadDataError, TooLargeError) as err:
        return [err.message]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_walk_of_an_altered_archive_ends_or_raises_our_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(ARCHIVE)
    for offset, value in changes:
        data[offset] = value
    assert len(_outcome(bytes(data))) in {0, 1, 2, 3}


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_walk_of_garbage_raises_our_errors(data: bytes) -> None:
    if data.strip(b"\0"):
        with pytest.raises(BadDataError):
            _walk(b"\x01" + data)


@pytest.mark.parametrize("length", range(512, len(ARCHIVE) - 10240 % 512, 300))
def test_walk_of_a_cut_archive_is_told_or_sees_less(length: int) -> None:
    seen = _outcome(ARCHIVE[:length])
    assert seen == _walk(ARCHIVE)[: len(seen)] or seen == ["unexpected EOF"]


def test_read_of_a_file_over_the_limit_is_refused() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(ARCHIVE)
        file.flush()
        entry = next(walk_tar(file.fileno()))
        with pytest.raises(TooLargeError, match="larger than 699 bytes"):
            read_entry(file.fileno(), entry, 699)
