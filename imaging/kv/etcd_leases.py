"""Leases in etcd: a key that etcd itself removes when its holder stops saying that it lives.

The key is written once a turn, bound to an etcd lease, so its revision is the turn's. The holder renews at a third of the time to
live; it counts the turn as lost when the time has passed since it *began* the last renewal that succeeded, which is before etcd can
give the lease away.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
from collections.abc import Callable

from imaging.errors import BusyError, ConflictError, MistifyError, UnavailableError
from imaging.kv.base import ABSENT, Compare, Put
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_client import UncertainError
from imaging.kv.leases import check_ttl, lease_key, lost_error, monotonic_s

RENEW_FRACTION = 3
"""Renewed at a third of the time to live: two renewals may fail."""

_log = logging.getLogger(__name__)


class EtcdFence:
    """One turn; see Fence."""

    def __init__(
        self,
        name: str,
        lease_id: int,
        ttl_s: float,
        begun_s: float,
        end: Callable[[EtcdFence], None],
    ) -> None:
        self._name = name
        self._end = end
        self._compare = Compare(lease_key(name), ABSENT)
        self._until_s = begun_s + ttl_s
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self.next_renewal_s = begun_s + ttl_s / RENEW_FRACTION
        self.ended = False

    def started(self, revision: int) -> None:
        """The key was written (called by the leases)."""
        self._compare = Compare(self._compare.key, revision)

    def renewed(self, begun_s: float) -> None:
        """A renewal that began then succeeded (called by the leases)."""
        self._until_s = begun_s + self.ttl_s

    @property
    def name(self) -> str:
        """See Fence."""
        return self._name

    @property
    def compare(self) -> Compare:
        """See Fence."""
        return self._compare

    @property
    def is_lost(self) -> bool:
        """See Fence."""
        return self.ended or monotonic_s() >= self._until_s

    def check(self) -> None:
        """See Fence."""
        if self.is_lost:
            raise lost_error(self._name)

    def release(self) -> None:
        """See Fence."""
        self._end(self)

    def __enter__(self) -> EtcdFence:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class EtcdLeases:
    """Leases of one replica over the store it uses; close them before the store."""

    def __init__(self, store: EtcdKeyValue, *, holder: str | None = None) -> None:
        self._store = store
        self._holder = holder or str(uuid.uuid4())
        self._changed = threading.Condition()
        self._fences: set[EtcdFence] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._keep, name="etcd leases", daemon=True)
        self._thread.start()

    # -- taking and giving -----------------------------------------------------------------------------------------------

    def acquire(self, name: str, *, ttl_s: float) -> EtcdFence:
        """See Leases."""
        check_ttl(ttl_s)
        key = lease_key(name)
        if self._closed:
            raise UnavailableError("the leases are closed")
        holder = self.holder(name)
        if holder is not None:
            raise BusyError(f"the lease is held: {name[:80]!r}", [holder])
        fence = self._grant(name, ttl_s)
        # Unique to the turn, so that an uncertain write can be told from somebody else's.
        value = f"{self._holder} {uuid.uuid4()}".encode()
        try:
            put, absent = [Put(key, value)], [Compare(key, ABSENT)]
            fence.started(self._store.transact_leased(put, absent, lease_id=fence.lease_id))
        except ConflictError as err:
            self._revoke(fence)
            raise BusyError(f"the lease is held: {name[:80]!r}", [self.holder(name) or "somebody else"]) from err
        except MistifyError:
            self._revoke(fence)
            raise
        with self._changed:
            self._fences.add(fence)
            self._changed.notify_all()
        return fence

    def _grant(self, name: str, ttl_s: float) -> EtcdFence:
        begun_s = monotonic_s()
        client = self._store.client
        try:
            with client.using():
                answer = client.write("/v3/lease/grant", {"TTL": str(math.ceil(ttl_s))}, f"cannot lease {name[:80]!r}")
        except UncertainError as err:  # an etcd lease nobody uses runs out by itself
            raise UnavailableError(f"cannot lease {name[:80]!r}") from err
        return EtcdFence(name, int(answer["ID"]), ttl_s, begun_s, self._end)

    def _end(self, fence: EtcdFence) -> None:
        with self._changed:
            if fence.ended:
                return
            fence.ended = True
            self._fences.discard(fence)
        self._revoke(fence)

    def _revoke(self, fence: EtcdFence) -> None:
        """Let etcd remove the key now; if that fails it does so when the time has passed."""
        client = self._store.client
        try:
            with client.using():
                client.write("/v3/lease/revoke", {"ID": str(fence.lease_id)}, "cannot end a lease")
        except (MistifyError, UncertainError):
            _log.info("a lease runs out by itself", extra={"component": "kv", "lease": fence.name})

    def holder(self, name: str) -> str | None:
        """See Leases."""
        entry = self._store.get(lease_key(name))
        return entry.value.decode().split(" ")[0] if entry else None

    # -- renewing --------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Renew what is due, in a thread of its own."""
        while True:
            with self._changed:
                due = self._wait_due()
            if due is None:
                return
            for fence in due:
                self._renew(fence)

    def _wait_due(self) -> list[EtcdFence] | None:
        """Wait for fences to be renewed (None: closed)."""
        while not self._closed:
            now_s = monotonic_s()
            due = [fence for fence in self._fences if fence.next_renewal_s <= now_s]
            if due:
                return due
            next_s = min((fence.next_renewal_s for fence in self._fences), default=None)
            self._changed.wait(None if next_s is None else next_s - now_s)
        return None

    def _renew(self, fence: EtcdFence) -> None:
        begun_s = monotonic_s()
        fence.next_renewal_s = begun_s + fence.ttl_s / RENEW_FRACTION
        client = self._store.client
        try:
            with client.using():
                answer = client.read("/v3/lease/keepalive", {"ID": str(fence.lease_id)}, "cannot renew a lease")
        except MistifyError:
            _log.warning("a lease was not renewed", extra={"component": "kv", "lease": fence.name})
            return
        if int(answer.get("result", {}).get("TTL", 0)) > 0:
            fence.renewed(begun_s)
            return
        _log.error("a lease is lost", extra={"component": "kv", "lease": fence.name})
        with self._changed:
            fence.ended = True
            self._fences.discard(fence)

    def close(self) -> None:
        """See Leases."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            fences = list(self._fences)
        self._thread.join()
        for fence in fences:
            fence.release()
