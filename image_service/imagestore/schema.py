"""The index's tables and how older ones become them.

Versions 0 to 7 are the original store's, statement for statement as far as SQLite goes, so that rows taken out of an old store at
any version can be brought here. Version 8 is ours: times are nanoseconds UTC, the whole image id is kept, and labels are rows.

Each step is a function of the cursor and runs in the migration's one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

from imaging.errors import BadDataError, InternalError, MistifyError, UnsupportedError
from imaging.kv.sqlite import from_sqlite_error

VERSION = 8
"""The version this program reads and writes."""

SIZES_SINCE = 5
"""Stores older than this knew no sizes: they are measured after the migration."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS version (version INTEGER NOT NULL)",
    """CREATE TABLE remote (
        aciurl TEXT PRIMARY KEY, sigurl TEXT NOT NULL, etag TEXT NOT NULL, blobkey TEXT NOT NULL,
        cachemaxage INTEGER NOT NULL, downloadtime INTEGER NOT NULL)""",
    "CREATE INDEX remoteblobkey ON remote (blobkey)",
    """CREATE TABLE aciinfo (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, blobkey TEXT NOT NULL UNIQUE, imageid TEXT NOT NULL DEFAULT '',
        name TEXT NOT NULL, importtime INTEGER NOT NULL, lastused INTEGER NOT NULL, latest INTEGER NOT NULL,
        size INTEGER NOT NULL DEFAULT 0, treestoresize INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX aciname ON aciinfo (name, latest DESC, importtime DESC, seq)",
    "CREATE INDEX acitime ON aciinfo (name, importtime DESC, seq)",
    """CREATE TABLE acilabel (
        name TEXT NOT NULL, label TEXT NOT NULL, value TEXT NOT NULL, blobkey TEXT NOT NULL,
        latest INTEGER NOT NULL, importtime INTEGER NOT NULL, seq INTEGER NOT NULL,
        PRIMARY KEY (blobkey, label)) WITHOUT ROWID""",
    "CREATE INDEX labellatest ON acilabel (name, label, value, latest DESC, importtime DESC, seq)",
    "CREATE INDEX labeltime ON acilabel (name, label, value, importtime DESC, seq)",
    """CREATE TABLE ociimage (
        digest TEXT PRIMARY KEY, mediatype TEXT NOT NULL, size INTEGER NOT NULL,
        importtime INTEGER NOT NULL, lastused INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE ocitag (
        name TEXT NOT NULL, tag TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (name, tag)) WITHOUT ROWID""",
    "CREATE INDEX ocitagdigest ON ocitag (digest)",
    """CREATE TABLE ocipart (
        image TEXT NOT NULL, digest TEXT NOT NULL, mediatype TEXT NOT NULL, size INTEGER NOT NULL,
        PRIMARY KEY (image, digest)) WITHOUT ROWID""",
    "CREATE INDEX ocipartdigest ON ocipart (digest)",
)


def create(cursor: sqlite3.Cursor) -> None:
    """All tables of VERSION in an empty database."""
    for statement in _TABLES:
        cursor.execute(statement)
    cursor.execute("INSERT INTO version VALUES (?)", (VERSION,))


def find_version(cursor: sqlite3.Cursor) -> int | None:
    """The version of the tables, None if there are none."""
    if not cursor.execute("SELECT 1 FROM sqlite_master WHERE name = 'version'").fetchone():
        return None
    row = cursor.execute("SELECT version FROM version").fetchone()
    if row is None:
        raise BadDataError("db version table empty")
    return int(row[0])


def check_version(version: int) -> None:
    """UnsupportedError for tables of a later program."""
    if version > VERSION:
        raise UnsupportedError(
            f"current store db version: {version} (greater than the current rkt expected version: {VERSION})"
        )


def _to_1(_cursor: sqlite3.Cursor) -> None:
    """Only the number changed."""


def _to_2(cursor: sqlite3.Cursor) -> None:
    cursor.execute("ALTER TABLE remote ADD COLUMN cachemaxage INTEGER NOT NULL DEFAULT 0")
    cursor.execute("ALTER TABLE remote ADD COLUMN downloadtime INTEGER NOT NULL DEFAULT 0")


def _to_3(cursor: sqlite3.Cursor) -> None:
    cursor.execute("ALTER TABLE aciinfo RENAME COLUMN appname TO name")


def _to_4(cursor: sqlite3.Cursor) -> None:
    cursor.execute("ALTER TABLE aciinfo ADD COLUMN lastusedtime INTEGER NOT NULL DEFAULT 0")
    cursor.execute("UPDATE aciinfo SET lastusedtime = CAST(strftime('%s', 'now') AS INTEGER) * 1000000000")


def _to_5(cursor: sqlite3.Cursor) -> None:
    cursor.execute("ALTER TABLE aciinfo RENAME COLUMN lastusedtime TO lastused")
    cursor.execute("ALTER TABLE aciinfo ADD COLUMN size INTEGER NOT NULL DEFAULT 0")
    cursor.execute("ALTER TABLE aciinfo ADD COLUMN treestoresize INTEGER NOT NULL DEFAULT 0")


def _to_6(cursor: sqlite3.Cursor) -> None:
    cursor.execute("ALTER TABLE aciinfo ADD COLUMN insecureoptions INTEGER NOT NULL DEFAULT 0")


def _to_7(cursor: sqlite3.Cursor) -> None:
    cursor.execute("ALTER TABLE aciinfo DROP COLUMN insecureoptions")


def _to_8(cursor: sqlite3.Cursor) -> None:
    """Labels are not known yet: whoever migrates reads them from the manifests afterwards."""
    cursor.execute("ALTER TABLE remote RENAME TO oldremote")
    cursor.execute("ALTER TABLE aciinfo RENAME TO oldaciinfo")
    for (name,) in cursor.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall():
        cursor.execute(f'DROP INDEX "{name}"')
    for statement in _TABLES:
        cursor.execute(statement)
    cursor.execute("INSERT INTO remote SELECT aciurl, sigurl, etag, blobkey, cachemaxage, downloadtime FROM oldremote")
    cursor.execute(
        "INSERT INTO aciinfo (blobkey, name, importtime, lastused, latest, size, treestoresize) "
        "SELECT blobkey, name, importtime, lastused, latest, size, treestoresize FROM oldaciinfo ORDER BY importtime"
    )
    cursor.execute("DROP TABLE oldremote")
    cursor.execute("DROP TABLE oldaciinfo")


STEPS: Mapping[int, Callable[[sqlite3.Cursor], None]] = {
    1: _to_1,
    2: _to_2,
    3: _to_3,
    4: _to_4,
    5: _to_5,
    6: _to_6,
    7: _to_7,
    8: _to_8,
}


def migrate(cursor: sqlite3.Cursor, version: int, final: int = VERSION) -> None:
    """Bring tables of ``version`` to ``final``, inside the caller's transaction."""
    if final > VERSION:
        raise InternalError("required migrate final version greater than the last supported db version")
    for number in range(version + 1, final + 1):
        step = STEPS.get(number)
        if step is None:
            raise InternalError(f"missing migrate function for version {number}")
        try:
            step(cursor)
            cursor.execute("UPDATE version SET version = ?", (number,))
        except sqlite3.Error as err:
            raise _failed(err, number) from err


def _failed(err: sqlite3.Error, number: int) -> MistifyError:
    kind = type(from_sqlite_error(err, ""))
    return kind(f"failed to migrate db to version {number}")
