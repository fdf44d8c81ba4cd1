"""Publishing catalogues so that every reader, at every moment, sees one complete state.

Layout of a published directory::

    streams -> snapshots/<n>            the one thing that changes: a symbolic link, replaced in one rename
    snapshots/<n>/v1/index.json         and .sjson, .json.gpg if there is a key
    snapshots/<n>/v1/<name>-<12 digits of its sha256>.json      and its signed twins
    ...                                 content, wherever the documents say

Rules.

* A snapshot is written whole and made durable before the link leads to it. Killed anywhere, a publisher leaves the old catalogue or the
  new one, and at worst a snapshot nobody knows, which the next publisher removes.
* Products files are named by their content, so no two have the same base name, and an index read a moment ago still leads to the
  products it meant: files of the last catalogue stay for ``keep_s`` after it was replaced.
* In signed documents the index names signed products.
* One publisher a directory: a lock file refuses a second one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from imaging.errors import AlreadyExistsError, BadDataError, InvalidArgumentError
from imaging.files import LockFile, atomic_write_bytes, fsync_directory, make_directory, os_errors, temporary_beside
from imaging.simplestreams.paths import INDEX_FORMAT, PRODUCTS_FORMAT, signed_path
from imaging.simplestreams.signing import Signer
from imaging.simplestreams.writer import format_date

KEEP_S = 3600.0
"""How long what left a catalogue stays readable: Incus keeps an index for five minutes, and a download may take most of an hour."""

LINK = "streams"
SNAPSHOTS = "snapshots"
LOCK = ".publisher.lock"


@dataclass(frozen=True, slots=True)
class Document:
    """A products file to be: its content id, what kind of data it has, and its products."""

    content_id: str
    datatype: str
    products: Mapping[str, Any]
    clouds: Sequence[Mapping[str, str]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More attributes of the top level."""


def _encode(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def _file_name(content_id: str, data: bytes) -> str:
    stem = "".join(char if char.isalnum() or char in ".-" else "-" for char in content_id)
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:12]}.json"


class Publisher:
    """See the module's docstring. ``step`` is called with a word before every write and rename: tests end the process there."""

    def __init__(
        self,
        directory: Path,
        signer: Signer | None = None,
        *,
        keep_s: float = KEEP_S,
        now: Callable[[], float] = time.time,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = directory
        self._signer = signer
        self._keep_s = keep_s
        self._now = now
        self._step = step

    def publish(self, documents: Sequence[Document]) -> bool:
        """Make these documents the catalogue; False if it says exactly that already. See the rules."""
        names = [document.content_id for document in documents]
        if len(set(names)) != len(names):
            raise InvalidArgumentError("two documents of a catalogue have the same content id")
        make_directory(self.directory / SNAPSHOTS)
        with LockFile(self.directory / LOCK):
            self._remove_strays()
            updated = format_date(datetime.fromtimestamp(self._now(), UTC))
            index, files = self._documents(documents, updated)
            if self._is_current(index):
                return False
            files["index.json"] = _encode(index | {"updated": updated})
            self._switch(self._write_snapshot(files))
            self._remove_strays()
        return True

    # -- content -----------------------------------------------------------------------------------------------------

    def _documents(self, documents: Sequence[Document], updated: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The index but for its date, and the products files by name."""
        files: dict[str, bytes] = {}
        entries: dict[str, Any] = {}
        for one in documents:
            if not one.products:
                continue  # clients skip an entry without products, and some stumble over it
            head = {"format": PRODUCTS_FORMAT, "content_id": one.content_id, "datatype": one.datatype}
            data = _encode({**one.extra, **head, "products": one.products})
            name = _file_name(one.content_id, data)
            files[name] = data
            entries[one.content_id] = {
                "format": PRODUCTS_FORMAT,
                "datatype": one.datatype,
                "path": f"{LINK}/v1/{name}",
                "products": sorted(one.products),
                "updated": self._date_of(name, updated),
                **({"clouds": list(one.clouds)} if one.clouds else {}),
            }
        return {"format": INDEX_FORMAT, "index": entries}, files

    def _date_of(self, name: str, updated: str) -> str:
        """A products file that is published already keeps its date."""
        for entry in self._current_index().get("index", {}).values():
            if entry.get("path") == f"{LINK}/v1/{name}":
                return str(entry.get("updated"))
        return updated

    def _current_index(self) -> dict[str, Any]:
        try:
            loaded = msgspec.json.decode((self.directory / LINK / "v1" / "index.json").read_bytes())
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as err:
            raise BadDataError(f"the catalogue in {self.directory} is damaged") from err
        return loaded if isinstance(loaded, dict) else {}

    def _is_current(self, index: Mapping[str, Any]) -> bool:
        current = self._current_index()
        current.pop("updated", None)
        signed = (self.directory / LINK / "v1" / "index.sjson").exists()
        return current == index and signed == (self._signer is not None)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write_snapshot(self, files: Mapping[str, bytes]) -> Path:
        """A new snapshot with these files, their signed twins, and what readers of the last one may still want."""
        number = 1 + max((int(path.name) for path in self._snapshots()), default=0)
        snapshot = self.directory / SNAPSHOTS / str(number)
        self._step("make snapshot")
        make_directory(snapshot / "v1")
        for name in sorted(files, key=lambda name: name == "index.json"):
            self._write_signed(snapshot / "v1", name, files[name])
        self._carry(snapshot / "v1")
        fsync_directory(snapshot / "v1")
        return snapshot

    def _write_signed(self, directory: Path, name: str, data: bytes) -> None:
        self._write(directory / name, data)
        if self._signer is None:
            return
        self._write(directory / f"{name}.gpg", self._signer.detach_sign(data))
        text = _sign_paths(data) if name == "index.json" else data
        self._write(directory / signed_path(name), self._signer.clearsign(text))

    def _write(self, path: Path, data: bytes) -> None:
        self._step(f"write {path.name}")
        atomic_write_bytes(path, data)

    def _carry(self, target: Path) -> None:
        """Link products files of the last catalogue into the new one, until ``keep_s`` after they left it."""
        source = self.directory / LINK / "v1"
        if not source.is_dir():
            return
        listed = {Path(str(entry.get("path"))).stem for entry in self._current_index().get("index", {}).values()}
        with os_errors(f"cannot keep the last catalogue of {self.directory}"):
            for path in sorted(source.iterdir()):
                if (target / path.name).exists() or path.name.startswith("index."):
                    continue
                if path.name.split(".json")[0].removesuffix(".sjson") in listed:
                    os.utime(path, (self._now(), self._now()))  # it leaves now: its time begins
                if self._now() - path.stat().st_mtime < self._keep_s:
                    self._step(f"carry {path.name}")
                    os.link(path, target / path.name)

    def _switch(self, snapshot: Path) -> None:
        link = self.directory / LINK
        with os_errors(f"cannot publish the catalogue in {self.directory}"):
            if link.exists() and not link.is_symlink():
                raise AlreadyExistsError(f"{link} is not a catalogue that was published here")
            temporary = temporary_beside(link)
            temporary.symlink_to(Path(SNAPSHOTS, snapshot.name))
            self._step("switch")
            temporary.replace(link)
        fsync_directory(self.directory)
        self._step("switched")

    def _snapshots(self) -> list[Path]:
        return [path for path in (self.directory / SNAPSHOTS).iterdir() if path.name.isdigit()]

    def _remove_strays(self) -> None:
        """Remove snapshots the link does not lead to, and links that never became the one."""
        current = (self.directory / LINK).resolve().name if (self.directory / LINK).exists() else ""
        for snapshot in self._snapshots():
            if snapshot.name != current:
                shutil.rmtree(snapshot, ignore_errors=True)
        for stray in self.directory.glob(".tmp-*"):
            with suppress(OSError):
                stray.unlink()


def _sign_paths(index: bytes) -> bytes:
    """The index that goes with signed products: it names their signed twins."""
    document = msgspec.json.decode(index)
    for entry in document["index"].values():
        entry["path"] = signed_path(entry["path"])
    return _encode(document)
