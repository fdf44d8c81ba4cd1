"""Removing images, locks between users, temporary files, unused images."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from image_service.imagestore.checking import StoreCheck
from image_service.imagestore.infos import Remote
from image_service.imagestore.locks import RETRIES_MAX, KeyLocks, directory_lock, open_locked
from image_service.imagestore.spool import NAMED_KEEP_S, TemporaryFiles
from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.errors import BusyError, NoSpaceError, NotFoundError, StoreRemovalError, UnavailableError
from imaging.files import make_directory
from tests.imagestore.conftest import Clock
from tests.imagestore.images import aci, files, files_of, put, read
from tests.waiting import wait_until

UNKNOWN = "sha512-" + "0" * 64


def _remote(url: str, key: str) -> Remote:
    return Remote(url, "", "", key)


def test_removal_takes_record_remotes_and_files(store: ImageStore) -> None:
    key, other = put(store, aci()), put(store, aci(content=b"other"))
    for number, blob in enumerate([key, key, other]):
        store.save_remote(_remote(f"http://x/{number}", blob))
    store.delete_aci(key)
    assert files(store) == files_of(other)
    assert [remote.blob_key for remote in store.list_remotes()] == [other]
    assert store.resolve_name("example.com/app") == ([other], True)
    with pytest.raises(NotFoundError):
        store.get_aci_info(key)


@pytest.mark.parametrize("key", [UNKNOWN, "sha512-ab", "../../etc/passwd"])
def test_removal_of_an_unknown_key_tells_both_parts(store: ImageStore, key: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        store.delete_aci(key)
    assert chain(caught.value) == (f"cannot remove image with ID: {key} from db: cannot find image with key: {key}")


def test_removal_does_not_resolve_and_the_second_one_fails(store: ImageStore) -> None:
    key = put(store, aci())
    with pytest.raises(NotFoundError):
        store.delete_aci(key[:20])
    store.delete_aci(key)
    with pytest.raises(NotFoundError):
        store.delete_aci(key)


@pytest.mark.parametrize("gone", ["blob", "manifest"])
def test_removal_of_an_image_with_a_file_gone_says_so_and_removes_the_rest(store: ImageStore, gone: str) -> None:
    key = put(store, aci())
    path = store.layout.blob(key) if gone == "blob" else store.layout.manifest(key)
    path.unlink()
    with pytest.raises(StoreRemovalError) as caught:
        store.delete_aci(key)
    assert caught.value.message == f"some aci disk entries cannot be removed: [{path}: No such file or directory]"
    assert files(store) == set()
    assert store.list_aci_infos() == []


def test_removal_finishes_one_that_was_cut_off(store: ImageStore) -> None:
    key = put(store, aci())
    store.infos.delete(key)
    store.delete_aci(key)
    assert files(store) == set()


def test_removal_waits_for_a_reader_that_resolves(store: ImageStore) -> None:
    key = put(store, aci())
    remover = threading.Thread(target=store.delete_aci, args=(key,))
    with store.locks.hold(key, exclusive=False):
        remover.start()
        remover.join(0.2)
        assert remover.is_alive()
        assert files(store) == files_of(key)
    remover.join(30)
    assert files(store) == set()


def test_removal_on_a_full_disk_gives_up_the_reserve(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store, aci())
    reserve = store.layout.index / "reserve"
    assert reserve.stat().st_size == 1 << 20
    real = store.index.change

    def full_while_reserved() -> object:
        if reserve.exists():
            raise NoSpaceError("cannot write to the index: no space left on device")
        return real()

    monkeypatch.setattr(store.index, "change", full_while_reserved)
    store.delete_aci(key)
    assert not reserve.exists()
    assert files(store) == set()


# -- collecting ------------------------------------------------------------------------------------------------------------


def test_collect_takes_what_is_unused_for_longer_than_the_grace(store: ImageStore, clock: Clock) -> None:
    old = put(store, aci())
    clock.move(100)
    used = put(store, aci(content=b"2"))
    clock.move(100)
    check = StoreCheck(store)
    assert check.collect(grace_s=200) == []
    assert [item.key for item in check.collect(grace_s=150, dry_run=True)] == [old]
    assert files(store) == files_of(old, used)
    assert [item.key for item in check.collect(grace_s=150)] == [old]
    assert check.collect(grace_s=0, keep={used}) == []
    assert [item.key for item in check.collect(grace_s=0)] == [used]
    assert files(store) == set()


def test_collect_looks_again_under_the_lock(store: ImageStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store, aci())
    clock.move(1000)
    listed = store.list_aci_infos(["lastused"])
    read(store, key)  # used after the list was made
    monkeypatch.setattr(store, "list_aci_infos", lambda _fields=(): listed)
    assert StoreCheck(store).collect(grace_s=500) == []
    assert files(store) == files_of(key)


# -- locks -----------------------------------------------------------------------------------------------------------------


def test_key_lock_is_shared_by_readers_and_refused_to_writers(tmp_path: Path) -> None:
    locks = KeyLocks(tmp_path)
    with locks.hold("k", exclusive=False), locks.hold("k", exclusive=False, timeout_s=0):
        with (
            pytest.raises(BusyError, match="file already locked by another process"),
            locks.hold("k", exclusive=True, timeout_s=0),
        ):
            pytest.fail("two owners")
        with locks.hold("other", exclusive=True, timeout_s=0):
            assert locks.clean() == 0
    with (
        locks.hold("k", exclusive=True, timeout_s=0),
        pytest.raises(UnavailableError, match="stayed locked"),
    ):
        open_locked(tmp_path / "k", exclusive=False, timeout_s=0.05)


def test_key_locks_of_nobody_are_cleaned(tmp_path: Path) -> None:
    locks = KeyLocks(tmp_path)
    for key in "abc":
        with locks.hold(key, exclusive=True):
            assert (tmp_path / key).exists()
    with locks.hold("b", exclusive=False):
        assert locks.clean() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_key_lock_whose_file_was_exchanged_is_taken_on_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "k"
    first = open_locked(path, exclusive=True)
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(open_locked(path, exclusive=True)))
    waiter.start()
    waiter.join(0.1)
    path.unlink()
    os.close(first)
    waiter.join(30)
    assert os.fstat(got[0]).st_ino == path.stat().st_ino
    os.close(got[0])


def test_key_lock_whose_file_is_exchanged_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def exchanged(fd: int, _path: Path) -> bool:
        tries.append(fd)
        return False

    monkeypatch.setattr("image_service.imagestore.locks._same_file", exchanged)
    with pytest.raises(UnavailableError) as caught:
        open_locked(tmp_path / "k", exclusive=True)
    assert caught.value.message == "cannot acquire lock after 3 retries"
    assert len(tries) == RETRIES_MAX


def test_directory_lock_is_shared_or_exclusive(tmp_path: Path) -> None:
    with directory_lock(tmp_path, exclusive=False), directory_lock(tmp_path, exclusive=False, timeout_s=0):  # noqa: SIM117
        with pytest.raises(BusyError), directory_lock(tmp_path, exclusive=True, timeout_s=0):
            pytest.fail("alone among others")
    with pytest.raises(NotFoundError), directory_lock(tmp_path / "nosuch", exclusive=True):
        pytest.fail("nothing to lock")


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from image_service.imagestore.locks import open_locked\n"
        "open_locked(Path(sys.argv[1]), exclusive=True); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "k")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError):
            open_locked(tmp_path / "k", exclusive=True, timeout_s=0)
        holder.kill()
    os.close(open_locked(tmp_path / "k", exclusive=True, timeout_s=0))


# -- temporary files -------------------------------------------------------------------------------------------------------


def test_temporary_file_and_folder_vanish_with_their_block(store: ImageStore) -> None:
    with store.tmp_file() as one, store.tmp_file() as two, store.tmp_dir() as folder:
        assert one.path != two.path
        (folder / "x").write_text("x")
        os.write(one.fd, b"x")
        assert store.temporaries.sweep() == []  # they have owners
        assert one.path.exists()
    assert list(store.layout.temporary.iterdir()) == []


def test_temporary_named_file_is_found_again_with_what_it_holds(store: ImageStore) -> None:
    with store.tmp_named_file("k") as first:
        os.write(first.fd, b"hello")
        with pytest.raises(BusyError), store.tmp_named_file("k"):
            pytest.fail("two writers")
    with store.tmp_named_file("k") as again:
        assert os.fstat(again.fd).st_size == 5


def test_temporaries_of_the_dead_are_swept_and_named_ones_when_they_are_old(tmp_path: Path) -> None:
    clock = Clock()
    temporaries = TemporaryFiles(make_directory(tmp_path / "tmp"), lambda: clock.now_ns / 1e9)
    (tmp_path / "tmp" / ".tmp-1").write_text("left")
    (tmp_path / "tmp" / ".tmp-2").mkdir()
    (tmp_path / "tmp" / "named-a").write_text("half")
    os.utime(tmp_path / "tmp" / "named-a", ns=(clock.now_ns, clock.now_ns))
    assert temporaries.sweep() == [".tmp-1", ".tmp-2"]
    clock.move(NAMED_KEEP_S + 1)
    with temporaries.named("a"):
        assert temporaries.sweep() == []
    assert temporaries.sweep() == ["named-a"]


def test_temporary_is_never_swept_between_its_making_and_its_lock(tmp_path: Path) -> None:
    temporaries = TemporaryFiles(make_directory(tmp_path / "tmp"))
    swept: list[str] = []
    making = threading.Event()

    def sweep() -> None:
        making.set()
        swept.extend(temporaries.sweep())

    fd = os.open(tmp_path / "tmp", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)  # as who makes one does
    (tmp_path / "tmp" / ".tmp-1").write_text("mine")
    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    wait_until(making.is_set, "the sweep begins")
    sweeper.join(0.1)
    assert (tmp_path / "tmp" / ".tmp-1").exists()
    os.close(fd)
    sweeper.join(30)
    assert swept == [".tmp-1"]
