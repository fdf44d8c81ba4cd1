"""EtcdKeyValue: the metadata engine for several replicas, on etcd v3.

A revision is etcd's own (``mod_revision``). Every transaction is one etcd transaction, so compares and writes are atomic across
all replicas. Reads are linearizable; a list of several pages is read at one revision.

Uncertain writes. If a node vanishes between a request and its answer, the transaction may have been applied, or may yet be.
Where a compare names a key that the transaction itself changes, the store finds out: a revision never comes back, so such a
transaction can be repeated without being applied twice, and what the key holds (now or in etcd's history) tells which attempt won. A key
that must be absent can't be told from one that was created and deleted meanwhile; there only a value that is found is proof. What stays
unknown is UnavailableError with ``maybe_applied``. Two callers that write equal values under equal compares are not told apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from imaging.errors import ConflictError, InvalidArgumentError, UnavailableError
from imaging.kv.base import ABSENT, VALUE_MAX_BYTES, Compare, Delete, Entry, Operation, Put
from imaging.kv.checks import check_key, check_limit, check_transaction, encode_text
from imaging.kv.etcd_client import (
    UNCERTAIN_NOTE,
    EtcdClient,
    EtcdSettings,
    UncertainError,
    decode,
    encode,
    revision_of,
)

PAGE_ENTRIES = 500
"""Read at once by a list: records are about 500 bytes, so an answer stays below a megabyte."""

PAGE_VALUES_BYTES = 8 << 20
"""After a page with more than this, the next ones ask for fewer entries: a node answers with one message in memory."""

REQUEST_MAX_BYTES = VALUE_MAX_BYTES + (256 << 10)
"""All keys and values of a transaction: etcd takes 1.5 MiB, and its own framing needs a part."""

RESOLVE_TRIES_MAX = 4
"""Repeated attempts of a transaction whose outcome is unknown; each is bounded by its time-out."""

HISTORY_STEPS_MAX = 16
"""How many later versions of a key are walked back to find out who changed it first."""


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of keys that start with ``prefix``, as etcd wants it (zero byte: to the end)."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\0"


class EtcdKeyValue:
    """KeyValue in an etcd cluster; see the module's docstring and the contract's."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.client = EtcdClient(settings)
        self._prefix = encode_text(settings.prefix, "prefix")
        self._tolerant = False

    def tolerant(self) -> EtcdKeyValue:
        """The same store for those who only show what is there: with ``stale_gets`` one node's knowledge is good enough in an outage."""
        view = copy.copy(self)
        view._tolerant = self.client.settings.stale_gets  # noqa: SLF001 - our own
        return view

    @property
    def prefix(self) -> bytes:
        """What every key in etcd starts with."""
        return self._prefix

    def full_key(self, key: str) -> bytes:
        """The key as etcd knows it."""
        return self._prefix + key.encode()

    def _entry(self, row: Mapping[str, Any]) -> Entry:
        key = decode(row["key"])[len(self._prefix) :].decode(errors="surrogateescape")
        return Entry(key, decode(row.get("value", "")), int(row["mod_revision"]))

    # -- reading ---------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """See KeyValue."""
        check_key(key)
        with self.client.using():
            try:
                return self._find(key)
            except UnavailableError:
                if not self._tolerant:
                    raise
                return self._find(key, serializable=True)

    def _find(self, key: str, **more: Any) -> Entry | None:
        body = {"key": encode(self.full_key(key)), **more}
        rows = self.client.read("/v3/kv/range", body, "cannot read from etcd").get("kvs", [])
        return self._entry(rows[0]) if rows else None

    def list(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        """See KeyValue."""
        encode_text(prefix, "prefix")
        encode_text(after, "marker")
        check_limit(limit)
        start = max(self.full_key(prefix), self.full_key(after) + b"\0" if after else b"")
        end = prefix_end(self.full_key(prefix))
        if limit == 0 or (end != b"\0" and start >= end):
            with self.client.using():
                return []
        with self.client.using():
            try:
                return [entry for page in self._pages(start, end, limit) for entry in page]
            except UnavailableError:
                if not self._tolerant:
                    raise
                return [entry for page in self._pages(start, end, limit, serializable=True) for entry in page]

    def _pages(self, start: bytes, end: bytes, limit: int | None, **more: Any) -> Iterator[Sequence[Entry]]:
        """Pages of one revision: that of the first."""
        revision, left, size = 0, limit, PAGE_ENTRIES
        while left is None or left > 0:
            body = {
                "key": encode(start or b"\0"),
                "range_end": encode(end),
                "limit": str(size if left is None else min(size, left)),
                "revision": str(revision),
                **more,
            }
            answer = self.client.read("/v3/kv/range", body, "cannot list from etcd")
            rows = answer.get("kvs", [])
            yield [self._entry(row) for row in rows]
            if not answer.get("more"):
                return
            revision = revision or revision_of(answer)
            left = None if left is None else left - len(rows)
            start = decode(rows[-1]["key"]) + b"\0"
            size = _next_size(rows)

    # -- writing ---------------------------------------------------------------------------------------------------------

    def transact(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """See KeyValue."""
        return self.transact_leased(operations, compares, lease_id=0)

    def transact_leased(self, operations: Sequence[Operation], compares: Sequence[Compare], *, lease_id: int) -> int:
        """Like ``transact``; the entries it puts vanish with the etcd lease (0: none)."""
        check_transaction(operations, compares)
        _check_size(operations)
        body = self._body(operations, compares, lease_id)
        with self.client.using():
            try:
                return self._commit(body)
            except UncertainError as err:
                with _uncertain(err):
                    return self._resolve(body, operations, compares)

    def _body(self, operations: Sequence[Operation], compares: Sequence[Compare], lease_id: int) -> dict[str, Any]:
        return {
            "compare": [
                {
                    "key": encode(self.full_key(compare.key)),
                    "target": "MOD",
                    "result": "EQUAL",
                    "mod_revision": str(compare.revision),
                }
                for compare in compares
            ],
            "success": [self._request(operation, lease_id) for operation in operations],
        }

    def _request(self, operation: Operation, lease_id: int) -> dict[str, Any]:
        key = encode(self.full_key(operation.key))
        if isinstance(operation, Put):
            return {"request_put": {"key": key, "value": encode(operation.value), "lease": str(lease_id)}}
        return {"request_delete_range": {"key": key}}

    def _commit(self, body: Mapping[str, Any]) -> int:
        answer = self.client.write("/v3/kv/txn", body, "cannot write to etcd")
        if not answer.get("succeeded"):
            raise ConflictError("an entry changed since it was read")
        return revision_of(answer)

    # -- uncertain outcomes ----------------------------------------------------------------------------------------------

    def _resolve(self, body: Mapping[str, Any], operations: Sequence[Operation], compares: Sequence[Compare]) -> int:
        """Find out, or make sure; UncertainError if neither can be done."""
        if not operations:
            return self._repeat(body)
        anchor = _anchor(operations, compares)
        if anchor is None:
            raise UncertainError("nothing in the transaction tells whether it was applied")
        if anchor.revision == ABSENT:
            return self._created(operations, anchor)
        try:
            return self._repeat(body)
        except ConflictError:
            return self._winner(operations, anchor)

    def _repeat(self, body: Mapping[str, Any]) -> int:
        """Repeat what can be applied at most once."""
        for attempt in range(RESOLVE_TRIES_MAX):
            try:
                return self._commit(body)
            except UncertainError:
                if attempt == RESOLVE_TRIES_MAX - 1:
                    raise
        raise AssertionError("unreachable")

    def _created(self, operations: Sequence[Operation], anchor: Compare) -> int:
        entry = self._find(anchor.key)
        if entry is not None and entry.value == _value(operations, anchor.key):
            return entry.revision
        raise UncertainError(f"the key may have been created: {anchor.key[:80]!r}")

    def _winner(self, operations: Sequence[Operation], anchor: Compare) -> int:
        """Who changed the anchor first after its compared revision: we (the revision) or somebody else (ConflictError)."""
        entry = self._find(anchor.key)
        for _ in range(HISTORY_STEPS_MAX):
            if entry is None:
                break  # a deletion leaves no trace of who did it
            older = self._find(anchor.key, revision=str(entry.revision - 1))
            if older is not None and older.revision == anchor.revision:
                if entry.value == _value(operations, anchor.key):
                    return entry.revision
                raise ConflictError(f"the entry changed since it was read: {anchor.key[:80]!r}")
            entry = older
        raise UncertainError(f"the key changed several times: {anchor.key[:80]!r}")

    # -- life ------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See KeyValue; waits for calls under way."""
        self.client.close()

    def __enter__(self) -> EtcdKeyValue:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_size(operations: Sequence[Operation]) -> None:
    size = sum(len(op.key.encode()) + (len(op.value) if isinstance(op, Put) else 0) for op in operations)
    if size > REQUEST_MAX_BYTES:
        raise InvalidArgumentError(f"a transaction has at most {REQUEST_MAX_BYTES} bytes of keys and values")


def _next_size(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many entries to ask for after a page, by the size of its values."""
    mean = sum(len(row.get("value", "")) for row in rows) // len(rows)
    return max(1, min(PAGE_ENTRIES, PAGE_VALUES_BYTES // (mean + 1)))


def _anchor(operations: Sequence[Operation], compares: Sequence[Compare]) -> Compare | None:
    """A compare on a key that the transaction changes; better one that puts, better one with a revision."""
    changed = {operation.key: operation for operation in operations}
    usable = [c for c in compares if c.key in changed and not (c.revision == ABSENT and _deletes(changed[c.key]))]
    usable.sort(key=lambda c: (c.revision == ABSENT, _deletes(changed[c.key])))
    return usable[0] if usable else None


def _deletes(operation: Operation) -> bool:
    return isinstance(operation, Delete)


def _value(operations: Sequence[Operation], key: str) -> bytes | None:
    return next((op.value for op in operations if isinstance(op, Put) and op.key == key), None)


@contextmanager
def _uncertain(cause: UncertainError) -> Iterator[None]:
    """What can't be found out becomes the contract's UnavailableError."""
    try:
        yield
    except (UncertainError, UnavailableError) as err:
        raise UnavailableError(f"cannot tell whether a write to etcd was applied {UNCERTAIN_NOTE}") from (
            err if err.__cause__ else cause
        )
