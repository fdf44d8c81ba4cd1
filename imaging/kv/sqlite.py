"""SqliteKeyValue: the embedded metadata engine, on sqlitedict. The only module that touches sqlitedict.

sqlitedict keeps one writing connection on a thread of its own and talks to it through queues. As it comes it is fast
and forgetful; what makes it keep the contract is here:

* Its connection runs with ``synchronous=OFF``. Ours is WAL with FULL: an acknowledged commit survives a power cut.
* A statement that fails is reported at some later call, and a commit in between would store half a transaction. Ours
  rolls back instead of committing whenever an error is pending (:class:`_Connection`).
* A COMMIT that fails kills the thread, and every later call waits for ever. Ours records the error, rolls back, and lives on.
* A row that cannot be read (damaged page) kills the thread too; so does a file that is no database (:class:`_Cursor`,
  :meth:`_Worker.run`).
* Reads on its handle see what is not committed yet and queue whole tables in memory. Ours go through connections
  that only read: they see committed state only, and in WAL mode never wait for the writer.
* Two processes would lose each other's updates: a lock file beside the database admits one.

A row is (key, 8 bytes of revision + value). The row with the empty key, which no caller can name, holds the last
revision, so that revisions grow over deletions and restarts.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import sqlitedict

from imaging.errors import (
    BadDataError,
    ConflictError,
    InternalError,
    MistifyError,
    NoSpaceError,
    NotPermittedError,
    UnavailableError,
    UnsupportedError,
)
from imaging.files import LockFile, fsync_directory, os_errors
from imaging.kv.base import ABSENT, Compare, Entry, Operation, Put
from imaging.kv.checks import check_key, check_limit, check_transaction, encode_text, successor

BUSY_TIMEOUT_S = 5.0
"""How long sqlite waits for a lock. The lock file keeps other owners out; this is for a backup program that reads the database."""

WAL_SIZE_LIMIT_BYTES = 16 << 20
"""The write-ahead log is cut back to this after a checkpoint, so that one burst does not keep its space for ever."""

_TABLE = "entries"
_LAST_REVISION = ""
_REVISION_BYTES = 8

_BY_CODE: dict[int, type[MistifyError]] = {
    sqlite3.SQLITE_FULL: NoSpaceError,
    sqlite3.SQLITE_BUSY: UnavailableError,
    sqlite3.SQLITE_LOCKED: UnavailableError,
    sqlite3.SQLITE_IOERR: UnavailableError,
    sqlite3.SQLITE_CANTOPEN: UnavailableError,
    sqlite3.SQLITE_NOMEM: UnavailableError,
    sqlite3.SQLITE_PROTOCOL: UnavailableError,
    sqlite3.SQLITE_CORRUPT: BadDataError,
    sqlite3.SQLITE_NOTADB: BadDataError,
    sqlite3.SQLITE_READONLY: NotPermittedError,
    sqlite3.SQLITE_PERM: NotPermittedError,
}


def from_sqlite_error(err: sqlite3.Error, what: str) -> MistifyError:
    """Translate an error of sqlite; ``what`` says what failed and on what. Unknown codes become InternalError."""
    code = getattr(err, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    kind = _BY_CODE.get(code & 0xFF, InternalError)
    if kind is NoSpaceError:
        what = f"{what}: no space left on device"
    if kind is BadDataError:
        what = f"{what}: the database file is damaged or is no database"
    if code == sqlite3.SQLITE_IOERR_FSYNC:  # the bytes may or may not be on the disk: only a later read can tell
        what = f"{what} (maybe_applied)"
    return kind(what)


# -- what sqlitedict lacks -----------------------------------------------------------------------------------------------


class _Cursor(sqlite3.Cursor):
    """A cursor that leaves its errors for the caller instead of killing the worker or flooding the log."""

    def execute(self, sql: str, arguments: Any = ()) -> Any:
        try:
            return super().execute(sql, arguments)
        except Exception:  # noqa: BLE001  whatever it is (also a value that cannot be bound), the caller gets it
            cast("_Connection", self.connection).worker.fail()
            return self

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except sqlite3.Error:
            cast("_Connection", self.connection).worker.fail()
            raise StopIteration from None


class _Connection(sqlite3.Connection):
    """The worker's connection: its commit reports instead of raising, and never stores half a transaction."""

    worker: _Worker

    def commit(self) -> None:
        """Commit, unless a statement of this transaction failed or its author gave it up: then roll back."""
        worker = self.worker
        if worker.stuck is not None:
            worker.exception = worker.exception or worker.stuck
        if worker.exception is None and not worker.given_up:
            try:
                super().commit()
            except sqlite3.Error:
                worker.fail()
            else:
                return
        self._undo()

    def _undo(self) -> None:
        self.worker.given_up, self.worker.stuck = False, None
        try:
            self.rollback()
        except sqlite3.Error:
            self.worker.stuck = sys.exc_info()  # the next commit must not store what could not be undone


class _Worker(sqlitedict.SqliteMultithread):  # type: ignore[misc]
    """sqlitedict's thread with a durable connection, that answers every request whatever happens."""

    given_up = False
    stuck: Any = None

    def _connect(self) -> tuple[_Connection, sqlite3.Cursor]:
        conn = sqlite3.connect(self.filename, timeout=BUSY_TIMEOUT_S, check_same_thread=False, factory=_Connection)
        conn.worker = self
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", f"journal_size_limit={WAL_SIZE_LIMIT_BYTES}"):
                sqlite3.Cursor(conn).execute(f"PRAGMA {pragma}")  # a plain cursor: here errors must raise
        except sqlite3.Error:
            conn.close()
            raise
        return conn, conn.cursor(_Cursor)

    def run(self) -> None:
        """Work; if that ends in an error (no connection), answer everything with it until closed."""
        try:
            super().run()
        except Exception:  # noqa: BLE001  the thread is the border: the error goes to the callers
            self._refuse_all(sys.exc_info())

    def _refuse_all(self, error: Any) -> None:
        request = None
        self.exception = error  # the constructor's caller finds it at its first call
        while request != sqlitedict._REQUEST_CLOSE:  # noqa: SLF001
            request, _, answers, _ = self.reqs.get()
            self.exception = error
            sqlitedict._put(answers, sqlitedict._RESPONSE_NO_MORE)  # noqa: SLF001

    def fail(self) -> None:
        """Keep the exception being handled for the caller; the first of several counts."""
        with self._lock:
            self.exception = self.exception or sys.exc_info()

    def check_raise_error(self) -> None:
        """Raise what a request left, once; the original also logs, but an error is logged where it stops."""
        with self._lock:
            error, self.exception = self.exception, None
        if error is not None:
            raise error[1]

    def give_up(self) -> None:
        """Roll back whatever was queued since the last commit, and forget its errors: the caller has them.

        Not through ``commit``: that would raise a pending error instead of queueing the request.
        """
        self.given_up = True
        answers: queue.Queue[object] = queue.Queue()
        self.reqs.put((sqlitedict._REQUEST_COMMIT, (), weakref.ref(answers), None))  # noqa: SLF001
        answers.get()
        with self._lock:
            self.exception = None


class _Table(sqlitedict.SqliteDict):  # type: ignore[misc]
    """The dictionary of rows: raw bytes (no pickle), our worker."""

    conn: Any = None

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(
                str(path), tablename=_TABLE, journal_mode="WAL", encode=bytes, decode=bytes, outer_stack=False
            )
        except BaseException:
            if self.conn is not None:
                self.conn.close(force=True)
                self.conn.join()
            raise

    def _new_conn(self) -> _Worker:
        return _Worker(self.filename, autocommit=False, journal_mode=self.journal_mode, outer_stack=False)


# -- reading -------------------------------------------------------------------------------------------------------------


class _Reader:
    """One reading connection shared by threads, one query at a time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._conn: sqlite3.Connection | None = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._conn.execute("PRAGMA query_only=ON")

    def query(self, sql: str, arguments: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows; UnavailableError after close."""
        with self._lock:
            if self._conn is None:
                raise UnavailableError("the key/value store is closed")
            return self._conn.execute(sql, arguments).fetchall()

    def close(self) -> None:
        with self._lock:
            if self._conn is not None:
                self._conn.close()
                self._conn = None


def _entry(key: str, row: object) -> Entry:
    if not isinstance(row, bytes) or len(row) < _REVISION_BYTES:
        raise BadDataError(f"the stored entry is damaged: {key[:80]!r}")
    return Entry(key, row[_REVISION_BYTES:], int.from_bytes(row[:_REVISION_BYTES], "big"))


class SqliteKeyValue:
    """KeyValue in one local file; see the module's docstring and the contract's."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._write_lock = threading.Lock()
        self._closed = False
        self._lock_file = LockFile(self._path.with_name(self._path.name + ".lock")).acquire()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock_file.release)
            self._open(undo)
            undo.pop_all()

    def _open(self, undo: contextlib.ExitStack) -> None:
        with self._translated("cannot open the key/value store"):
            self._refuse_foreign()
            self._table = _Table(self._path)
            undo.callback(self._table.close)
            self._gets = _Reader(self._path)
            undo.callback(self._gets.close)
            self._lists = _Reader(self._path)  # of its own, so that a long list delays no get
            undo.callback(self._lists.close)
            self._check_file()
            self._revision = self._last_revision()
        fsync_directory(self._path.parent)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The one border between sqlite and the rest."""
        try:
            with os_errors(f"{what} {self._path}"):
                yield
        except sqlite3.Error as err:
            raise from_sqlite_error(err, f"{what} {self._path}") from err

    def _refuse_foreign(self) -> None:
        """Before anything is written: another program's database stays as it is."""
        with contextlib.closing(_Reader(self._path)) as reader:
            tables = [name for (name,) in reader.query("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns = [row[1] for row in reader.query(f'PRAGMA table_info("{_TABLE}")')]
        if tables and (tables != [_TABLE] or columns != ["key", "value"]):
            raise BadDataError(f"cannot open the key/value store {self._path}: the file belongs to another program")

    def _check_file(self) -> None:
        """Refuse what we could not trust later: damage, no write-ahead log."""
        [(mode,)] = self._gets.query("PRAGMA journal_mode")
        if mode != "wal":
            raise UnsupportedError(f"the file system of {self._path} cannot hold a write-ahead log")
        [(verdict,), *_] = self._gets.query("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise BadDataError(f"cannot open the key/value store {self._path}: the database file is damaged")

    def _last_revision(self) -> int:
        row = self._row(_LAST_REVISION)
        if row is None:
            if self._gets.query(f'SELECT 1 FROM "{_TABLE}" LIMIT 1'):  # noqa: S608  a constant
                raise BadDataError(f"cannot open the key/value store {self._path}: its revision is missing")
            return 0
        return _entry(_LAST_REVISION, row).revision

    def _row(self, key: str) -> object:
        rows = self._gets.query(f'SELECT value FROM "{_TABLE}" WHERE key = ?', (key,))  # noqa: S608  a constant
        return rows[0][0] if rows else None

    # -- the contract ----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """See KeyValue."""
        check_key(key)
        with self._translated("cannot read"):
            row = self._row(key)
        return None if row is None else _entry(key, row)

    def list(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        """See KeyValue."""
        encode_text(prefix, "prefix")
        encode_text(after, "marker")
        check_limit(limit)
        end = successor(prefix)
        sql = f'SELECT key, value FROM "{_TABLE}" WHERE key > ? AND key >= ?'  # noqa: S608  a constant
        arguments: list[object] = [after, prefix]
        if end is not None and prefix:
            sql += " AND key < ?"
            arguments.append(end)
        sql += " ORDER BY key LIMIT ?"
        arguments.append(-1 if limit is None else limit)
        with self._translated("cannot list"):
            rows = self._lists.query(sql, arguments)
        return [_entry(key, row) for key, row in rows]

    def transact(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """See KeyValue."""
        check_transaction(operations, compares)
        with self._write_lock:
            if self._closed:
                raise UnavailableError("the key/value store is closed")
            with self._translated("cannot write to"):
                self._check_compares(compares)
                if operations:
                    self._apply(operations, self._revision + 1)
            return self._revision

    def _check_compares(self, compares: Sequence[Compare]) -> None:
        """Nobody else writes while we hold the write lock, so what holds now holds at the commit."""
        for compare in compares:
            row = self._row(compare.key)
            if (ABSENT if row is None else _entry(compare.key, row).revision) != compare.revision:
                raise ConflictError(f"the entry changed since it was read: {compare.key[:80]!r}")

    def _apply(self, operations: Sequence[Operation], revision: int) -> None:
        stamp = revision.to_bytes(_REVISION_BYTES, "big")
        try:
            for operation in operations:
                self._stage(operation, stamp)
            self._table[_LAST_REVISION] = stamp
            self._table.commit(blocking=True)
            self._revision = revision
        except BaseException:
            self._table.conn.give_up()
            with contextlib.suppress(sqlite3.Error):  # a revision that may be on the disk is never given twice
                self._revision = max(self._revision, self._last_revision())
            raise

    def _stage(self, operation: Operation, stamp: bytes) -> None:
        if isinstance(operation, Put):
            self._table[operation.key] = stamp + operation.value
        else:
            with contextlib.suppress(KeyError):
                del self._table[operation.key]

    def close(self) -> None:
        """Release the file; waits for the write that is under way."""
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.ExitStack() as stack:
                stack.callback(self._lock_file.release)
                stack.enter_context(self._translated("cannot close"))
                stack.callback(self._table.close)
                stack.callback(self._lists.close)
                stack.callback(self._gets.close)

    def __enter__(self) -> SqliteKeyValue:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
