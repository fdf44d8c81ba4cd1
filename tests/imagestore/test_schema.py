"""The index's tables at every version, migrated to each later one; copies; many writers."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from image_service.imagestore import schema
from image_service.imagestore.index import BACKUPS_MAX, Index, back_up
from image_service.imagestore.infos import AciInfo, AciInfos, Remote
from image_service.imagestore.store import ImageStore
from imaging.errors import BadDataError, InternalError, NotPermittedError, UnavailableError, UnsupportedError
from imaging.files import make_directory
from tests.imagestore.images import aci, key_of, put, read

REMOTE_COLUMNS = ["aciurl", "sigurl", "etag", "blobkey", "cachemaxage", "downloadtime"]
INFO_COLUMNS = ["blobkey", "name", "importtime", "latest", "lastused", "size", "treestoresize"]
ROWS = [("sha512-a", "a", 100, 1), ("sha512-b", "b", 200, 0)]


def _old_database(path: Path, version: int) -> None:
    """A store's tables as a program of version 0 made them, and what later programs of that time did to them."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        cursor = database.cursor()
        cursor.execute("CREATE TABLE version (version INTEGER)")
        cursor.execute("INSERT INTO version VALUES (0)")
        cursor.execute("CREATE TABLE remote (aciurl TEXT, sigurl TEXT, etag TEXT, blobkey TEXT)")
        cursor.execute("CREATE TABLE aciinfo (blobkey TEXT, appname TEXT, importtime INTEGER, latest INTEGER)")
        cursor.execute("CREATE UNIQUE INDEX aciurlidx ON remote (aciurl)")
        cursor.execute("CREATE INDEX appnameidx ON aciinfo (appname)")
        cursor.executemany("INSERT INTO aciinfo VALUES (?, ?, ?, ?)", ROWS)
        cursor.execute("INSERT INTO remote VALUES ('http://x', 'http://x.asc', 'e', 'sha512-a')")
        schema.migrate(cursor, 0, version)


def _rows(path: Path, table: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY 1")]


@pytest.mark.parametrize(
    ("first", "final"), [(first, final) for final in range(1, schema.VERSION + 1) for first in range(final)]
)
def test_migration_from_every_version_to_every_later_one_keeps_the_rows(tmp_path: Path, first: int, final: int) -> None:
    path = tmp_path / "index"
    _old_database(path, first)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        schema.migrate(database.cursor(), first, final)
        assert schema.find_version(database.cursor()) == final
    infos, [remote] = _rows(path, "aciinfo"), _rows(path, "remote")
    infos.sort(key=lambda row: row["blobkey"])
    name = "name" if final >= 3 else "appname"
    assert [(row["blobkey"], row[name], row["importtime"], row["latest"]) for row in infos] == ROWS
    assert (remote["aciurl"], remote["blobkey"]) == ("http://x", "sha512-a")
    assert ("cachemaxage" in remote) == (final >= 2)
    assert ("lastusedtime" in infos[0]) == (final == 4)
    assert ("size" in infos[0]) == (final >= 5)
    assert ("insecureoptions" in infos[0]) == (final == 6)
    if final >= 4:
        assert all(row["lastusedtime" if final == 4 else "lastused"] > 10**18 for row in infos)
    if final == 7:
        assert sorted(infos[0]) == sorted(INFO_COLUMNS)
        assert sorted(remote) == sorted(REMOTE_COLUMNS)


@pytest.mark.parametrize("version", range(schema.VERSION))
def test_store_of_an_older_version_opens_with_sizes_labels_and_a_copy(tmp_path: Path, version: int) -> None:
    image = aci(labels={"version": "1"})
    key = key_of(image)
    with ImageStore(tmp_path) as store:
        put(store, image)
    for path in (tmp_path / "db").iterdir():
        path.unlink()
    _old_database(tmp_path / "db" / "index.sqlite", version)
    name = "name" if version >= 3 else "appname"
    with closing(sqlite3.connect(tmp_path / "db" / "index.sqlite")) as database, database:
        database.execute(
            f"UPDATE aciinfo SET blobkey = ?, {name} = 'example.com/app' WHERE blobkey = 'sha512-a'", (key,)
        )
    with ImageStore(tmp_path) as store:
        info = store.get_aci_info(key)
        assert (info.size_bytes, info.import_time_ns, info.latest) == (len(image), 100, True)
        assert store.get_aci("example.com/app", {"version": "1"}) == key
        assert read(store, key) == image
        assert store.get_remote("http://x").etag == "e"
    copy = tmp_path / "db-backups" / "0" / "index.sqlite"
    with closing(sqlite3.connect(copy)) as database:
        assert schema.find_version(database.cursor()) == version
    ImageStore(tmp_path).close()
    assert not (tmp_path / "db-backups" / "1").exists()


def _set_version(tmp_path: Path, sql: str) -> None:
    ImageStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "db" / "index.sqlite")) as database, database:
        database.execute(sql)


def test_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    _set_version(tmp_path, "UPDATE version SET version = 99")
    with pytest.raises(UnsupportedError) as caught:
        ImageStore(tmp_path)
    assert caught.value.message == (
        f"current store db version: 99 (greater than the current rkt expected version: {schema.VERSION})"
    )


def test_store_without_its_version_is_refused(tmp_path: Path) -> None:
    _set_version(tmp_path, "DELETE FROM version")
    with pytest.raises(BadDataError, match="db version table empty"):
        ImageStore(tmp_path)


def test_migration_waits_until_the_others_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_service.imagestore.parts.LEAVE_TIMEOUT_S", 0.05)
    with ImageStore(tmp_path):
        with closing(sqlite3.connect(tmp_path / "db" / "index.sqlite")) as database, database:
            database.execute("UPDATE version SET version = 7")
        with pytest.raises(UnavailableError, match="stayed locked"):
            ImageStore(tmp_path)


def test_migration_by_a_stranger_is_refused(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "db")
    _old_database(directory / "index.sqlite", 6)
    with pytest.raises(NotPermittedError) as caught:
        Index(directory, tmp_path / "backups", euid=lambda: 12345)
    assert caught.value.message == "database schema needs to be updated, re-run as root to perform the update"


def test_migration_that_fails_names_the_version_and_changes_nothing(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "db")
    _old_database(directory / "index.sqlite", 4)
    with closing(sqlite3.connect(directory / "index.sqlite")) as database, database:
        database.execute("ALTER TABLE aciinfo ADD COLUMN treestoresize INTEGER")
    with pytest.raises(InternalError) as caught:
        Index(directory, tmp_path / "backups")
    assert caught.value.message == "failed to migrate db to version 5"
    with closing(sqlite3.connect(directory / "index.sqlite")) as database:
        assert schema.find_version(database.cursor()) == 4


def test_migration_beyond_what_is_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        with pytest.raises(InternalError, match="required migrate final version greater than the last supported"):
            schema.migrate(database.cursor(), 0, schema.VERSION + 1)
        monkeypatch.setattr(schema, "STEPS", {})
        with pytest.raises(InternalError, match="missing migrate function for version 8"):
            schema.migrate(database.cursor(), 7)


def test_backup_keeps_the_youngest_copies(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "db")
    for number in range(BACKUPS_MAX + 3):
        (source / "data").write_text(str(number))
        back_up(source, tmp_path / "backups")
    names = sorted(path.name for path in (tmp_path / "backups").iterdir())
    assert names == [str(number) for number in range(BACKUPS_MAX)]
    kept = [(tmp_path / "backups" / name / "data").read_text() for name in names]
    assert kept == [str(BACKUPS_MAX + 2 - number) for number in range(BACKUPS_MAX)]


def test_index_with_a_hundred_writers_loses_nothing(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "db")
    opened = [Index(directory, tmp_path / "backups") for _ in range(10)]

    def write(number: int) -> None:
        infos = AciInfos(opened[number % 10])
        infos.save(AciInfo(f"sha512-{number:064x}", "a", number, number, latest=False), {"n": str(number)})
        infos.save_remote(Remote(f"http://x/{number}", "", "", "k"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    infos = AciInfos(opened[0])
    assert {info.import_time_ns for info in infos.list()} == set(range(100))
    assert len(infos.list_remotes()) == 100
    for index in opened:
        index.close()
