"""The index's records of app container images and of where they came from: values in, values out."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from image_service.imagestore.index import Index
from imaging.errors import InvalidArgumentError

LAST_USED_STEP_NS = 60 * 10**9
"""A use is noted once a minute, so that readers do not write for every open."""

DRIVER_PROBE_MAX = 256
"""So many rows are counted to find the rarest of several labels."""

_COLUMNS = "blobkey, name, importtime, lastused, latest, size, treestoresize, imageid"

FIELDS = ("blobkey", "name", "importtime", "lastused", "latest", "size", "treestoresize")
"""What a list may be sorted by."""


@dataclass(frozen=True, slots=True)
class AciInfo:
    """ACIInfo: what is known of one image."""

    blob_key: str
    name: str
    import_time_ns: int
    last_used_ns: int
    latest: bool
    size_bytes: int = 0
    tree_store_size_bytes: int = 0
    image_id: str = ""
    """With the whole digest; empty for records of an old store until they were checked."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Remote: what a URL gave, and how long that may be believed."""

    aci_url: str
    sig_url: str
    etag: str
    blob_key: str
    cache_max_age_s: int = 0
    download_time_ns: int = 0


def _info(row: Sequence[object]) -> AciInfo:
    key, name, imported, used, latest, size, tree, image_id = row
    assert isinstance(imported, int)
    assert isinstance(used, int)
    assert isinstance(size, int)
    assert isinstance(tree, int)
    return AciInfo(str(key), str(name), imported, used, bool(latest), size, tree, str(image_id))


class AciInfos:
    """Records of images and remotes in an index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    # -- reading ---------------------------------------------------------------------------------------------------------

    def starting_with(self, prefix: str) -> list[str]:
        """Keys that start so: at most two, as nobody needs to know more."""
        rows = self._index.query(
            "SELECT blobkey FROM aciinfo WHERE blobkey >= ? AND blobkey < ? ORDER BY blobkey LIMIT 2",
            (prefix, prefix + "\U0010ffff"),
        )
        return [str(row[0]) for row in rows]

    def named(self, name: str) -> list[str]:
        """Keys of the images of that name, in order of import."""
        return [
            str(row[0]) for row in self._index.query("SELECT blobkey FROM aciinfo WHERE name = ? ORDER BY seq", (name,))
        ]

    def find(self, key: str) -> AciInfo | None:
        """The record of exactly this key."""
        rows = self._index.query(f"SELECT {_COLUMNS} FROM aciinfo WHERE blobkey = ?", (key,))  # noqa: S608  constants
        return _info(rows[0]) if rows else None

    def list(self, fields: Sequence[str] = (), *, ascending: bool = True) -> list[AciInfo]:
        """All records, by fields; the direction counts for each of them."""
        for field in fields:
            if field not in FIELDS:
                raise InvalidArgumentError(f"unknown field {field[:64]}")
        direction = "ASC" if ascending else "DESC"
        order = ", ".join(f"{field} {direction}" for field in fields) or "seq"
        rows = self._index.query(f"SELECT {_COLUMNS} FROM aciinfo ORDER BY {order}")  # noqa: S608  from the list above
        return [_info(row) for row in rows]

    def labels(self, key: str) -> dict[str, str]:
        """The labels of an image."""
        rows = self._index.query("SELECT label, value FROM acilabel WHERE blobkey = ? ORDER BY label", (key,))
        return {str(name): str(value) for name, value in rows}

    def best(self, name: str, labels: Mapping[str, str]) -> str | None:
        """The key of the image of that name with all these labels: one marked latest before others unless a version is asked for,
        then the youngest, then the first stored."""  # noqa: D205, D209  one sentence
        latest = "" if "version" in labels else "latest DESC, "
        if not labels:
            sql = f"SELECT blobkey FROM aciinfo WHERE name = ? ORDER BY {latest}importtime DESC, seq LIMIT 1"  # noqa: S608
            rows = self._index.query(sql, (name,))
            return str(rows[0][0]) if rows else None
        first, *others = sorted(labels, key=lambda label: self._count(name, label, labels[label]))
        exists = " AND EXISTS (SELECT 1 FROM acilabel o WHERE o.blobkey = d.blobkey AND o.label = ? AND o.value = ?)"
        sql = (
            "SELECT d.blobkey FROM acilabel d WHERE d.name = ? AND d.label = ? AND d.value = ?"  # noqa: S608
            f"{exists * len(others)} ORDER BY {latest}importtime DESC, seq LIMIT 1"
        )
        pairs = [text for label in others for text in (label, labels[label])]
        rows = self._index.query(sql, (name, first, labels[first], *pairs))
        return str(rows[0][0]) if rows else None

    def _count(self, name: str, label: str, value: str) -> int:
        sql = "SELECT count(*) FROM (SELECT 1 FROM acilabel WHERE name = ? AND label = ? AND value = ? LIMIT ?)"
        return int(self._index.query(sql, (name, label, value, DRIVER_PROBE_MAX))[0][0])

    # -- writing ---------------------------------------------------------------------------------------------------------

    def save(self, info: AciInfo, labels: Mapping[str, str], *, latest: bool | None = None) -> AciInfo:
        """WriteACIInfo: record an image (anew). What was measured of its trees stays, and that it is the latest, unless told."""
        with self._index.change() as cursor:
            found = cursor.execute(
                "SELECT latest, treestoresize FROM aciinfo WHERE blobkey = ?", (info.blob_key,)
            ).fetchone()
            if found is not None:
                info = replace(info, latest=bool(found[0]), tree_store_size_bytes=int(found[1]))
            if latest is not None:
                info = replace(info, latest=latest)
            self._replace(cursor, info, labels)
        return info

    def _replace(self, cursor: sqlite3.Cursor, info: AciInfo, labels: Mapping[str, str]) -> None:
        _delete_rows(cursor, info.blob_key)
        values = (
            info.blob_key,
            info.name,
            info.import_time_ns,
            info.last_used_ns,
            info.latest,
            info.size_bytes,
            info.tree_store_size_bytes,
            info.image_id,
        )
        cursor.execute(f"INSERT INTO aciinfo ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)  # noqa: S608
        seq = cursor.lastrowid
        rows = [
            (info.name, label, value, info.blob_key, info.latest, info.import_time_ns, seq)
            for label, value in labels.items()
        ]
        cursor.executemany("INSERT INTO acilabel VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def touch(self, key: str, now_ns: int) -> bool:
        """Note a use; whether there is such a record."""
        rows = self._index.query("SELECT lastused FROM aciinfo WHERE blobkey = ?", (key,))
        if rows and abs(now_ns - int(rows[0][0])) >= LAST_USED_STEP_NS:
            with self._index.change() as cursor:
                cursor.execute("UPDATE aciinfo SET lastused = ? WHERE blobkey = ?", (now_ns, key))
        return bool(rows)

    def update_tree_store_size(self, key: str, size_bytes: int) -> None:
        """UpdateTreeStoreSize; a missing key is fine."""
        with self._index.change() as cursor:
            cursor.execute("UPDATE aciinfo SET treestoresize = ? WHERE blobkey = ?", (size_bytes, key))

    def delete(self, key: str) -> bool:
        """Remove a record and all remotes that led to it, in one transaction, also on a full disk; whether there was one."""
        found = self.find(key) is not None

        def work(cursor: sqlite3.Cursor) -> None:
            _delete_rows(cursor, key)
            cursor.execute("DELETE FROM remote WHERE blobkey = ?", (key,))

        if found:
            self._index.change_even_if_full(work)
        return found

    # -- remotes ---------------------------------------------------------------------------------------------------------

    def find_remote(self, aci_url: str) -> Remote | None:
        """The remote of exactly this URL."""
        rows = self._index.query("SELECT * FROM remote WHERE aciurl = ?", (aci_url,))
        return Remote(*rows[0]) if rows else None

    def save_remote(self, remote: Remote) -> None:
        """Record a remote, or record it anew."""
        values = (
            remote.aci_url,
            remote.sig_url,
            remote.etag,
            remote.blob_key,
            remote.cache_max_age_s,
            remote.download_time_ns,
        )
        with self._index.change() as cursor:
            cursor.execute("INSERT OR REPLACE INTO remote VALUES (?, ?, ?, ?, ?, ?)", values)

    def list_remotes(self) -> Sequence[Remote]:
        """All remotes, by URL."""
        return [Remote(*row) for row in self._index.query("SELECT * FROM remote ORDER BY aciurl")]


def _delete_rows(cursor: sqlite3.Cursor, key: str) -> None:
    cursor.execute("DELETE FROM aciinfo WHERE blobkey = ?", (key,))
    cursor.execute("DELETE FROM acilabel WHERE blobkey = ?", (key,))
