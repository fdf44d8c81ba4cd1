"""What only the file driver has: shared files, reflinks, links, repair, and what it says when something is wrong with its directory."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_image.drivers.base import StorageDriver
from agent_image.drivers.file import FileDriver
from agent_image.drivers.file_contents import ContentFiles
from agent_image.drivers.registry import DRIVERS, make_driver
from imaging import files
from imaging.errors import (
    BadDataError,
    BusyError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    UnavailableError,
    UnsupportedError,
)
from imaging.names import PoolName
from tests.contracts.storage_driver_tools import (
    BLOCK_BYTES,
    MIB,
    VOLUME_BYTES,
    make_volume,
    noise,
    read,
    read_all,
    receive,
    stream_of,
    take,
    write,
)

POOL = PoolName.parse("tank")
ROOT = POOL.root
SAMPLES = Path(os.environ.get("MISTIFY_SAMPLES") or Path(__file__).parents[3] / "shared" / "samples") / "zfs-streams"


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[FileDriver]:
    driver = FileDriver(POOL, tmp_path, size_bytes=256 * MIB)
    driver.open()
    yield driver
    driver.close()


def contents(state_dir: Path) -> list[Path]:
    return sorted((state_dir / "pools" / "tank" / "contents").iterdir())


def test_device_asked_for_without_time_makes_nothing(driver: FileDriver, tmp_path: Path) -> None:
    """A list of volumes must not copy every image that nobody has opened yet."""
    make_volume(driver, ROOT / "v")
    take(driver, ROOT / "v" @ "s")
    driver.clone(ROOT / "v" @ "s", ROOT / "c")
    before = contents(tmp_path)
    with pytest.raises(UnavailableError, match="no file of its own yet"):
        driver.device(ROOT / "c", timeout_s=0.0)
    assert contents(tmp_path) == before
    assert driver.device(ROOT / "c") == driver.device(ROOT / "c", timeout_s=0.0)


def test_records_that_do_not_fit_on_the_disk_are_no_space(driver: FileDriver) -> None:
    make_volume(driver, ROOT / "v")
    [pages] = driver._store._db.execute("PRAGMA page_count").fetchone()
    driver._store._db.execute(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        for number in range(1000):
            take(driver, ROOT / "v" @ f"s{number}")

    with pytest.raises(NoSpaceError, match=r"records\.db: no space left on device"):
        fill()
    driver._store._db.execute("PRAGMA max_page_count=1073741823")
    take(driver, ROOT / "v" @ "afterwards")


# -- sharing ---------------------------------------------------------------------------------------------------------------


def test_received_volume_its_snapshots_and_clones_share_one_file(driver: FileDriver, tmp_path: Path) -> None:
    """On a file system without reflinks an image costs its size once, however many snapshots and idle clones it has."""
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    take(driver, ROOT / "v" @ "s")
    stream = stream_of(driver, ROOT / "v" @ "s")
    driver.destroy(ROOT / "v", recursive=True)
    receive(driver, ROOT / "image" @ "s", stream)
    take(driver, ROOT / "image" @ "again")
    for number in range(5):
        driver.clone(ROOT / "image" @ "s", ROOT / f"c{number}")
    assert len(contents(tmp_path)) == 1
    write(driver, ROOT / "c0", 0, noise(2))
    assert len(contents(tmp_path)) == 2
    assert read(driver, ROOT / "c1", 0, BLOCK_BYTES) == noise(1)


def test_snapshot_of_an_unchanged_volume_makes_no_file(driver: FileDriver, tmp_path: Path) -> None:
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    take(driver, ROOT / "v" @ "s1")
    before = contents(tmp_path)
    take(driver, ROOT / "v" @ "s2")
    assert contents(tmp_path) == before
    write(driver, ROOT / "v", 0, noise(2))
    take(driver, ROOT / "v" @ "s3")
    assert len(contents(tmp_path)) == len(before) + 1
    assert [read(driver, ROOT / "v" @ s, 0, BLOCK_BYTES) for s in ("s1", "s2", "s3")] == [noise(1), noise(1), noise(2)]


def test_snapshots_are_read_only_files_with_their_holes(driver: FileDriver, tmp_path: Path) -> None:
    make_volume(driver, ROOT / "v", size_bytes=64 * MIB)
    write(driver, ROOT / "v", 32 * MIB, noise(1))
    take(driver, ROOT / "v" @ "s")
    (frozen,) = [path for path in contents(tmp_path) if path.stat().st_mode & 0o777 == 0o444]
    assert frozen.stat().st_size == 64 * MIB
    assert frozen.stat().st_blocks * 512 < MIB


def test_bytes_past_the_end_do_not_make_a_volume_larger(driver: FileDriver) -> None:
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", VOLUME_BYTES - 4, b"12345678")
    assert driver.device(ROOT / "v").stat().st_size == VOLUME_BYTES
    assert read_all(driver, ROOT / "v")[-4:] == b"1234"


# -- reflinks --------------------------------------------------------------------------------------------------------------


def test_copy_uses_reflinks_where_the_file_system_has_them(driver: FileDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system is played at the border: what the kernel would share is copied there, and nothing is copied by us."""
    asked: list[tuple[int, int]] = []

    def ioctl(target_fd: int, request: int, source_fd: Any) -> int:
        assert request == 0x40049409  # FICLONE
        asked.append((source_fd, target_fd))
        os.truncate(target_fd, 0)
        os.pwrite(target_fd, os.pread(source_fd, VOLUME_BYTES, 0), 0)
        return 0

    def no_copy(*_: object) -> None:
        raise AssertionError("copied although blocks can be shared")

    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "ioctl", ioctl)
        patch.setattr(files, "copy_sparse", no_copy)
        take(driver, ROOT / "v" @ "s")
        driver.clone(ROOT / "v" @ "s", ROOT / "c")
        driver.device(ROOT / "c")
        assert len(asked) == 2
    assert read(driver, ROOT / "v" @ "s", 0, BLOCK_BYTES) == noise(1)
    assert read(driver, ROOT / "c", 0, BLOCK_BYTES) == noise(1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_copying_leaves_nothing(
    driver: FileDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    before = contents(tmp_path)

    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        with pytest.raises(NoSpaceError):
            driver.snapshot(ROOT / "v" @ "s")
    assert contents(tmp_path) == before
    assert list(driver.list_snapshots(ROOT)) == []
    take(driver, ROOT / "v" @ "s")


def test_volume_written_to_during_every_copy_is_busy(driver: FileDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather no snapshot than one with bytes of different moments."""
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    device = driver.device(ROOT / "v")
    copy_file = files.copy_file

    def copy_while_writing(source_fd: int, target_fd: int) -> files.CopyKind:
        with device.open("r+b", buffering=0) as guest:
            guest.write(noise(2))
        return copy_file(source_fd, target_fd)

    with monkeypatch.context() as patch:
        patch.setattr(files, "copy_file", copy_while_writing)
        with pytest.raises(BusyError):
            driver.snapshot(ROOT / "v" @ "s")
    assert list(driver.list_snapshots(ROOT)) == []
    take(driver, ROOT / "v" @ "s")
    assert read(driver, ROOT / "v" @ "s", 0, BLOCK_BYTES) == noise(2)


# -- repair ----------------------------------------------------------------------------------------------------------------


def test_open_removes_files_and_links_no_record_names(driver: FileDriver, tmp_path: Path) -> None:
    make_volume(driver, ROOT / "v")
    link = driver.device(ROOT / "v")
    driver.close()
    (tmp_path / "pools" / "tank" / "contents" / "0123456789abcdef").write_bytes(b"left by a crash")
    (tmp_path / "zvol" / "tank" / "gone").symlink_to("nowhere")
    (tmp_path / "zvol" / "tank" / "a" / "b").mkdir(parents=True)
    link.unlink()
    driver.open()
    assert len(contents(tmp_path)) == 1
    assert [path.name for path in (tmp_path / "zvol" / "tank").iterdir()] == ["v"]
    assert driver.device(ROOT / "v") == link
    assert link.resolve() == contents(tmp_path)[0]


def test_open_undoes_a_resize_that_was_cut_off(driver: FileDriver) -> None:
    make_volume(driver, ROOT / "v")
    device = driver.device(ROOT / "v")
    driver.close()
    os.truncate(device, 2 * VOLUME_BYTES)
    driver.open()
    assert device.stat().st_size == VOLUME_BYTES


def test_open_after_a_new_boot_trusts_no_modification_time(
    driver: FileDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a file may have new bytes and an old time."""
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    take(driver, ROOT / "v" @ "s1")
    device = driver.device(ROOT / "v")
    driver.close()
    old = device.stat().st_mtime_ns
    with device.open("r+b") as guest:
        guest.write(noise(2))
    os.utime(device, ns=(old, old))
    (tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setattr(files, "BOOT_ID_PATH", tmp_path / "boot_id")
    driver.open()
    take(driver, ROOT / "v" @ "s2")
    assert read(driver, ROOT / "v" @ "s2", 0, BLOCK_BYTES) == noise(2)


def test_open_with_a_lost_file_says_so(driver: FileDriver, tmp_path: Path) -> None:
    make_volume(driver, ROOT / "v")
    driver.device(ROOT / "v")
    driver.close()
    contents(tmp_path)[0].unlink()
    with pytest.raises(BadDataError, match="lost 1 content file"):
        driver.open()


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("UPDATE records SET value = x'7b' WHERE key LIKE 'd/%'", BadDataError),
        ("INSERT INTO records VALUES ('x/1', x'7b7d')", BadDataError),
        ("""UPDATE records SET value = '{"format": 99}' WHERE key = 'pool'""", UnsupportedError),
    ],
)
def test_open_with_damaged_records_is_refused_and_unlocks(
    driver: FileDriver, tmp_path: Path, statement: str, error: type[MistifyError]
) -> None:
    driver.close()
    path = tmp_path / "pools" / "tank" / "records.db"
    good = path.read_bytes()
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()
    for _ in range(2):  # the lock is given back each time
        with pytest.raises(error):
            driver.open()
    path.write_bytes(good)
    driver.open()


def test_records_that_are_no_database_are_refused(driver: FileDriver, tmp_path: Path) -> None:
    driver.close()
    (tmp_path / "pools" / "tank" / "records.db").write_bytes(b"not a database, for sure" * 100)
    with pytest.raises(BadDataError):
        driver.open()


def test_state_directory_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MistifyError):
        FileDriver(POOL, tmp_path / "file").open()


def test_commit_that_fails_changes_nothing(driver: FileDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_volume(driver, ROOT / "v")
    write(driver, ROOT / "v", 0, noise(1))
    before = driver.list(ROOT), contents(tmp_path)

    def fail(*_: object) -> None:
        raise UnavailableError("cannot write the records of the pool")

    with monkeypatch.context() as patch:
        patch.setattr(driver._store, "commit", fail)
        for call in (
            lambda: driver.snapshot(ROOT / "v" @ "s"),
            lambda: driver.resize(ROOT / "v", 2 * VOLUME_BYTES),
            lambda: driver.destroy(ROOT / "v"),
            lambda: driver.rename(ROOT / "v", ROOT / "w"),
        ):
            with pytest.raises(UnavailableError):
                call()
    assert (driver.list(ROOT), contents(tmp_path)) == before
    assert driver.device(ROOT / "v").stat().st_size == VOLUME_BYTES
    assert read(driver, ROOT / "v", 0, BLOCK_BYTES) == noise(1)


# -- streams of real pools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [["plain-full-s1", "plain-inc-s1-s2", "plain-inc-s2-s3-shrink"], ["zstd-ec"], ["big1M-Lec"], ["far6G-full"]],
)
def test_streams_of_a_real_pool_are_received_and_sent_on(driver: FileDriver, chain: list[str]) -> None:
    manifest = json.loads((SAMPLES / "MANIFEST.json").read_text())["samples"]
    for number, name in enumerate(chain):
        stream = gzip.decompress((SAMPLES / manifest[name]["file"]).read_bytes())
        made = receive(driver, ROOT / "v" @ f"s{number}", stream)
        result = manifest[name]["result"]
        assert made.guid == int(result["guid"])
        assert made.creation_s == result.get("creation", made.creation_s)
        assert (made.volsize_bytes, driver.get(ROOT / "v").volblocksize_bytes) == (
            result["volsize"],
            result["volblocksize"],
        )
        assert _digest(driver, made.volsize_bytes) == result["sha256"]
        base = f"s{number - 1}" if number else None
        receive(driver, ROOT / "w" @ f"s{number}", stream_of(driver, made.name, base=base))


def _digest(driver: FileDriver, size_bytes: int | None) -> str:
    digest = hashlib.sha256()
    with driver.open_volume(ROOT / "v") as fd:
        for offset in range(0, size_bytes or 0, MIB):
            digest.update(os.pread(fd, min(MIB, (size_bytes or 0) - offset), offset))
    return digest.hexdigest()


def test_bookmark_without_its_snapshot_is_refused_with_the_reason(driver: FileDriver) -> None:
    make_volume(driver, ROOT / "v")
    take(driver, ROOT / "v" @ "s0")
    driver.bookmark(ROOT / "v" @ "s0", "b")
    driver.destroy_snapshot(ROOT / "v" @ "s0")
    write(driver, ROOT / "v", 0, noise(1))
    take(driver, ROOT / "v" @ "s1")
    with pytest.raises(UnsupportedError, match="tank/v#b is gone"):
        driver.send(ROOT / "v" @ "s1", -1, base="#b")


def test_stream_that_outgrows_the_pool_is_stopped_on_the_way(tmp_path: Path) -> None:
    """Long before its end, so that no more is written in vain than a small part."""
    with_room = FileDriver(POOL, tmp_path / "a")
    with_room.open()
    make_volume(with_room, ROOT / "v", size_bytes=64 * MIB)
    write(with_room, ROOT / "v", 0, noise(1, 48 * MIB))
    take(with_room, ROOT / "v" @ "s")
    source = io.BytesIO(stream_of(with_room, ROOT / "v" @ "s"))
    with_room.close()
    small = FileDriver(POOL, tmp_path / "b", size_bytes=8 * MIB)
    small.open()
    with pytest.raises(NoSpaceError):
        small.receive(ROOT / "v" @ "s", source)
    assert source.tell() < 24 * MIB
    assert contents(tmp_path / "b") == []
    small.close()


# -- registry --------------------------------------------------------------------------------------------------------------


def test_registry_makes_the_driver_of_a_name(tmp_path: Path) -> None:
    driver = make_driver("file", POOL, tmp_path, size_bytes=MIB)
    assert isinstance(driver, StorageDriver)
    assert (driver.name, driver.pool) == ("file", POOL)


def test_registry_lists_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make_driver("ext4", POOL, tmp_path)
    assert all(name in caught.value.message for name in DRIVERS)


def test_driver_that_cannot_run_here_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRIVERS, "absent", ("agent_image.drivers.absent", "AbsentDriver"))
    with pytest.raises(UnsupportedError):
        make_driver("absent", POOL, tmp_path)


def test_leases_that_are_not_there_leave_a_file_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have none: then nothing is known, and nothing refused."""
    store = ContentFiles(tmp_path / "contents")
    with store.new(mode=0o600) as (content, _):
        pass
    with store.open(content, 0):
        assert store.is_open(content)

        def no_leases(*_: object) -> int:
            raise OSError(errno.EINVAL, "no leases here")

        monkeypatch.setattr(fcntl, "fcntl", no_leases)
        assert not store.is_open(content)
