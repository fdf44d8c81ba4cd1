"""KeyValue: the contract of every metadata engine.

Words. A *key* is a non-empty string without NUL, at most KEY_MAX_BYTES in UTF-8. A *value* is bytes, at most
VALUE_MAX_BYTES. A *revision* is a positive integer, unique to one write: each successful transaction gives every entry it puts a revision
greater than any before it in this store. A *compare* states the revision an entry must have at the moment the transaction
applies; 0 means the key must be absent.

Rules.

* ``transact`` applies every operation or none. If a compare does not hold it raises ConflictError and has changed nothing.
  All puts of one transaction share a revision; no key may be changed twice in it. Without operations it only compares.
* A call that returned has survived kill -9 and power loss; one that raised has changed nothing, except
  UnavailableError with ``maybe_applied`` in its text, where a network hid the outcome.
* ``list`` returns entries in key order (bytewise), those with ``prefix`` and after ``after``, at most ``limit``.
* A store may be used from several threads at once. The embedded store has one owning process; a second process that
  opens it gets BusyError.

Errors: ConflictError (compare), InvalidArgumentError (key, value or size), NoSpaceError (disk full: nothing changed),
UnavailableError (engine down or slow), BadDataError (the store's file is damaged).

Life: construct, use, ``close`` (idempotent; a use after close raises UnavailableError).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

KEY_MAX_BYTES = 1024
"""Long enough for a prefix, an index name and a URL's digest; etcd has no limit of its own but slows down."""

VALUE_MAX_BYTES = 1 << 20
"""Below etcd's 1.5 MiB request limit, so that every engine takes what one takes."""

OPERATIONS_MAX = 128
"""etcd's limit of operations in one transaction."""

ABSENT = 0
"""The revision of a key that does not exist."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key with its value, as of ``revision``."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """The entry must have exactly this revision (ABSENT: must not exist)."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Create or replace an entry."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an entry; absent is fine."""

    key: str


Operation = Put | Delete


@runtime_checkable
class KeyValue(Protocol):
    """See the module's docstring: it is the specification."""

    def get(self, key: str) -> Entry | None:
        """The entry, or None."""

    def list(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        """Entries whose key starts with ``prefix`` and is greater than ``after``, in key order."""

    def transact(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """Apply all operations if all compares hold, durably; the revision of the puts."""

    def close(self) -> None:
        """Release the engine."""


def put(store: KeyValue, key: str, value: bytes, *, expect: int | None = None) -> int:
    """Put one entry, optionally only if its revision is ``expect``; the new revision."""
    return store.transact([Put(key, value)], [] if expect is None else [Compare(key, expect)])


def delete(store: KeyValue, key: str, *, expect: int | None = None) -> None:
    """Delete one entry, optionally only if its revision is ``expect``."""
    store.transact([Delete(key)], [] if expect is None else [Compare(key, expect)])
