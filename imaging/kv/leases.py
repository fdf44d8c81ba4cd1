"""Leases: one replica does X, and one that lost its turn does no harm.

Words. A *lease* is a name that at most one holder has at a time. A *fence* is what a holder gets: proof of its turn. Each
turn has a revision of its own in the KeyValue the lease lives in.

Rules.

* ``acquire`` gives a fence or raises BusyError that names the holder. A fence is renewed in the background until it is released.
* A holder that dies or can't reach the store loses the lease after its ``ttl_s``; then another may acquire it.
* **Fencing.** Every transaction of the protected work carries ``fence.compare``. It holds only during this turn, so a holder that was
  paused for longer than it knows gets ConflictError and has changed nothing, whatever it believes.
* ``is_lost`` tells what the holder can know by itself, by its own monotonic clock: it turns true before anybody else can acquire
  the lease, unless the process was paused. Long work outside the KeyValue looks at it between steps (``check``).
* ``release`` ends the turn at once; on a lost lease it does nothing. Leases end with the process.

Errors: BusyError (held), LeaseLostError (``check``), InvalidArgumentError (name, ttl), UnavailableError.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from imaging.errors import BusyError, InvalidArgumentError, LeaseLostError, UnavailableError
from imaging.kv.base import ABSENT, Compare, Delete, KeyValue, Put
from imaging.kv.checks import check_key

LEASES = "leases/"
"""Where leases are in their KeyValue."""

TTL_MIN_S = 2.0
"""etcd's shortest is an election's time; below that a busy machine loses leases for no reason."""

TTL_MAX_S = 86400.0
"""A day: nobody should wait longer for the work of a dead replica."""


class Fence(Protocol):
    """One turn; see the module's docstring. As a context manager it is released at the end."""

    @property
    def name(self) -> str:
        """The lease's name."""

    @property
    def compare(self) -> Compare:
        """Holds exactly during this turn."""

    @property
    def is_lost(self) -> bool:
        """Whether the turn has ended, as far as the holder can know."""

    def check(self) -> None:
        """LeaseLostError if the turn has ended."""

    def release(self) -> None:
        """End the turn."""

    def __enter__(self) -> Fence: ...
    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class Leases(Protocol):
    """See the module's docstring: it is the specification."""

    def acquire(self, name: str, *, ttl_s: float) -> Fence:
        """Take a lease that nobody holds."""

    def holder(self, name: str) -> str | None:
        """Who holds the lease, or None."""

    def close(self) -> None:
        """Release everything held and stop renewing; idempotent."""


def lease_key(name: str) -> str:
    """The lease's key; InvalidArgumentError for a bad name."""
    if not name:
        raise InvalidArgumentError("a lease needs a name")
    check_key(LEASES + name)
    return LEASES + name


def check_ttl(ttl_s: float) -> None:
    """InvalidArgumentError unless the time is one a lease may have."""
    if not TTL_MIN_S <= ttl_s <= TTL_MAX_S:
        raise InvalidArgumentError(f"a lease lasts {TTL_MIN_S} to {TTL_MAX_S} s, not {ttl_s}")


def lost_error(name: str) -> LeaseLostError:
    """What a holder whose turn has ended is told."""
    return LeaseLostError(f"the lease is lost: {name[:80]!r}")


class EmbeddedFence:
    """A turn inside this process."""

    def __init__(self, name: str, revision: int, release: Callable[[EmbeddedFence], None]) -> None:
        self._name = name
        self._revision = revision
        self._release = release
        self.ended = False

    @property
    def name(self) -> str:
        """See Fence."""
        return self._name

    @property
    def compare(self) -> Compare:
        """See Fence."""
        return Compare(lease_key(self._name), self._revision)

    @property
    def is_lost(self) -> bool:
        """See Fence: inside one process nobody else can take it."""
        return self.ended

    def check(self) -> None:
        """See Fence."""
        if self.ended:
            raise lost_error(self._name)

    def release(self) -> None:
        """See Fence."""
        self._release(self)

    def __enter__(self) -> EmbeddedFence:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class EmbeddedLeases:
    """Leases over a KeyValue that only this process has: what an earlier process held ended with it.

    A lease never runs out by time here: its holder lives exactly as long as everybody who could wait for it.
    """

    def __init__(self, store: KeyValue, *, holder: str | None = None) -> None:
        self._store = store
        self._holder = holder or str(uuid.uuid4())
        self._lock = threading.Lock()
        self._held: dict[str, EmbeddedFence] = {}
        self._closed = False
        for entry in store.list(LEASES):
            store.transact([Delete(entry.key)])

    def acquire(self, name: str, *, ttl_s: float) -> EmbeddedFence:
        """See Leases."""
        check_ttl(ttl_s)
        key = lease_key(name)
        with self._lock:
            if self._closed:
                raise UnavailableError("the leases are closed")
            if name in self._held:
                raise BusyError(f"the lease is held: {name[:80]!r}", [self._holder])
            revision = self._store.transact([Put(key, self._holder.encode())], [Compare(key, ABSENT)])
            fence = EmbeddedFence(name, revision, self._end)
            self._held[name] = fence
            return fence

    def _end(self, fence: EmbeddedFence) -> None:
        with self._lock:
            if not fence.ended:
                self._store.transact([Delete(fence.compare.key)], [fence.compare])
                fence.ended = True
                del self._held[fence.name]

    def holder(self, name: str) -> str | None:
        """See Leases."""
        entry = self._store.get(lease_key(name))
        return entry.value.decode() if entry else None

    def close(self) -> None:
        """See Leases."""
        with self._lock:
            self._closed = True
            fences = list(self._held.values())
        for fence in fences:
            fence.release()


def monotonic_s() -> float:
    """The clock leases are measured by."""
    return time.monotonic()
