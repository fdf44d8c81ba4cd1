"""The index: what is stored under which key, name and labels. SQLite, for any number of processes and threads.

Write-ahead log, ``synchronous=FULL``: a committed record survives a power cut. Every change runs in :meth:`Index.change`, one
transaction that takes the write lock at its beginning (so it never fails half-way for being second). Readers see the last
commit and wait for nobody.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from image_service.imagestore import schema
from image_service.imagestore.locks import directory_lock
from imaging.errors import NoSpaceError, NotPermittedError, UnavailableError
from imaging.files import fsync_directory, make_directory, os_errors
from imaging.kv.sqlite import from_sqlite_error

BUSY_TIMEOUT_S = 60.0
"""How long a change waits for the changes of other processes; each takes some milliseconds and one fsync."""

BACKUPS_MAX = 5
"""Copies kept from before a migration."""

RESERVE_BYTES = 1 << 20
"""Kept in a file so that an image can be removed from a full disk: one removal writes some pages of the log."""

FILE_NAME = "index.sqlite"
RESERVE_NAME = "reserve"


class Index:
    """One open index; threads share it. ``close`` ends it."""

    def __init__(
        self,
        directory: Path,
        backups: Path,
        *,
        migrating: Callable[[], AbstractContextManager[None]] = nullcontext,
        euid: Callable[[], int] = os.geteuid,
    ) -> None:
        self.path = directory / FILE_NAME
        self._directory = directory
        self._backups = backups
        self._migrating = migrating
        self._euid = euid
        self._lock = threading.RLock()
        self._conn: sqlite3.Connection | None = None
        with self._translated("cannot open"):
            self._open()
        self._ensure_reserve()

    def _open(self) -> None:
        conn = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            with directory_lock(self._directory, exclusive=True):  # two that switch the log on at once would collide
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-16384"):
                    conn.execute(f"PRAGMA {pragma}")
            self._conn = conn
            self._ensure_tables(conn)
        except BaseException:
            self._conn = None
            conn.close()
            raise

    def _ensure_tables(self, conn: sqlite3.Connection) -> None:
        version = schema.find_version(conn.cursor())
        if version is None:
            self._create()
        elif version < schema.VERSION:
            self._migrate(conn)
        else:
            schema.check_version(version)

    def _create(self) -> None:
        with self.change() as cursor:
            if schema.find_version(cursor) is None:  # else another process was faster
                schema.create(cursor)
        fsync_directory(self._directory)

    def _migrate(self, conn: sqlite3.Connection) -> None:
        """Alone, with a copy of what was; unless another process did it while we waited."""
        if self._euid() not in {0, self.path.stat().st_uid}:
            raise NotPermittedError("database schema needs to be updated, re-run as root to perform the update")
        with self._migrating():
            version = schema.find_version(conn.cursor())
            if version is None or version >= schema.VERSION:
                return
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            back_up(self._directory, self._backups)
            with self.change() as cursor:
                schema.migrate(cursor, version)

    def is_complete(self) -> bool:
        """Whether somebody compared the rows with the files since the tables were made or migrated."""
        return bool(self.query("PRAGMA user_version")[0][0])

    def set_complete(self) -> None:
        """They were compared."""
        with self.change() as cursor:
            cursor.execute("PRAGMA user_version = 1")

    # -- use -------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as err:
            raise from_sqlite_error(err, f"{what} the index {self.path}") from err

    def _open_connection(self) -> sqlite3.Connection:
        if self._conn is None:
            raise UnavailableError("the image store is closed")
        return self._conn

    def query(self, sql: str, arguments: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of a read."""
        with self._lock, self._translated("cannot read"):
            return self._open_connection().execute(sql, arguments).fetchall()

    @contextmanager
    def change(self) -> Iterator[sqlite3.Cursor]:
        """One transaction: committed when the block ends, rolled back when it raises."""
        with self._lock, self._translated("cannot write to"):
            conn = self._open_connection()
            conn.execute("BEGIN IMMEDIATE")
            try:
                yield conn.cursor()
                conn.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a failed COMMIT may have rolled back already; the first error counts
                    conn.execute("ROLLBACK")
                raise

    def change_even_if_full(self, work: Callable[[sqlite3.Cursor], None]) -> None:
        """Do ``work`` in one transaction; on a full disk the reserve is given up for it."""
        try:
            with self.change() as cursor:
                work(cursor)
        except NoSpaceError:
            with os_errors("cannot give up the index's reserve"):
                (self._directory / RESERVE_NAME).unlink(missing_ok=True)
            with self.change() as cursor:
                work(cursor)

    def _ensure_reserve(self) -> None:
        """Have the reserve, unless the disk is full: then there is nothing to reserve."""
        path = self._directory / RESERVE_NAME
        with suppress(OSError):  # a courtesy to a later removal; nothing depends on it now
            if path.exists() and path.stat().st_size == RESERVE_BYTES:
                return
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def close(self) -> None:
        """Close; idempotent."""
        with self._lock:
            conn, self._conn = self._conn, None
            if conn is not None:
                conn.close()


def back_up(directory: Path, backups: Path, *, limit: int = BACKUPS_MAX) -> Path:
    """Copy a directory's files to ``backups``/0; older copies move up by one, those beyond ``limit`` go."""
    make_directory(backups)
    with os_errors(f"cannot back up {directory}"):
        fresh = backups / "new"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(directory, fresh, ignore=shutil.ignore_patterns(RESERVE_NAME))
        shutil.rmtree(backups / str(limit - 1), ignore_errors=True)
        for number in range(limit - 2, -1, -1):
            if (backups / str(number)).exists():
                (backups / str(number)).rename(backups / str(number + 1))
        fresh.rename(backups / "0")
    fsync_directory(backups)
    return backups / "0"
