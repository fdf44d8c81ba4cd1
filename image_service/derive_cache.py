"""The index of derived blobs, kept in a KeyValue: which recipe made which blob, and when somebody last wanted it.

Keys::

    derived/<recipe>            JSON: the blob's digest and size, when it was made and last used
    chunks/<sha256>/<page>      the chunk digests of a blob (:mod:`image_service.chunks`)

The index only remembers; it is never the truth about bytes. An entry whose blob is gone is forgotten and the blob made again, and a
blob without an entry is garbage like any other. An entry goes when one of the blobs it was made from is named by no record any
more, when nobody used it for long, and when all together are too large.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from image_service.derive_forms import Recipe
from image_service.derive_work import DeriveLimits
from image_service.replica import tolerant
from imaging.blobs.base import BlobInfo
from imaging.digests import Digest
from imaging.errors import ConflictError, LeaseLostError, UnavailableError
from imaging.kv.base import Compare, Delete, Entry, KeyValue, Put, put
from imaging.kv.leases import Fence

PREFIX = "derived/"

PAGE_ENTRIES = 500
"""Read at once."""

TOUCH_S = 300.0
"""Uses are written down this often at most: a thousand readers of one image cost one write."""

EVICT_GRACE_S = 900.0
"""What was used so lately is not evicted for room: somebody is about to read it. Three times TOUCH_S, so that a use of a minute ago
is seen even if only an older one was written down."""

log = logging.getLogger(__name__)


class Derived(msgspec.Struct, frozen=True, kw_only=True):
    """One derived blob."""

    digest: str
    size_bytes: int
    sources: tuple[str, ...]
    """Digests of the stored blobs it was made from."""
    made_s: float
    used_s: float

    @property
    def blob(self) -> Digest:
        """The digest, parsed."""
        return Digest.parse(self.digest)


class DerivedIndex:
    """See the module's docstring. Blocking; threads may share it."""

    def __init__(self, store: KeyValue, limits: DeriveLimits, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()

    def find(self, recipe: Recipe) -> Derived | None:
        """The blob a recipe made, noted as used; None if it is not known."""
        entry = tolerant(self._store).get(PREFIX + recipe.key)
        derived = _decode(entry) if entry else None
        if entry is None or derived is None:
            return None
        now = self._clock()
        if now - derived.used_s >= TOUCH_S:
            newer = msgspec.structs.replace(derived, used_s=now)
            with contextlib.suppress(ConflictError, UnavailableError):  # somebody else did, or nobody can just now
                put(self._store, entry.key, msgspec.json.encode(newer), expect=entry.revision)
        return derived

    def save(self, recipe: Recipe, info: BlobInfo, turn: Fence | None = None) -> Derived:
        """Remember what a recipe made, during a turn. The blob must be leased until this has returned."""
        now = self._clock()
        sources = (str(recipe.source), *([str(recipe.base)] if recipe.base else []))
        derived = Derived(digest=str(info.digest), size_bytes=info.size_bytes, sources=sources, made_s=now, used_s=now)
        entry = Put(PREFIX + recipe.key, msgspec.json.encode(derived))
        try:
            self._store.transact([entry], [turn.compare] if turn else [])
        except ConflictError as err:
            raise LeaseLostError(f"the lease is lost: {recipe.key}") from err
        return derived

    def forget(self, recipe: Recipe) -> None:
        """Its blob is gone."""
        self._store.transact([Delete(PREFIX + recipe.key)])

    def digests(self) -> set[Digest]:
        """Every blob the index names: what a garbage collection keeps."""
        return {derived.blob for _, derived in self._entries()}

    def stored_bytes(self) -> int:
        """The bytes of all of them."""
        return sum({derived.digest: derived.size_bytes for _, derived in self._entries()}.values())

    def needs(self, digest: Digest) -> bool:
        """Whether some entry names the blob."""
        return any(derived.digest == str(digest) for _, derived in self._entries())

    def sweep(self, wanted: Callable[[Digest], bool]) -> Sequence[Digest]:
        """Forget entries as the module's docstring says; blobs that lost one. ``wanted``: whether a record names a blob."""
        with self._lock:
            entries = list(self._entries())
            known: dict[str, bool] = {}
            for _, derived in entries:
                known.update({text: wanted(Digest.parse(text)) for text in derived.sources if text not in known})
            oldest_s = self._clock() - self._limits.cache_max_age_s
            stale = [
                (entry, derived)
                for entry, derived in entries
                if derived.used_s < oldest_s or not all(known[text] for text in derived.sources)
            ]
            gone = self._remove(stale)
            left = [pair for pair in entries if pair not in stale]
            excess_bytes = sum(derived.size_bytes for _, derived in left) - self._limits.cache_max_bytes
            return [*gone, *self._evict(left, excess_bytes)]

    def forget_source(self, source: Digest) -> Sequence[Digest]:
        """Forget what was made from a blob; the blobs that lost their entry."""
        with self._lock:
            return self._remove([pair for pair in self._entries() if str(source) in pair[1].sources])

    def make_room(self, wanted_bytes: int) -> Sequence[Digest]:
        """Forget the least recently used entries of so many bytes, or all that nobody is about to read; their blobs."""
        with self._lock:
            return self._evict(list(self._entries()), wanted_bytes)

    def _evict(self, entries: Iterable[tuple[Entry, Derived]], excess_bytes: int) -> Sequence[Digest]:
        before_s = self._clock() - EVICT_GRACE_S
        victims = []
        for entry, derived in sorted(entries, key=lambda pair: pair[1].used_s):
            if excess_bytes <= 0 or derived.used_s > before_s:
                break
            victims.append((entry, derived))
            excess_bytes -= derived.size_bytes
        return self._remove(victims)

    def _remove(self, victims: Sequence[tuple[Entry, Derived]]) -> Sequence[Digest]:
        gone = []
        for entry, derived in victims:
            try:
                self._store.transact([Delete(entry.key)], [Compare(entry.key, entry.revision)])
            except ConflictError:
                continue  # used or made anew this instant: it stays
            gone.append(derived.blob)
        if gone:
            log.info("derived images forgotten", extra={"count": len(gone)})
        return gone

    def _entries(self) -> Iterator[tuple[Entry, Derived]]:
        after = ""
        while True:
            page = self._store.list(PREFIX, after=after, limit=PAGE_ENTRIES)
            for entry in page:
                derived = _decode(entry)
                if derived is not None:
                    yield entry, derived
            if len(page) < PAGE_ENTRIES:
                return
            after = page[-1].key


def _decode(entry: Entry) -> Derived | None:
    """An entry that can't be read is as good as none: what it named is made again."""
    try:
        return msgspec.json.decode(entry.value, type=Derived)
    except msgspec.MsgspecError:
        log.warning("an entry of the index of derived images can't be read", extra={"key": entry.key})
        return None


class PackedValues:
    """A long value of fixed-size parts under one prefix, in pages that every engine takes."""

    PAGE_BYTES = 512 << 10
    """Half of what every engine takes as one value."""

    def __init__(self, store: KeyValue, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def find(self, name: str, size_bytes: int) -> bytes | None:
        """The value if all its ``size_bytes`` are there, else None."""
        pages = self._store.list(f"{self._prefix}{name}/")
        value = b"".join(page.value for page in pages)
        return value if len(value) == size_bytes and pages else None

    def save(self, name: str, value: bytes) -> None:
        """Put the value; what a crash leaves of it is not found."""
        starts = range(0, max(len(value), 1), self.PAGE_BYTES)
        for number, start in enumerate(starts):
            key = f"{self._prefix}{name}/{number:06d}"
            self._store.transact([Put(key, value[start : start + self.PAGE_BYTES])])

    def delete(self, name: str) -> None:
        """Remove the value; absent is fine."""
        for page in self._store.list(f"{self._prefix}{name}/"):
            self._store.transact([Delete(page.key)])

    def names(self) -> Sequence[str]:
        """What is there, whole or not."""
        found: dict[str, None] = {}
        after = ""
        while page := self._store.list(self._prefix, after=after, limit=1):
            name = page[0].key.removeprefix(self._prefix).partition("/")[0]
            found[name] = None
            after = f"{self._prefix}{name}/~"  # behind every page of this name
        return list(found)
