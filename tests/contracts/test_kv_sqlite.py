"""The embedded key/value engine: the contract, and what is its own: one owner, damage, failing commits."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imaging.errors import BadDataError, BusyError, InternalError, MistifyError, NoSpaceError, UnavailableError
from imaging.kv.base import KeyValue, Put, put
from imaging.kv.sqlite import SqliteKeyValue, from_sqlite_error
from tests.contracts.key_value import KeyValueContract
from tests.waiting import wait_until


class TestSqliteKeyValue(KeyValueContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[], KeyValue]:
        return lambda: SqliteKeyValue(tmp_path / "store.db")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def _raw(path: Path, *statements: str) -> None:
    conn = sqlite3.connect(path)
    for statement in statements:
        conn.execute(statement)
    conn.commit()
    conn.close()


# -- durability settings -------------------------------------------------------------------------------------------------


def test_connection_is_wal_with_synchronous_full(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        worker = store._table.conn
        assert worker.select_one("PRAGMA synchronous") == (2,)
        assert worker.select_one("PRAGMA journal_mode") == ("wal",)


def test_values_are_stored_as_they_are_without_pickle(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "key", b"plain bytes")
    conn = sqlite3.connect(path)
    [(row,)] = conn.execute("SELECT value FROM entries WHERE key = 'key'").fetchall()
    conn.close()
    assert row == (1).to_bytes(8, "big") + b"plain bytes"


def test_write_is_on_disk_before_the_call_returns(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "key", b"value")
        conn = sqlite3.connect(path)
        [(count,)] = conn.execute("SELECT count(*) FROM entries WHERE key = 'key'").fetchall()
        conn.close()
        assert count == 1


# -- one owner -----------------------------------------------------------------------------------------------------------


def test_second_open_in_this_process_is_busy_and_names_the_pid(path: Path) -> None:
    with SqliteKeyValue(path), pytest.raises(BusyError, match=f"process {os.getpid()}") as caught:
        SqliteKeyValue(path)
    assert caught.value.dependants == (f"process {os.getpid()}",)
    SqliteKeyValue(path).close()


def test_second_open_in_another_process_is_busy(path: Path) -> None:
    program = (
        "import sys\nfrom imaging.errors import BusyError\nfrom imaging.kv.sqlite import SqliteKeyValue\n"
        "try:\n    SqliteKeyValue(sys.argv[1])\nexcept BusyError as err:\n    print(err)\n"
    )
    with SqliteKeyValue(path) as store:
        command = [sys.executable, "-c", program, str(path)]
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert f"process {os.getpid()}" in output
        put(store, "still", b"ours")


# -- damage --------------------------------------------------------------------------------------------------------------


def test_open_file_that_is_no_database_is_bad_data_and_leaves_no_thread(path: Path) -> None:
    path.write_bytes(b"this is not a database, it only has its name" * 100)
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(BadDataError, match="damaged or is no database"):
            SqliteKeyValue(path)
    assert threading.active_count() == before


@pytest.mark.parametrize("page", [0, 1, 2, 3])
def test_open_damaged_page_is_bad_data(path: Path, page: int) -> None:
    with SqliteKeyValue(path) as store:
        for number in range(200):
            put(store, f"key/{number}", b"x" * 100)
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xa5" * 4096)
    with pytest.raises(BadDataError, match=str(path)):
        SqliteKeyValue(path)


def test_open_database_of_another_program_is_bad_data_and_stays_as_it_was(path: Path) -> None:
    _raw(path, "CREATE TABLE entries (name TEXT)", "INSERT INTO entries VALUES ('theirs')")
    before = path.read_bytes()
    with pytest.raises(BadDataError, match="another program"):
        SqliteKeyValue(path)
    assert path.read_bytes() == before


def test_open_lost_revision_is_bad_data(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "key", b"value")
    _raw(path, "DELETE FROM entries WHERE key = ''")
    with pytest.raises(BadDataError, match="revision"):
        SqliteKeyValue(path)


def test_read_entry_too_short_is_bad_data(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "key", b"value")
    _raw(path, "UPDATE entries SET value = x'00' WHERE key = 'key'")
    with SqliteKeyValue(path) as store:
        with pytest.raises(BadDataError, match="key"):
            store.get("key")
        with pytest.raises(BadDataError, match="key"):
            store.list()


def test_open_missing_directory_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(MistifyError):
        SqliteKeyValue(tmp_path / "missing" / "store.db")


REFUSE_BAD = (
    "CREATE TEMP TRIGGER refuse BEFORE INSERT ON entries WHEN NEW.key = 'bad' BEGIN SELECT RAISE(FAIL, 'no'); END"
)


# -- failing writes ------------------------------------------------------------------------------------------------------


@contextmanager
def _file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow past a size: the write inside COMMIT fails for real."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_commit_that_fails_reaches_the_caller_and_the_store_lives_on(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        before = put(store, "kept", b"1")
        wal_bytes = path.with_name(path.name + "-wal").stat().st_size
        with _file_size_limit(wal_bytes + 4096):
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    store.transact([Put("kept", b"2"), Put("lost", b"x" * 100_000)])
                assert [(entry.key, entry.value) for entry in store.list()] == [("kept", b"1")]
        assert put(store, "after", b"") > before
    with SqliteKeyValue(path) as store:
        assert [entry.key for entry in store.list()] == ["after", "kept"]


def test_full_database_is_no_space_and_the_store_lives_on(path: Path) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "kept", b"1")
        worker = store._table.conn
        [pages] = worker.select_one("PRAGMA page_count")
        worker.select_one(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(NoSpaceError, match="no space left on device"):
            store.transact([Put("a", b"small"), Put("b", b"x" * 100_000), Put("kept", b"2")])
        assert [(entry.key, entry.value) for entry in store.list()] == [("kept", b"1")]
        worker.select_one("PRAGMA max_page_count=1073741823")
        put(store, "kept", b"3")
        assert [(entry.key, entry.value) for entry in store.list()] == [("kept", b"3")]


def test_commit_while_another_program_locks_the_file_is_unavailable_and_is_over_with_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imaging.kv.sqlite.BUSY_TIMEOUT_S", 0.05)
    with SqliteKeyValue(path) as store:
        put(store, "kept", b"1")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError):
            store.transact([Put("a", b""), Put("b", b"")])
        assert [entry.key for entry in store.list()] == ["kept"]
        other.execute("ROLLBACK")
        other.close()
        put(store, "a", b"")
        assert [entry.key for entry in store.list()] == ["a", "kept"]


@pytest.mark.parametrize("position", range(4))
def test_statement_that_fails_anywhere_leaves_no_half_of_its_transaction(path: Path, position: int) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "kept", b"1")
        worker = store._table.conn
        worker.select_one(REFUSE_BAD)
        keys = ["a", "b", "c"]
        keys.insert(position, "bad")
        with pytest.raises(InternalError):
            store.transact([Put(key, b"") for key in keys])
        assert [entry.key for entry in store.list()] == ["kept"]
        revision = put(store, "next", b"")
        assert [(entry.key, entry.revision) for entry in store.list()] == [("kept", 1), ("next", revision)]


def test_statement_whose_failure_is_noticed_before_the_commit_takes_the_earlier_ones_with_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteKeyValue(path) as store:
        worker, stage = store._table.conn, store._stage

        def stage_and_wait(operation: Put, stamp: bytes) -> None:
            stage(operation, stamp)
            if operation.key == "bad":
                wait_until(lambda: worker.exception is not None, "the worker failed")

        worker.select_one(REFUSE_BAD)
        monkeypatch.setattr(store, "_stage", stage_and_wait)
        with pytest.raises(InternalError):
            store.transact([Put("early", b""), Put("bad", b""), Put("late", b"")])
        assert list(store.list()) == []
        put(store, "next", b"")
        assert [entry.key for entry in store.list()] == ["next"]


def test_commit_after_a_rollback_that_failed_stores_nothing_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SqliteKeyValue(path) as store:
        put(store, "kept", b"1")

        def fail(*_: object) -> None:
            raise sqlite3.OperationalError("no rollback")

        monkeypatch.setattr("imaging.kv.sqlite._Connection.rollback", fail)
        with pytest.raises(MistifyError), _file_size_limit(path.with_name(path.name + "-wal").stat().st_size):
            put(store, "lost", b"x" * 10_000)
        monkeypatch.undo()
        with pytest.raises(MistifyError):
            put(store, "also lost", b"")
        put(store, "after", b"")
        assert [entry.key for entry in store.list()] == ["after", "kept"]


# -- the error table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_FULL, NoSpaceError),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, UnavailableError),
        (sqlite3.SQLITE_IOERR_WRITE, UnavailableError),
        (sqlite3.SQLITE_CORRUPT, BadDataError),
        (sqlite3.SQLITE_NOTADB, BadDataError),
        (sqlite3.SQLITE_MISUSE, InternalError),
        (None, InternalError),
    ],
)
def test_sqlite_error_is_translated(code: int | None, expected: type[MistifyError]) -> None:
    err = sqlite3.OperationalError("text")
    if code is not None:
        err.sqlite_errorcode = code
    translated = from_sqlite_error(err, "cannot do it")
    assert type(translated) is expected
    assert translated.message.startswith("cannot do it")


def test_sqlite_error_failed_sync_says_it_may_have_been_applied() -> None:
    err = sqlite3.OperationalError("disk I/O error")
    err.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    assert "maybe_applied" in from_sqlite_error(err, "cannot write").message
