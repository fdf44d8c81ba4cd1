"""Watching an etcd store: what changed below a prefix since a revision, without gaps, whatever happens to nodes and connections.

Rules.

* ``changes`` yields every change with a revision greater than ``after_revision``, in order, each once. All changes of one transaction share
  a revision and come in one tuple.
* It goes on at another endpoint after a break. It ends when the watch is closed, from any thread.
* If etcd has forgotten the revision to go on from (compaction), it raises ConflictError: list again and watch from there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from urllib3.exceptions import HTTPError

from imaging.errors import ConflictError, UnavailableError
from imaging.kv.base import Entry
from imaging.kv.checks import encode_text
from imaging.kv.etcd import EtcdKeyValue, prefix_end
from imaging.kv.etcd_client import decode, encode, error_of, refusal_of

SILENCE_MAX_S = 30.0
"""A watch that says nothing for so long is asked for again: a paused node would be silent for ever."""

RECONNECT_PAUSE_S = 0.5
"""Between two rounds over all endpoints."""

LINE_MAX_BYTES = 64 << 20
"""One message of a watch; more is no message of ours."""

READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Change:
    """An entry that was put, or a key that was deleted (``entry`` is None)."""

    key: str
    revision: int
    entry: Entry | None


class _BrokenError(Exception):
    """The connection ended; go on elsewhere."""


class EtcdWatch:
    """One watch; see the module's docstring. As a context manager it is closed at the end."""

    def __init__(self, store: EtcdKeyValue, prefix: str, *, after_revision: int) -> None:
        encode_text(prefix, "prefix")
        self._store = store
        self._start = store.full_key(prefix)
        self._revision = after_revision
        self._closed = threading.Event()
        self._response: Any = None
        self._what = f"cannot watch {prefix!r}"

    def changes(self) -> Iterator[tuple[Change, ...]]:
        """Transactions as they happen; ConflictError, NotPermittedError."""
        client = self._store.client
        while not self._closed.is_set() and not client.closing.is_set():
            for endpoint in client.ordered():
                if self._closed.is_set():
                    return
                try:
                    yield from self._follow(endpoint)
                except (_BrokenError, HTTPError, OSError):
                    client.suspect(endpoint)
            self._closed.wait(RECONNECT_PAUSE_S)

    def _follow(self, endpoint: str) -> Iterator[tuple[Change, ...]]:
        """Changes that one endpoint tells, until it breaks off."""
        client = self._store.client
        request = {
            "create_request": {
                "key": encode(self._start or b"\0"),
                "range_end": encode(prefix_end(self._start)),
                "start_revision": str(self._revision + 1),
            }
        }
        token = client.token
        response = client.open_stream(endpoint, "/v3/watch", request, read_timeout_s=SILENCE_MAX_S)
        self._response = response
        try:
            for message in _messages(response):
                if self._closed.is_set():
                    return
                self._refuse(message, endpoint, token)
                yield from self._transactions(message["result"])
        finally:
            self._response = None
            response.close()

    def _refuse(self, message: dict[str, Any], endpoint: str, token: str) -> None:
        """Raise what a message other than changes means."""
        result = message.get("result", {})
        if int(result.get("compact_revision", 0)):
            raise ConflictError(f"{self._what}: changes after revision {self._revision} are forgotten")
        if result.get("canceled") and "auth" not in str(result.get("cancel_reason", "")):
            raise _BrokenError(str(result.get("cancel_reason", "")))
        if "error" not in message and not result.get("canceled"):
            return
        self._log_in(message, endpoint, token)

    def _log_in(self, message: dict[str, Any], endpoint: str, token: str) -> None:
        """Without permission: get a new token once; for all else go on elsewhere."""
        error = message.get("error", {})
        failure = error_of(refusal_of(error if isinstance(error, dict) else {"message": error}, self._what), self._what)
        settings = self._store.client.settings
        if isinstance(failure, UnavailableError) or not settings.user:
            raise _BrokenError(failure.message)
        if token != self._store.client.token:
            raise failure
        self._store.client.log_in(endpoint, self._what, instead_of=token)
        raise _BrokenError(failure.message)

    def _transactions(self, result: dict[str, Any]) -> Iterator[tuple[Change, ...]]:
        """One message's events by revision."""
        changes = [self._change(event) for event in result.get("events", [])]
        for revision in sorted({change.revision for change in changes}):
            yield tuple(change for change in changes if change.revision == revision)
            self._revision = revision

    def _change(self, event: dict[str, Any]) -> Change:
        row = event["kv"]
        key = decode(row["key"])[len(self._store.prefix) :].decode(errors="surrogateescape")
        revision = int(row["mod_revision"])
        if event.get("type") == "DELETE":
            return Change(key, revision, None)
        return Change(key, revision, Entry(key, decode(row.get("value", "")), revision))

    def close(self) -> None:
        """End the watch, also while another thread waits for changes; idempotent."""
        self._closed.set()
        response = self._response
        if response is not None:
            response.shutdown()

    def __enter__(self) -> EtcdWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _messages(response: Any) -> Iterator[dict[str, Any]]:
    """The stream's JSON messages, one a line."""
    if response.status != 200:
        raise _BrokenError(f"status {response.status}")
    pending = b""
    while True:
        data = response.read1(READ_BYTES)
        if not data:
            raise _BrokenError("the stream ended")
        *lines, pending = (pending + data).split(b"\n")
        if len(pending) > LINE_MAX_BYTES:
            raise _BrokenError("a message without end")
        for line in lines:
            if line.strip():
                yield _decoded(line)


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        message = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise _BrokenError("not a message of etcd") from err
    if not isinstance(message, dict) or not ("result" in message or "error" in message):
        raise _BrokenError("not a message of etcd")
    return message
