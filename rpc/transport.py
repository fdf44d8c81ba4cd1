"""How a client's calls travel: described once (:class:`HttpCall`), carried by requests or by aiohttp.

An :class:`Endpoint` is a method of both kinds of client at the same time: on a synchronous one it returns the answer, on an
asynchronous one something to await. So the two cannot drift apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import IO, Any, Generic, ParamSpec, Self, TypeAlias, TypeVar, overload

import aiohttp
import requests
import urllib3

from imaging.errors import BadDataError, MistifyError, UnavailableError, UnsupportedError
from rpc.failures import error_from_status

CONNECT_TIMEOUT_S = 10.0
"""Three SYNs; more means that nobody is there."""

CALL_TIMEOUT_S = 60.0
"""A whole call that does not transfer an image."""

STALL_TIMEOUT_S = 60.0
"""Time between two pieces of a transfer; a source that is silent longer is gone."""

ANSWER_MAX_BYTES = 64 << 20
"""An answer that is read into memory: a hundred thousand records."""

PIECE_BYTES = 1 << 20
"""One read of a download (measured: smaller pieces cost half the speed)."""

P = ParamSpec("P")
T = TypeVar("T")

Body: TypeAlias = bytes | IO[bytes] | Iterable[bytes] | AsyncIterable[bytes]


@dataclass(frozen=True, kw_only=True)
class HttpCall:
    """One request. ``timeout_s`` limits the whole call; transfers are limited by stalls instead.

    ``wants_part`` says that a server that ignores the range must not be taken for one that honours it.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    timeout_s: float | None = None
    is_transfer: bool = False
    wants_part: bool = False


class Endpoint(Generic[P, T]):
    """A method of a client: ``build`` makes the request of the arguments, ``read`` the result of the answer's body."""

    def __init__(self, build: Callable[P, HttpCall], read: Callable[[bytes], T]) -> None:
        self.build = build
        self.read = read

    @overload
    def __get__(self, client: SyncTransport, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncTransport, owner: type) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    def __get__(self, client: SyncTransport | AsyncTransport | None, owner: type) -> Any:
        return self if client is None else functools.partial(client.invoke, self)


class Download(Generic[P]):
    """A method of a client that gives pieces of bytes, inside a ``with`` or ``async with``."""

    def __init__(self, build: Callable[P, HttpCall]) -> None:
        self.build = build

    @overload
    def __get__(self, client: SyncTransport, owner: type) -> Callable[P, AbstractContextManager[Iterator[bytes]]]: ...
    @overload
    def __get__(
        self, client: AsyncTransport, owner: type
    ) -> Callable[P, AbstractAsyncContextManager[AsyncIterator[bytes]]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    def __get__(self, client: SyncTransport | AsyncTransport | None, owner: type) -> Any:
        return self if client is None else functools.partial(client.download, self)


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _too_large(what: str) -> BadDataError:
    return BadDataError(f"{what}: the answer is larger than {ANSWER_MAX_BYTES} bytes")


class SyncTransport:
    """Carries calls with requests. One client a thread; close it, or use it in a ``with``."""

    def __init__(self, base_url: str, *, token: str | None = None, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy from the environment has no business between a host and its agent
        self._session.headers.update(_headers(token))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def invoke(self, endpoint: Endpoint[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make the call of an endpoint."""
        call = endpoint.build(*args, **kwargs)
        with self._open(call) as response:
            body = self._read(call, response)
        return endpoint.read(body)

    @contextlib.contextmanager
    def download(self, download: Download[P], *args: P.args, **kwargs: P.kwargs) -> Iterator[Iterator[bytes]]:
        """Make the call of a download; what it gives ends with an error if the transfer ends early."""
        call = download.build(*args, **kwargs)
        with self._open(call) as response:
            yield self._pieces(call, response)

    @contextlib.contextmanager
    def _open(self, call: HttpCall) -> Iterator[requests.Response]:
        with self._translated(call):
            response = self._send(call)
        with contextlib.closing(response):
            if response.status_code >= 400:
                raise error_from_status(response.status_code, self._read(call, response), _code(response.headers))
            _check_range(call, response.status_code)
            yield response

    def _send(self, call: HttpCall) -> requests.Response:
        return self._session.request(
            call.method,
            self.base_url + call.path,
            params=dict(call.query),
            headers=dict(call.headers),
            data=call.body,  # type: ignore[arg-type]  # an AsyncIterable is the caller's mistake, and requests says so
            timeout=(CONNECT_TIMEOUT_S, self._limit_s(call)),
            stream=True,
            allow_redirects=False,
        )

    def _limit_s(self, call: HttpCall) -> float:
        return STALL_TIMEOUT_S if call.is_transfer else call.timeout_s or self._timeout_s

    def _read(self, call: HttpCall, response: requests.Response) -> bytes:
        deadline_s = time.monotonic() + self._limit_s(call)
        body = bytearray()
        for piece in self._pieces(call, response):
            body += piece
            if len(body) > ANSWER_MAX_BYTES:
                raise _too_large(_what(self.base_url, call))
            if time.monotonic() > deadline_s:
                raise UnavailableError(
                    f"{_what(self.base_url, call)}: no whole answer within {self._limit_s(call):g} s"
                )
        return bytes(body)

    def _pieces(self, call: HttpCall, response: requests.Response) -> Iterator[bytes]:
        with self._translated(call):
            yield from response.iter_content(PIECE_BYTES)

    @contextlib.contextmanager
    def _translated(self, call: HttpCall) -> Iterator[None]:
        try:
            yield
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as err:
            raise _broken(self.base_url, call, err) from err


class AsyncTransport:
    """Carries calls with aiohttp. Make it inside a loop; close it, or use it in an ``async with``."""

    def __init__(self, base_url: str, *, token: str | None = None, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(headers=_headers(token), auto_decompress=True)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def invoke(self, endpoint: Endpoint[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make the call of an endpoint."""
        call = endpoint.build(*args, **kwargs)
        async with self._open(call) as response:
            body = await self._read(call, response)
        return endpoint.read(body)

    @contextlib.asynccontextmanager
    async def download(
        self, download: Download[P], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Make the call of a download; what it gives ends with an error if the transfer ends early."""
        call = download.build(*args, **kwargs)
        async with self._open(call) as response, contextlib.aclosing(self._pieces(call, response)) as pieces:
            yield pieces

    @contextlib.asynccontextmanager
    async def _open(self, call: HttpCall) -> AsyncIterator[aiohttp.ClientResponse]:
        with self._translated(call):
            response = await self._session.request(
                call.method,
                self.base_url + call.path,
                params=dict(call.query),
                headers=dict(call.headers),
                data=_async_body(call.body),
                timeout=self._timeout(call),
                allow_redirects=False,
            )
        try:
            if response.status >= 400:
                raise error_from_status(response.status, await self._read(call, response), _code(response.headers))
            _check_range(call, response.status)
            yield response
        finally:
            response.close() if not response.content.is_eof() else response.release()

    def _timeout(self, call: HttpCall) -> aiohttp.ClientTimeout:
        if call.is_transfer:
            return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
        return aiohttp.ClientTimeout(total=call.timeout_s or self._timeout_s, sock_connect=CONNECT_TIMEOUT_S)

    async def _read(self, call: HttpCall, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for piece in self._pieces(call, response):
            body += piece
            if len(body) > ANSWER_MAX_BYTES:
                raise _too_large(_what(self.base_url, call))
        return bytes(body)

    async def _pieces(self, call: HttpCall, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        with self._translated(call):
            async for piece in response.content.iter_chunked(PIECE_BYTES):
                yield piece

    @contextlib.contextmanager
    def _translated(self, call: HttpCall) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise _broken(self.base_url, call, err) from err


def _check_range(call: HttpCall, status: int) -> None:
    if call.wants_part and status != HTTPStatus.PARTIAL_CONTENT:
        raise UnsupportedError(f"{call.path}: the server cannot send a part")


def _code(headers: Mapping[str, str]) -> str:
    return headers.get("X-Error-Code", "")


def _what(base_url: str, call: HttpCall) -> str:
    return f"{call.method} {base_url}{call.path}"


def _broken(base_url: str, call: HttpCall, err: Exception) -> MistifyError:
    timed_out = isinstance(err, TimeoutError | requests.Timeout | urllib3.exceptions.TimeoutError)
    return UnavailableError(f"{_what(base_url, call)}: {'no answer in time' if timed_out else 'the connection failed'}")


def _async_body(body: Body | None) -> Any:
    """What aiohttp can send: bytes, files and async iterables as they are; an iterator is read on a thread."""
    if body is None or isinstance(body, bytes | AsyncIterable) or hasattr(body, "read"):
        return body
    return _on_thread(iter(body))


async def _on_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
