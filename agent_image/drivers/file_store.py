"""The records of a pool on disk: one SQLite table, one transaction for each change of the pool.

Not a :class:`imaging.kv.base.KeyValue`, because those bound a transaction (OPERATIONS_MAX) and a recursive snapshot of a
large tree must stay one. The pool's lock is held before the store is opened, so there is one process at the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent_image.drivers.file_records import RECORD_KINDS, Catalog, Change, PoolRecord
from imaging.errors import BadDataError, MistifyError, NoSpaceError, UnavailableError, UnsupportedError

FORMAT = 1
"""Version of the records; a pool written by a later program is refused instead of misread."""

BUSY_TIMEOUT_S = 10.0
"""Only a backup or an operator's shell can hold the file; both end."""

_POOL_KEY = "pool"
_SCHEMA = "CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


class RecordStore:
    """Loads the catalog and makes changes durable."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._translated("cannot open"):
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            with self._translated("cannot open"):
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")  # a change that returned survives power loss
                self._db.execute(_SCHEMA)
        except BaseException:
            self._db.close()
            raise

    def load(self) -> tuple[PoolRecord, Catalog]:
        """Every record; BadDataError if one cannot be read."""
        pool, change = PoolRecord(), Change()
        with self._translated("cannot read"):
            rows = self._db.execute("SELECT key, value FROM records").fetchall()
        for key, value in rows:
            try:
                if key == _POOL_KEY:
                    pool = msgspec.json.decode(value, type=PoolRecord)
                else:
                    change.put(msgspec.json.decode(value, type=RECORD_KINDS[key[:1]]))
            except (msgspec.MsgspecError, KeyError) as err:
                raise BadDataError(f"damaged record {key!r} in {self._path}") from err
        if pool.format != FORMAT:
            raise UnsupportedError(f"{self._path} has format {pool.format}, this program knows {FORMAT}")
        catalog = Catalog()
        catalog.apply(change)
        return pool, catalog

    def commit(self, pool: PoolRecord, change: Change) -> None:
        """Make a change durable: all of it or nothing."""
        puts = [(key, msgspec.json.encode(record)) for key, record in change.puts.items()]
        puts.append((_POOL_KEY, msgspec.json.encode(pool)))
        with self._translated("cannot write"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in change.deletes])
                self._db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", puts)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as err:
            raise _translate(err, f"{what} the records of the pool: {self._path}") from err


_BY_CODE: dict[int, type[MistifyError]] = {
    sqlite3.SQLITE_FULL: NoSpaceError,
    sqlite3.SQLITE_CORRUPT: BadDataError,
    sqlite3.SQLITE_NOTADB: BadDataError,
}


def _translate(err: sqlite3.Error, what: str) -> MistifyError:
    code = getattr(err, "sqlite_errorcode", 0) & 0xFF  # extended codes carry the primary one in the low byte
    kind = _BY_CODE.get(code, UnavailableError)
    return kind(what if kind is not NoSpaceError else f"{what}: no space left on device")
