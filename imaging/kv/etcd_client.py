"""One etcd cluster over its JSON gateway: endpoints, time-outs, fail-over, tokens, and what its errors mean.

The gateway's traps, all handled here: 64-bit integers are strings, zero values are left out, keys and values are base64, and an
error is JSON only if the gateway itself made it.

An attempt ends in one of three ways: with an answer; *refused*, which changed nothing for certain and may be tried at another
endpoint; or *uncertain*, which may have been applied or may yet be. Reads are repeated after both. A write is
repeated only after a refusal; :class:`UncertainError` leaves the rest to the caller, who may be able to find out.

A cluster that is down. Once a call's patience was in vain the cluster counts as down: until some call succeeds again, each asks every
endpoint that answers just once and fails at once, and endpoints that say nothing are asked by one caller now and then. So a lost quorum
costs the first callers seconds and all others milliseconds, and its return is noticed by the next call.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from imaging.errors import (
    ConflictError,
    InternalError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UnsupportedError,
)

CONNECT_TIMEOUT_S = 2.0
"""Within a data centre a connection takes milliseconds; a machine that is off should not cost more than this."""

READ_TIMEOUT_S = 3.0
"""One attempt of a read. A node that is paused is left for another after it."""

WRITE_TIMEOUT_S = 5.0
"""One attempt of a write. etcd itself gives up a proposal after 5 s plus twice its election time-out."""

PATIENCE_S = 3.0
"""How long refusals are tried again: an election takes one to two seconds, a lost quorum should be told soon."""

PROBE_S = 1.0
"""How often, while the cluster is down and no endpoint says anything, one caller may wait for an answer."""

SUSPECT_S = 10.0
"""An endpoint that did not answer is asked last for so long."""

ROUND_PAUSE_S = 0.1
"""Between two rounds over all endpoints."""

POOL_CONNECTIONS = 64
"""Connections kept to each endpoint: as many as threads that may call at once."""

ANSWER_MAX_BYTES = 512 << 20
"""A page of the longest values; more than this is no answer of ours."""

UNCERTAIN_NOTE = "(maybe_applied)"


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Where a cluster is and how to speak to it."""

    endpoints: tuple[str, ...]
    prefix: str = ""
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    user: str = ""
    password: str = ""
    stale_gets: bool = False
    """Let the tolerant view of a store fall back to what one node knows when the cluster has no leader. It may be old."""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    write_timeout_s: float = WRITE_TIMEOUT_S
    patience_s: float = PATIENCE_S


class UncertainError(Exception):
    """Private to the etcd modules: a write was sent and nobody told what became of it."""


class _RefusedError(Exception):
    """An attempt changed nothing. ``error`` is what to raise if no other endpoint does better."""

    def __init__(self, error: MistifyError, *, elsewhere: bool = False, token: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.elsewhere = elsewhere
        self.token = token


_UNAUTHENTICATED = 16
_BY_CODE: dict[int, type[MistifyError]] = {
    3: InvalidArgumentError,
    5: NotFoundError,
    7: NotPermittedError,
    8: UnavailableError,
    9: ConflictError,
    11: ConflictError,
    12: UnsupportedError,
    _UNAUTHENTICATED: NotPermittedError,
}
"""gRPC's codes of requests that changed nothing."""

_CERTAIN_TEXTS = ("no leader", "too many requests", "not healthy", "connection refused")
"""Among the answers with code 14 (unavailable) and 8: those given before anything was proposed."""

_LOGIN_TEXTS = ("invalid auth token", "user name is empty", "revision of auth store is old", "user name not found")


def grpc_error(code: int, text: str, what: str) -> MistifyError | None:
    """The error that an answer of the gateway means; None if it does not tell whether anything changed."""
    if "database space exceeded" in text:
        return NoSpaceError(f"{what}: no space left in etcd")
    if "authentication failed" in text or any(login in text for login in _LOGIN_TEXTS):
        return NotPermittedError(f"{what}: etcd refuses the user or password")
    if any(certain in text for certain in _CERTAIN_TEXTS):
        return UnavailableError(f"{what}: {text[:200]}")
    kind = _BY_CODE.get(code)
    return kind(f"{what}: {text[:200]}") if kind is not None else None


def encode(data: bytes) -> str:
    """Bytes as the gateway writes them."""
    return base64.b64encode(data).decode("ascii")


def decode(text: str) -> bytes:
    """The gateway's text as bytes."""
    return base64.b64decode(text)


def _manager(settings: EtcdSettings) -> urllib3.PoolManager:
    tls = any(urlsplit(endpoint).scheme == "https" for endpoint in settings.endpoints)
    options: dict[str, Any] = {}
    if tls:
        options = {"cert_reqs": "CERT_REQUIRED", "ca_certs": settings.ca_file}
        if settings.cert_file:
            options |= {"cert_file": settings.cert_file, "key_file": settings.key_file}
    return urllib3.PoolManager(
        num_pools=len(settings.endpoints) + 1, maxsize=POOL_CONNECTIONS, retries=False, **options
    )


def _check_settings(settings: EtcdSettings) -> None:
    if not settings.endpoints:
        raise InvalidArgumentError("an etcd store needs at least one endpoint")
    for endpoint in settings.endpoints:
        parts = urlsplit(endpoint)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidArgumentError(f"not an http(s) address of etcd: {endpoint[:200]!r}")
    if bool(settings.cert_file) != bool(settings.key_file):
        raise InvalidArgumentError("a client certificate for etcd needs both its file and its key's file")


class EtcdClient:
    """Calls to one cluster. Threads share it. Life: construct, call, ``close`` (which waits for calls under way)."""

    def __init__(self, settings: EtcdSettings) -> None:
        _check_settings(settings)
        self.settings = settings
        self._pools = _manager(settings)
        self._endpoints = tuple(endpoint.rstrip("/") for endpoint in settings.endpoints)
        self._suspect_until_s: dict[str, float] = {}
        self._token = ""
        self._token_lock = threading.Lock()
        self._closing = threading.Event()
        self._down = False
        self._probed_s = 0.0
        self._calls = 0
        self._idle = threading.Condition()

    # -- life ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self) -> Iterator[None]:
        """Count a call, so that ``close`` lets it finish; UnavailableError after close."""
        with self._idle:
            if self._closing.is_set():
                raise UnavailableError("the etcd store is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    @property
    def closing(self) -> threading.Event:
        """Set once nobody may begin a call any more."""
        return self._closing

    def close(self) -> None:
        """Refuse new calls, wait for those under way (their time-outs bound it), let go of the connections."""
        with self._idle:
            self._closing.set()
            self._idle.wait_for(lambda: self._calls == 0)
        self._pools.clear()

    # -- calling ---------------------------------------------------------------------------------------------------------

    def read(self, path: str, body: Mapping[str, Any], what: str) -> dict[str, Any]:
        """A call that changes nothing: repeated at every endpoint until one answers or the patience is over."""
        return self._call(path, body, what, writes=False)

    def write(self, path: str, body: Mapping[str, Any], what: str) -> dict[str, Any]:
        """A call that changes something: repeated only while it certainly changed nothing. UncertainError."""
        return self._call(path, body, what, writes=True)

    def _call(self, path: str, body: Mapping[str, Any], what: str, *, writes: bool) -> dict[str, Any]:
        deadline_s = time.monotonic() + self.settings.patience_s
        while True:
            error = self._round(path, body, what, writes=writes)
            if not isinstance(error, MistifyError):
                self._down = self._down and bool(body.get("serializable"))  # that one needs no quorum
                return error
            if self._down or time.monotonic() >= deadline_s or self._closing.wait(ROUND_PAUSE_S):
                self._down = True
                raise error

    def _to_ask(self, *, any_knows: bool) -> Sequence[str]:
        """The endpoints, the likely ones first. While the cluster is down only one caller at times waits for those that say nothing.

        What any node knows is asked of all: one that could not write in time can still read.
        """
        endpoints, now_s = self.ordered(), time.monotonic()
        if not self._down:
            return endpoints
        answering = [endpoint for endpoint in endpoints if self._suspect_until_s.get(endpoint, 0.0) <= now_s]
        if answering or (now_s - self._probed_s < PROBE_S and not any_knows):
            return answering
        self._probed_s = now_s
        return endpoints

    def _round(self, path: str, body: Mapping[str, Any], what: str, *, writes: bool) -> dict[str, Any] | MistifyError:
        """Ask each endpoint once; the answer, or why there is none yet."""
        failure: MistifyError = UnavailableError(f"{what}: no endpoint of etcd answers")
        for endpoint in self._to_ask(any_knows=bool(body.get("serializable"))):
            try:
                return self._ask(endpoint, path, body, what, writes=writes)
            except _RefusedError as refusal:
                if not refusal.elsewhere:
                    raise refusal.error from refusal
                failure = refusal.error
            except UncertainError as err:
                if writes:
                    raise
                failure = UnavailableError(f"{what}: {err}")
        return failure

    def ordered(self) -> Sequence[str]:
        """The endpoints, those that failed lately last."""
        now_s = time.monotonic()
        return sorted(self._endpoints, key=lambda endpoint: self._suspect_until_s.get(endpoint, 0.0) > now_s)

    def suspect(self, endpoint: str) -> None:
        """Ask this endpoint last for a while."""
        self._suspect_until_s[endpoint] = time.monotonic() + SUSPECT_S

    def _ask(self, endpoint: str, path: str, body: Mapping[str, Any], what: str, *, writes: bool) -> dict[str, Any]:
        """One attempt, and a second one if the token had run out."""
        timeout_s = self.settings.write_timeout_s if writes else self.settings.read_timeout_s
        if self.settings.user and not self._token:
            # Not left to the refusal: with client certificates the node would take us for whom its own certificate names.
            self.log_in(endpoint, what, instead_of="")
        token = self._token
        try:
            return self._post(endpoint, path, body, what, timeout_s=timeout_s)
        except _RefusedError as refusal:
            if not refusal.token or not self.settings.user:
                raise
        self.log_in(endpoint, what, instead_of=token)
        return self._post(endpoint, path, body, what, timeout_s=timeout_s)

    def log_in(self, endpoint: str, what: str, *, instead_of: str) -> None:
        """Get a token, unless another thread got one meanwhile."""
        with self._token_lock:
            if self._token != instead_of:
                return
            self._token = ""
            login = {"name": self.settings.user, "password": self.settings.password}
            timeout_s = self.settings.read_timeout_s
            try:
                answer = self._post(endpoint, "/v3/auth/authenticate", login, what, timeout_s=timeout_s)
            except UncertainError as err:
                raise _RefusedError(UnavailableError(f"{what}: cannot log in to etcd"), elsewhere=True) from err
            self._token = str(answer.get("token", ""))

    @property
    def token(self) -> str:
        """The token that calls carry now; empty before the first login."""
        return self._token

    def headers(self) -> dict[str, str]:
        """What every request says: fail at once without a leader, and who we are."""
        headers = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
        if self._token:
            headers["Authorization"] = self._token
        return headers

    def open_stream(self, endpoint: str, path: str, body: Mapping[str, Any], *, read_timeout_s: float) -> Any:
        """An answer without end (a watch) as a urllib3 response; HTTPError."""
        timeout = urllib3.Timeout(connect=self.settings.connect_timeout_s, read=read_timeout_s)
        return self._pools.request(
            "POST",
            endpoint + path,
            body=msgspec.json.encode(body),
            headers=self.headers(),
            timeout=timeout,
            preload_content=False,
        )

    def _post(
        self, endpoint: str, path: str, body: Mapping[str, Any], what: str, *, timeout_s: float
    ) -> dict[str, Any]:
        """One request; _RefusedError or UncertainError."""
        headers = self.headers()
        if body.get("serializable"):
            del headers["Grpc-Metadata-hasleader"]
        timeout = urllib3.Timeout(connect=self.settings.connect_timeout_s, read=timeout_s)
        try:
            answer = self._pools.request(
                "POST", endpoint + path, body=msgspec.json.encode(body), headers=headers, timeout=timeout
            )
        except (NewConnectionError, ConnectTimeoutError) as err:
            self.suspect(endpoint)
            raise _RefusedError(UnavailableError(f"{what}: {endpoint} does not answer"), elsewhere=True) from err
        except HTTPError as err:
            self.suspect(endpoint)
            raise UncertainError(f"{endpoint} gave no answer") from err
        self._suspect_until_s.pop(endpoint, None)
        return _answer(answer.status, answer.data, endpoint, what)


def _answer(status: int, data: bytes, endpoint: str, what: str) -> dict[str, Any]:
    """The decoded answer, or its error."""
    try:
        decoded = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise _foreign(status, data, endpoint, what) from err
    if not isinstance(decoded, dict):
        raise _foreign(status, data, endpoint, what)
    if status < 400 and "error" not in decoded:
        return decoded
    raise refusal_of(decoded, what)


def refusal_of(decoded: Mapping[str, Any], what: str) -> Exception:
    """What an error object of the gateway means."""
    text = str(decoded.get("message") or decoded.get("error") or "")
    code = int(decoded.get("code", decoded.get("grpc_code", 2)))
    error = grpc_error(code, text, what)
    if error is None:
        return UncertainError(text[:200])
    token = code == _UNAUTHENTICATED or any(login in text for login in _LOGIN_TEXTS)
    return _RefusedError(error, elsewhere=isinstance(error, UnavailableError), token=token)


def _foreign(status: int, data: bytes, endpoint: str, what: str) -> Exception:
    """An answer that is not the gateway's JSON."""
    text = data[:120].decode(errors="replace").strip()
    if status == 404:
        return _RefusedError(UnsupportedError(f"{what}: {endpoint} has no v3 gateway ({text})"))
    if status in {400, 401, 403}:
        kind = InvalidArgumentError if status == 400 else NotPermittedError
        return _RefusedError(kind(f"{what}: {endpoint} refuses the request ({text})"))
    return UncertainError(f"{endpoint} answered {status}: {text}")


def error_of(failure: Exception, what: str) -> MistifyError:
    """The public error of a failed attempt that is not repeated."""
    if isinstance(failure, _RefusedError):
        return failure.error
    if isinstance(failure, (UncertainError, HTTPError)):
        return UnavailableError(f"{what}: {failure}")
    return InternalError(f"{what}: unexpected failure")


def revision_of(answer: Mapping[str, Any]) -> int:
    """The store's revision an answer was given at."""
    header = cast("Mapping[str, Any]", answer.get("header", {}))
    return int(header.get("revision", 0))
