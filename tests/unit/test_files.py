"""Durable publishing, sparse copies, holes, locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imaging import files
from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    BusyError,
    InternalError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)

BLOCK = 4096


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _sparse(path: Path, size_bytes: int, *pieces: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


# -- publishing ----------------------------------------------------------------------------------------------------------


def test_durable_file_steps_happen_in_the_promised_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        steps.append("sync directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "sync file")  # noqa: PTH112
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with files.durable_file(tmp_path / "target", verify=lambda _: steps.append("verify")) as fd:
        os.write(fd, b"data")
        assert not (tmp_path / "target").exists()
    assert steps == ["sync file", "verify", "rename", "sync directory"]
    assert (tmp_path / "target").read_bytes() == b"data"


def test_durable_file_exception_leaves_the_old_content_and_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "target"
    files.atomic_write_bytes(target, b"old")
    with pytest.raises(KeyError), files.durable_file(target) as fd:  # noqa: PT012
        os.write(fd, b"new")
        raise KeyError
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_durable_file_refused_by_verify_is_not_published(tmp_path: Path) -> None:
    def refuse(_: int) -> None:
        raise BadDataError("no")

    with pytest.raises(BadDataError), files.durable_file(tmp_path / "target", verify=refuse) as fd:
        os.write(fd, b"new")
    assert list(tmp_path.iterdir()) == []


def test_durable_file_without_replace_refuses_what_exists(tmp_path: Path) -> None:
    target = tmp_path / "target"
    files.atomic_write_bytes(target, b"first", replace=False)
    with pytest.raises(AlreadyExistsError):
        files.atomic_write_bytes(target, b"second", replace=False)
    assert target.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_durable_file_failing_disk_is_translated_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match="no space left on device"):
        files.atomic_write_bytes(tmp_path / "target", b"data")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_sets_the_mode_and_json_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target.json"
    files.atomic_write_json(target, {"b": [1, None], "a": "ä"}, mode=0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    assert files.read_json(target) == {"a": "ä", "b": [1, None]}


def test_read_json_absent_or_damaged_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        files.read_json(tmp_path / "absent")
    (tmp_path / "damaged").write_bytes(b'{"a": ')
    with pytest.raises(BadDataError, match="damaged"):
        files.read_json(tmp_path / "damaged")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadDataError):
        files.read_json(tmp_path / "binary")


def test_remove_temporaries_removes_only_them(tmp_path: Path) -> None:
    files.temporary_beside(tmp_path / "x").write_bytes(b"")
    files.temporary_beside(tmp_path / "y").write_bytes(b"")
    (tmp_path / "kept").write_bytes(b"")
    assert files.remove_temporaries(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_make_directory_is_idempotent_and_refuses_a_file(tmp_path: Path) -> None:
    assert files.make_directory(tmp_path / "a" / "b").is_dir()
    files.make_directory(tmp_path / "a" / "b")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AlreadyExistsError):
        files.make_directory(tmp_path / "file")


def test_fsync_directory_absent_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        files.fsync_directory(tmp_path / "absent")


def test_write_all_goes_on_after_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    with _opened(tmp_path / "file") as fd:
        files.write_all(fd, b"0123456789", 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789"


# -- space and holes -----------------------------------------------------------------------------------------------------


def test_free_bytes_is_what_a_writer_may_use(tmp_path: Path) -> None:
    assert 0 < files.free_bytes(tmp_path) < 1 << 60
    with pytest.raises(NotFoundError):
        files.free_bytes(tmp_path / "absent")


@pytest.mark.parametrize("supported", [True, False])
def test_punch_hole_reads_as_zeros_and_keeps_the_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    supported: bool,  # noqa: FBT001
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (64 * BLOCK))
    with _opened(path) as fd:
        before = files.allocated_bytes(fd)
        if not supported:
            monkeypatch.setattr(files._libc, "fallocate", lambda *_: -1)
            monkeypatch.setattr("imaging.files.ctypes.get_errno", lambda: errno.EOPNOTSUPP)
        files.punch_hole(fd, BLOCK, 32 * BLOCK)
        files.punch_hole(fd, 60 * BLOCK + 1, 100 * BLOCK)
        files.punch_hole(fd, 1000 * BLOCK, BLOCK)
        if supported:
            assert files.allocated_bytes(fd) < before
    expected = b"x" * BLOCK + bytes(32 * BLOCK) + b"x" * (27 * BLOCK + 1) + bytes(4 * BLOCK - 1)
    assert path.read_bytes() == expected


def test_punch_hole_other_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x" * BLOCK)
    with _opened(tmp_path / "file") as fd:
        monkeypatch.setattr(files._libc, "fallocate", lambda *_: -1)
        monkeypatch.setattr("imaging.files.ctypes.get_errno", lambda: errno.EIO)
        with pytest.raises(UnavailableError):
            files.punch_hole(fd, 0, BLOCK)


def test_data_ranges_skip_holes(tmp_path: Path) -> None:
    path = _sparse(tmp_path / "file", 100 * BLOCK, (10 * BLOCK, b"x" * BLOCK), (50 * BLOCK, b"y" * BLOCK))
    with _opened(path) as fd:
        covered = [
            number
            for start, length in files.data_ranges(fd)
            for number in range(start // BLOCK, (start + length) // BLOCK)
        ]
    assert {10, 50} <= set(covered)
    assert len(covered) == len(set(covered)) < 100
    with _opened(tmp_path / "empty") as fd:
        assert list(files.data_ranges(fd)) == []


def test_data_ranges_without_the_kernels_help_is_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EINVAL, "injected")

    with _opened(_sparse(tmp_path / "file", 10 * BLOCK)) as fd:
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(files.data_ranges(fd)) == [(0, 10 * BLOCK)]


# -- copies --------------------------------------------------------------------------------------------------------------

PIECES = [(0, b"start"), (10 * BLOCK + 7, b"middle" * 1000), (199 * BLOCK, b"end")]


@pytest.mark.parametrize("refused", ["nothing", "ioctl", "copy_file_range", "zero"])
def test_copy_file_is_identical_and_sparse_however_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    source = _sparse(tmp_path / "source", 200 * BLOCK + 3, *PIECES)
    target = tmp_path / "target"
    target.write_bytes(b"old" * 500_000)  # longer than the source: nothing of it may stay

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "injected")

    if refused != "nothing":
        monkeypatch.setattr(fcntl, "ioctl", refuse)
    if refused == "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", refuse)
    if refused == "zero":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with _opened(source) as source_fd, _opened(target) as target_fd:
        kind = files.copy_file(source_fd, target_fd)
        assert files.allocated_bytes(target_fd) < 100 * BLOCK
    assert kind in ({files.CopyKind.SPARSE} if refused != "nothing" else set(files.CopyKind))
    assert target.read_bytes() == source.read_bytes()


def test_copy_file_of_nothing_and_of_one_hole(tmp_path: Path) -> None:
    for size in (0, 50 * BLOCK):
        source = _sparse(tmp_path / f"source{size}", size)
        with _opened(source) as source_fd, _opened(tmp_path / f"target{size}") as target_fd:
            files.copy_file(source_fd, target_fd)
        assert (tmp_path / f"target{size}").read_bytes() == bytes(size)


def test_copy_disk_full_is_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(os, "copy_file_range", full)
    source = _sparse(tmp_path / "source", BLOCK, (0, b"x"))
    with _opened(source) as source_fd, _opened(tmp_path / "target") as target_fd, pytest.raises(NoSpaceError):
        files.copy_sparse(source_fd, target_fd)


def test_reflink_other_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ETXTBSY, "injected")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with _opened(tmp_path / "a") as one, _opened(tmp_path / "b") as two, pytest.raises(InternalError):
        files.reflink(one, two)


# -- locks ---------------------------------------------------------------------------------------------------------------


def test_lock_second_holder_is_busy_and_hears_the_pid(tmp_path: Path) -> None:
    with files.LockFile(tmp_path / "lock") as lock:
        assert (lock.held, lock.acquire() is lock) == (True, True)
        with pytest.raises(BusyError, match=f"process {os.getpid()}") as caught:
            files.LockFile(tmp_path / "lock").acquire()
        assert caught.value.dependants == (f"process {os.getpid()}",)
    lock.release()
    files.LockFile(tmp_path / "lock").acquire().release()


def test_lock_of_a_dead_process_is_free_though_its_pid_is_still_written(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom imaging.files import LockFile\n"
        "lock = LockFile(Path(sys.argv[1])).acquire()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], timeout=60, check=False)
    assert died.returncode < 0
    assert int((tmp_path / "lock").read_text()) > 0
    files.LockFile(tmp_path / "lock").acquire().release()


def test_lock_is_not_inherited_by_programs_we_start(tmp_path: Path) -> None:
    lock = files.LockFile(tmp_path / "lock").acquire()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        lock.release()
        files.LockFile(tmp_path / "lock").acquire().release()
        child.communicate(b"\n", timeout=60)


def test_lock_in_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        files.LockFile(tmp_path / "absent" / "lock").acquire()
