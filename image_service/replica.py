"""This process among all that share a store: its own session, and the turns it takes at work only one of them may do.

A *turn* is a lease of :mod:`imaging.kv.leases` in the metadata engine: whoever holds ``fetch-<id>`` fetches that image. The *session* is a
lease nobody else wants, named after this process; what belongs to a connection (an upload) lives as long as the session. So the work of
a process that died, or was paused for longer than ``ttl_s``, is known by a lease that is gone.

An embedded engine has one process; its leases end with it, and everything here works the same.
"""

from __future__ import annotations

import threading
import uuid

from imaging.errors import BusyError
from imaging.kv.base import KeyValue
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_leases import EtcdLeases
from imaging.kv.leases import LEASES, EmbeddedLeases, Fence, Leases

TTL_S = 15.0
"""After so long without a sign of life the work of a process is another's: long enough for a busy machine's pauses and for an election of
etcd, short enough that nobody notices a fetch that waits for it."""

SESSIONS = "replica-"
"""Leases of processes start with this."""

ID_CHARS = 12
"""Of a process's name: enough that no two that are remembered share it."""


def open_leases(engine: KeyValue, holder: str) -> Leases:
    """The leases of an engine."""
    return (
        EtcdLeases(engine, holder=holder) if isinstance(engine, EtcdKeyValue) else EmbeddedLeases(engine, holder=holder)
    )


def tolerant(engine: KeyValue) -> KeyValue:
    """The engine for those who only show what is there, and rather show what one node knows than nothing."""
    return engine.tolerant() if isinstance(engine, EtcdKeyValue) else engine


class Replica:
    """See the module's docstring. Blocking; threads may share it. Life: construct, use, ``close`` before the engine."""

    def __init__(self, engine: KeyValue, *, ttl_s: float = TTL_S) -> None:
        self._engine = engine
        self.ttl_s = ttl_s
        self.id = uuid.uuid4().hex[:ID_CHARS]
        self._leases = open_leases(engine, self.id)
        self._lock = threading.Lock()
        self._session: Fence | None = None

    def session(self) -> Fence:
        """This process's own lease, taken anew if it was lost; UnavailableError if the engine takes no changes now.

        Asked before long work, so that it is refused at once and not at its end.
        """
        known = self._session
        if known is not None and not known.is_lost and self._is_there(known):
            return known
        with self._lock:
            if self._session is None or self._session is known:
                self._session = self._leases.acquire(
                    f"{SESSIONS}{self.id}-{uuid.uuid4().hex[:ID_CHARS]}", ttl_s=self.ttl_s
                )
            return self._session

    def _is_there(self, fence: Fence) -> bool:
        """As :meth:`is_over`, but never told by a node that may not know."""
        return any(entry.revision == fence.compare.revision for entry in self._engine.list(fence.compare.key, limit=1))

    def acquire(self, name: str) -> Fence:
        """Take a turn; BusyError if another process has it."""
        return self._leases.acquire(name, ttl_s=self.ttl_s)

    def find_turn(self, name: str) -> Fence | None:
        """Take a turn, or None if another process has it."""
        try:
            return self.acquire(name)
        except BusyError:
            return None

    def held(self, prefix: str = "") -> set[str]:
        """Names of the leases that somebody holds, this process too."""
        return {entry.key.removeprefix(LEASES) for entry in self._engine.list(LEASES + prefix)}

    def is_alone(self) -> bool:
        """Whether no other process has a session."""
        own = f"{SESSIONS}{self.id}-"
        return all(name.startswith(own) for name in self.held(SESSIONS))

    def is_over(self, fence: Fence) -> bool:
        """Whether a turn has ended, as the engine knows it."""
        entry = self._engine.get(fence.compare.key)
        return entry is None or entry.revision != fence.compare.revision

    def close(self) -> None:
        """Give up everything held."""
        self._leases.close()
