"""Image records over any KeyValue.

Keys::

    images/<id>                     the record, JSON
    sources/<sha256 of the source>  the id of the one record with that source
    digests/<sha256>/<id>           the blob's size; says that this record needs this blob
    contents/<sha256>/<id>          empty; says that this record is an image with that content, in whatever encoding
    unfinished/<id>                 empty; says that somebody owes work on this record

Rules.

* One writer a record: every change is a compare-and-swap on the record's revision (:meth:`MetadataStore.update`), so no update
  is ever lost, whoever else writes, in this process or another.
* The indexes change in the same transaction as the record, so they can't drift, and a source has exactly one record however many
  ask for it at once.
* Work that only one replica may do names its fence: its changes hold only during its turn, else they raise LeaseLostError.
* Records are what :mod:`image_service.lifecycle` makes of them; this module knows no states.

Errors: NotFoundError (get, update, delete of an unknown id), ConflictError (put of a source or id that is taken), those of KeyValue.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from image_service.lifecycle import UNFINISHED, Image, ImageType
from image_service.replica import TTL_S, Replica, tolerant
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, LeaseLostError, NotFoundError, UnavailableError
from imaging.kv.base import ABSENT, Compare, Delete, Entry, KeyValue, Operation, Put
from imaging.kv.leases import Fence

RECORDS = "images/"
SOURCES = "sources/"
DIGESTS = "digests/"
CONTENTS = "contents/"
OWED = "unfinished/"
MARKS = "marks/"

UPDATE_TRIES_MAX = 64
"""A compare-and-swap loses only to a writer that won; this many losses in a row mean that something else is wrong."""

WRITER_LOCKS = 64
"""Locks that keep threads of one process from overtaking each other at a record; records that share one only wait a little."""

PAGE_RECORDS = 500
"""Records read at once: about 250 KiB, far from any engine's limit on one answer."""

_decoder = msgspec.json.Decoder(Image)


def record_key(image_id: str) -> str:
    """Where a record is."""
    return RECORDS + image_id


def source_key(source: str) -> str:
    """Where the id of a source's record is; hashed, because a URL may be longer than a key."""
    return SOURCES + hashlib.sha256(source.encode()).hexdigest()


def digest_key(image: Image) -> str:
    """Where it says that ``image`` needs its blob."""
    return f"{DIGESTS}{image.blob.hex}/{image.id}"


def content_key(image: Image) -> str:
    """Where it says what an image's content is."""
    return f"{CONTENTS}{Digest.parse(image.content_digest).hex}/{image.id}"


def _decode(entry: Entry) -> Image:
    try:
        return _decoder.decode(entry.value)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadDataError(f"the record at {entry.key} is damaged") from err


def _index(image: Image) -> list[Operation]:
    """The index entries a record has, as puts."""
    entries: list[Operation] = []
    if image.source:
        entries.append(Put(source_key(image.source), image.id.encode()))
    if image.digest:
        entries.append(Put(digest_key(image), str(image.size_bytes).encode()))
    if image.content_digest:
        entries.append(Put(content_key(image), b""))
    if image.status in UNFINISHED and image.source:
        entries.append(Put(OWED + image.id, b""))
    return entries


def _change(old: Image | None, new: Image | None) -> list[Operation]:
    """The operations that turn ``old`` and its index into ``new`` and its index."""
    operations: list[Operation] = []
    wanted = _index(new) if new else []
    kept = {entry.key for entry in wanted}
    if old:
        operations += [Delete(entry.key) for entry in _index(old) if entry.key not in kept]
    operations += wanted
    if new:
        operations.append(Put(record_key(new.id), msgspec.json.encode(new)))
    elif old:
        operations.append(Delete(record_key(old.id)))
    return operations


def _fencing(fence: Fence | None) -> Sequence[Compare]:
    return [] if fence is None else [fence.compare]


class MetadataStore:
    """Image records in one KeyValue. Blocking; threads may share it. Life: construct, ``init``, use, ``shutdown``."""

    def __init__(self, open_engine: Callable[[Mapping[str, Any]], KeyValue]) -> None:
        self._open_engine = open_engine
        self._engine: KeyValue | None = None
        self._replica: Replica | None = None
        self._shown: MetadataStore | None = None
        self._opening = threading.Lock()
        self.lease_ttl_s = TTL_S
        """How long the work of a replica that says nothing is left to it."""
        self._writers = [threading.Lock() for _ in range(WRITER_LOCKS)]

    @classmethod
    def over(cls, engine: KeyValue) -> MetadataStore:
        """Records in an engine that is open already."""
        store = cls(lambda _: engine)
        store.init({})
        return store

    def init(self, config: Mapping[str, Any]) -> None:
        """Open the engine the configuration describes."""
        self._engine = self._open_engine(config)

    def shutdown(self) -> None:
        """Release the engine, and whatever leases are held; idempotent."""
        if self._replica is not None:
            self._replica.close()
        if self._engine is not None:
            self._engine.close()

    @property
    def _store(self) -> KeyValue:
        if self._engine is None:
            raise UnavailableError("the metadata store is not open")
        return self._engine

    @property
    def engine(self) -> KeyValue:
        """The engine, for what else is kept in it under prefixes of its own."""
        return self._store

    @property
    def shown(self) -> MetadataStore:
        """The records for those who only show them: in an outage they may be as old as what one node of the engine knows."""
        if self._shown is None:
            self._shown = MetadataStore.over(tolerant(self._store))
        return self._shown

    @property
    def replica(self) -> Replica:
        """This process among those that share the engine."""
        with self._opening:
            if self._replica is None:
                self._replica = Replica(self._store, ttl_s=self.lease_ttl_s)
            return self._replica

    def _raise_lost(self, fence: Fence | None) -> None:
        """After a transaction whose compares did not hold: LeaseLostError if it was the turn that is over."""
        if fence is not None and (fence.is_lost or self.replica.is_over(fence)):
            raise LeaseLostError(f"the lease is lost: {fence.name}")

    # -- reading -----------------------------------------------------------------------------------------------------

    def _pages(self, prefix: str, after: str = "") -> Iterator[Entry]:
        """Every entry with that prefix behind the key ``after``, read page by page."""
        while True:
            page = self._store.list(prefix, after=after, limit=PAGE_RECORDS)
            yield from page
            if len(page) < PAGE_RECORDS:
                return
            after = page[-1].key

    def iterate(self, after_id: str = "") -> Iterator[Image]:
        """Every record (with an id behind ``after_id``) in id order."""
        yield from map(_decode, self._pages(RECORDS, record_key(after_id) if after_id else ""))

    def list(self, image_type: ImageType | None = None) -> Sequence[Image]:
        """Records (of one type), in id order."""
        return [image for image in self.iterate() if image_type in (None, image.type)]

    def find_by_id(self, image_id: str) -> Image | None:
        """The record, or None."""
        entry = self._store.get(record_key(image_id))
        return _decode(entry) if entry else None

    def get_by_id(self, image_id: str) -> Image:
        """The record; NotFoundError."""
        image = self.find_by_id(image_id)
        if image is None:
            raise NotFoundError("not found")
        return image

    def find_by_source(self, source: str) -> Image | None:
        """The one record with that source, or None."""
        entry = self._store.get(source_key(source))
        return self.find_by_id(entry.value.decode()) if entry else None

    def get_by_source(self, source: str) -> Image:
        """The one record with that source; NotFoundError."""
        image = self.find_by_source(source)
        if image is None:
            raise NotFoundError("not found")
        return image

    def owed(self) -> Sequence[str]:
        """Ids of the records somebody owes work on, in order."""
        return [entry.key.removeprefix(OWED) for entry in self._pages(OWED)]

    def needs(self, digest: Digest) -> bool:
        """Whether any record names that blob."""
        return bool(self._store.list(f"{DIGESTS}{digest.hex}/", limit=1))

    def stored_bytes(self) -> int:
        """The bytes of all blobs that records name, each counted once."""
        sizes: dict[str, int] = {}
        for entry in self._pages(DIGESTS):
            hex_digits, _, image_id = entry.key.removeprefix(DIGESTS).partition("/")
            if entry.value:
                sizes[hex_digits] = int(entry.value)
            elif hex_digits not in sizes:  # written by an older version
                image = self.find_by_id(image_id)
                sizes[hex_digits] = image.size_bytes if image else 0
        return sum(sizes.values())

    def ids_by_digest(self, digest: Digest) -> Sequence[str]:
        """Ids of the records that name that blob, in order."""
        prefix = f"{DIGESTS}{digest.hex}/"
        return [entry.key.removeprefix(prefix) for entry in self._pages(prefix)]

    def ids_by_content(self, content: Digest) -> Sequence[str]:
        """Ids of the images with that content, in order."""
        prefix = f"{CONTENTS}{content.hex}/"
        return [entry.key.removeprefix(prefix) for entry in self._pages(prefix)]

    def contents(self) -> Mapping[str, Sequence[str]]:
        """Every content digest with the ids of the images that have it."""
        found: dict[str, list[str]] = {}
        for entry in self._pages(CONTENTS):
            hex_digits, _, image_id = entry.key.removeprefix(CONTENTS).partition("/")
            found.setdefault(f"sha256:{hex_digits}", []).append(image_id)
        return found

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, image: Image, *, fence: Fence | None = None) -> None:
        """Add a new record; ConflictError if its id or source is taken."""
        compares = [Compare(record_key(image.id), ABSENT), *_fencing(fence)]
        if image.source:
            compares.append(Compare(source_key(image.source), ABSENT))
        try:
            self._store.transact(_change(None, image), compares)
        except ConflictError as err:
            self._raise_lost(fence)
            raise ConflictError(
                f"an image with this id or source is there already: {image.source or image.id}"
            ) from err

    def ensure(self, image: Image) -> tuple[Image, bool]:
        """Add a record for a source, or find the one that is there; whether it was added."""
        for _ in range(UPDATE_TRIES_MAX):
            found = self.find_by_source(image.source)
            if found is not None:
                return found, False
            try:
                self.put(image)
            except ConflictError:
                continue  # somebody was faster: theirs is there now, or already gone again
            return image, True
        raise UnavailableError(f"the record of {image.source} changes too fast")

    def update(self, image_id: str, change: Callable[[Image], Image], *, fence: Fence | None = None) -> Image:
        """Replace a record by what ``change`` makes of it; repeated with the newer record if another writer was faster.

        What ``change`` raises leaves the record as it is.
        """
        with self._writers[hash(image_id) % WRITER_LOCKS]:  # a quick thread must not starve a slow one
            return self._update(image_id, change, fence)

    def _update(self, image_id: str, change: Callable[[Image], Image], fence: Fence | None) -> Image:
        for _ in range(UPDATE_TRIES_MAX):
            entry = self._store.get(record_key(image_id))
            if entry is None:
                raise NotFoundError("not found")
            old = _decode(entry)
            new = change(old)
            try:
                self._store.transact(_change(old, new), [Compare(entry.key, entry.revision), *_fencing(fence)])
            except ConflictError:
                self._raise_lost(fence)
                continue
            return new
        raise UnavailableError(f"the record of image {image_id} changes too fast")

    def delete(self, image_id: str) -> Image:
        """Remove a record and its index; the record as it was. NotFoundError."""
        for _ in range(UPDATE_TRIES_MAX):
            entry = self._store.get(record_key(image_id))
            if entry is None:
                raise NotFoundError("not found")
            old = _decode(entry)
            try:
                self._store.transact(_change(old, None), [Compare(entry.key, entry.revision)])
            except ConflictError:
                continue
            return old
        raise UnavailableError(f"the record of image {image_id} changes too fast")

    # -- marks -------------------------------------------------------------------------------------------------------

    def is_marked(self, mark: str) -> bool:
        """Whether something that is done once (an import) was done."""
        return self._store.get(MARKS + mark) is not None

    def mark(self, mark: str) -> None:
        """Remember that it was done."""
        self._store.transact([Put(MARKS + mark, b"")])
