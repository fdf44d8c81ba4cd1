"""Catalogues an operator works with by name, and finding images in them.

A directory holds the list, a copy of each one's keys, and what was last seen of each, so that a rolled-back catalogue is noticed.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from image_service.catalog_entries import machine_arch
from image_service.lifecycle import ImageType
from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    BusyError,
    InvalidNameError,
    NotFoundError,
    UnsupportedError,
)
from imaging.files import LockFile, atomic_write_bytes, atomic_write_json, make_directory, os_errors, read_json
from imaging.kv.base import Compare, Entry, Operation
from imaging.kv.sqlite import SqliteKeyValue
from imaging.simplestreams.freshness import LastSeen
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import FileSource, HttpSource, open_source
from imaging.simplestreams.tree import StreamCatalogue, StreamItem, TreeReader

SEEN_TIMEOUT_S = 10.0
"""How long to wait for another process that looks at what was seen; it takes milliseconds."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")

ROOT_FTYPES = {
    ImageType.KVM: ("disk-kvm.img", "disk1.img", "uefi1.img", "qcow2", "volume.zfs"),
    ImageType.CONTAINER: (
        "squashfs",
        "root.squashfs",
        "root.tar.xz",
        "root.tar.gz",
        "incus_combined.tar.gz",
        "lxd_combined.tar.gz",
    ),
}
"""Files guests run from, best first. Not Ubuntu's ``tar.gz``: that is a disk in a tarball, nothing a container runs from."""


class NamedCatalog(msgspec.Struct, frozen=True):
    """A catalogue that was added."""

    name: str
    url: str
    signed: bool = False
    """Whether keys were given: then nothing that is not signed by them counts."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which image of a catalogue somebody means."""

    name: str
    """A product id or an alias."""
    version: str = ""
    """Empty for the newest."""


class Registry:
    """See the module's docstring. One process changes it at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)
        self._file = directory / "catalogs.json"

    def list(self) -> list[NamedCatalog]:
        """Every catalogue, by name."""
        if not self._file.exists():
            return []
        try:
            return sorted(msgspec.convert(read_json(self._file), list[NamedCatalog]), key=lambda one: one.name)
        except msgspec.ValidationError as err:
            raise BadDataError(f"{self._file} is damaged") from err

    def get(self, name: str) -> NamedCatalog:
        """The catalogue; NotFoundError."""
        for one in self.list():
            if one.name == name:
                return one
        raise NotFoundError(f"no catalogue is named {name!r}; catalog list shows them")

    def add(self, name: str, url: str, keyring: bytes | None = None) -> NamedCatalog:
        """Add a catalogue; AlreadyExistsError, InvalidNameError, InvalidArgumentError (URL or keys)."""
        if not NAME_PATTERN.match(name):
            raise InvalidNameError(f"not a name for a catalogue: {name[:80]!r}")
        open_source(url)
        added = NamedCatalog(name, url, signed=keyring is not None)
        with LockFile(self._directory / "lock"):
            known = self.list()
            if any(one.name == name for one in known):
                raise AlreadyExistsError(f"a catalogue is named {name!r} already")
            if keyring is not None:
                Verifier(keyring)
                atomic_write_bytes(self._keyring(name), keyring)
            atomic_write_json(self._file, msgspec.to_builtins([*known, added]))
        return added

    def remove(self, name: str) -> None:
        """Forget a catalogue; NotFoundError."""
        gone = self.get(name)
        with LockFile(self._directory / "lock"):
            atomic_write_json(self._file, msgspec.to_builtins([one for one in self.list() if one.name != gone.name]))
            with os_errors("cannot remove a keyring"):
                self._keyring(name).unlink(missing_ok=True)

    def _keyring(self, name: str) -> Path:
        return self._directory / f"{name}.keys"

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[HttpSource | FileSource, TreeReader]]:
        """The catalogue's source and a reader that trusts only its keys and refuses what is older than what was seen."""
        catalog = self.get(name)
        verifier = Verifier.from_file(self._keyring(name)) if catalog.signed else None
        source = open_source(catalog.url, name)
        yield source, TreeReader(source, verifier, last_seen=LastSeen(_OpenedBriefly(self._directory / "seen.db")))


class _OpenedBriefly:
    """A KeyValue that is open only while it is used: a mirror may run for hours, and others must not wait for it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def _open(self) -> Iterator[SqliteKeyValue]:
        with closing(self._opened(time.monotonic() + SEEN_TIMEOUT_S)) as store:
            yield store

    def _opened(self, deadline: float) -> SqliteKeyValue:
        while True:
            try:
                return SqliteKeyValue(self._path)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
            threading.Event().wait(0.05)

    def get(self, key: str) -> Entry | None:
        """As KeyValue."""
        with self._open() as store:
            return store.get(key)

    def list(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        """As KeyValue."""
        with self._open() as store:
            return store.list(prefix, after=after, limit=limit)

    def transact(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """As KeyValue."""
        with self._open() as store:
            return store.transact(operations, compares)

    def close(self) -> None:
        """As KeyValue; it is closed anyway."""


def matches(item: StreamItem, words: Sequence[str]) -> bool:
    """Whether every word occurs in what the item is called."""
    names = (item.product, item.version, item.ftype, *item.attributes.values())
    text = " ".join(names).lower()
    return all(word.lower() in text for word in words)


def parse_wanted(text: str, products: Sequence[str]) -> Wanted:
    """``PRODUCT[:VERSION]`` or ``ALIAS[:VERSION]``. Products and versions have colons themselves, aliases have none."""
    known = [one for one in products if text == one or text.startswith(f"{one}:")]
    if known:
        longest = max(known, key=len)
        return Wanted(longest, text[len(longest) + 1 :])
    name, _, version = text.partition(":")
    return Wanted(name, version)


def find_image(catalogue: StreamCatalogue, text: str, image_type: ImageType, arch: str = "") -> StreamItem:
    """The root file of the newest (or the named) version of an image; NotFoundError says what is missing."""
    products = [product for document in catalogue.documents for product in document.products]
    wanted = parse_wanted(text, products)
    named = [item for item in catalogue.items() if _is_named(item, wanted.name, arch or machine_arch())]
    if not named:
        raise NotFoundError(
            f"no product or alias {wanted.name!r} for {arch or machine_arch()} in {catalogue.info.source}"
        )
    of_version = [item for item in named if wanted.version in {"", item.version}]
    if not of_version:
        known = ", ".join(sorted({item.version for item in named}, reverse=True)[:5])
        raise NotFoundError(f"{wanted.name!r} has no version {wanted.version!r}; it has {known}")
    return _best(of_version, wanted.name, image_type)


def _is_named(item: StreamItem, name: str, arch: str) -> bool:
    if item.product == name:
        return True
    if name in item.aliases:
        return item.attributes.get("arch", arch) == arch
    return any(name == f"{alias}/{item.attributes.get('arch')}" for alias in item.aliases)


def _is_machine(item: StreamItem) -> bool:
    """Whether a tarball holds a virtual machine's disk: nothing of ours runs from such a one."""
    return item.attributes.get("combined_type") == "virtual-machine"


def _best(items: Sequence[StreamItem], name: str, image_type: ImageType) -> StreamItem:
    order = ROOT_FTYPES[image_type]
    fitting = [item for item in items if item.ftype in order and item.attributes.get("path") and not _is_machine(item)]
    if not fitting:
        has = ", ".join(sorted({item.ftype or item.name for item in items}))
        raise NotFoundError(f"{name!r} has no file for type {image_type}; it has {has}")
    newest = max(item.version for item in fitting)
    chosen = min((item for item in fitting if item.version == newest), key=lambda item: order.index(item.ftype))
    if chosen.digest.algorithm != "sha256" and "sha256" not in chosen.attributes:
        raise UnsupportedError(f"catalogue gives no sha256 for {chosen}")
    return chosen
