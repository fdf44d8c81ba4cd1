"""One HTTP conversation with an image's source: redirects, ranges, and every error in our words.

* Redirects are followed here, one hop at a time, and each hop passes the :class:`~image_service.sources.SourcePolicy`.
* A fetch that goes on asks for ``Range`` with ``If-Range``: a source that changed answers 200 and the caller starts from zero. A 206 counts
  only if its ``Content-Range`` begins exactly where we are and names the length we know.
* The body is taken as it is stored (``Accept-Encoding: identity``, nothing is decompressed on the way).
* What the iteration of the body raises is translated inside the iterator: nothing but the project's errors leaves it.

Errors: UnavailableError (try again: connection, time-out, 408, 425, 429, 5xx), NotPermittedError (policy, 401, 403),
NotFoundError (404, 410), BadDataError (any other answer), TooLargeError (the announced length), InvalidArgumentError (a URL that is none).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.helpers import is_ip_address
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from image_service.lifecycle import UNKNOWN_SIZE
from image_service.sources import GuardedResolver, SourcePolicy, guarded_socket
from imaging.errors import BadDataError, MistifyError, NotFoundError, NotPermittedError, TooLargeError, UnavailableError

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_BROKEN = (TimeoutError, aiohttp.ClientError, OSError, HttpProcessingError)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z")
_URL_SHOWN_CHARS = 300

AHEAD_CHUNKS = 16
"""Chunks read ahead of the disk, each at most aiohttp's buffer (128 KiB): 2 MiB a fetch."""

_LAST_MODIFIED_MARGIN = timedelta(seconds=1)
"""RFC 9110, 8.8.2.2: a date this much older than the answer identifies the bytes, because a second change would show."""


@dataclass(frozen=True, slots=True)
class ConversationLimits:
    """Limits of one conversation."""

    connect_timeout_s: float = 10.0
    """A TCP and TLS handshake to the far side of the world takes one second."""
    stall_timeout_s: float = 60.0
    """No byte for so long: the connection is dead, whatever it says."""
    size_max_bytes: int = 1 << 40
    """1 TiB: larger than any guest's disk image we know of."""
    redirects_max: int = 5
    """Mirrors take two or three; a loop takes more."""


class Body:
    """An answer whose headers were accepted, read ahead of whoever takes it.

    Reading ahead does two things: the line and the disk work at the same time, and bytes that came before a connection broke
    are not lost with it (aiohttp forgets what nobody had read by then).
    """

    def __init__(
        self, response: aiohttp.ClientResponse, *, offset_bytes: int, total_bytes: int, validator: str
    ) -> None:
        self.offset_bytes = offset_bytes
        """Where the body begins: where we asked it to, or 0."""
        self.total_bytes = total_bytes
        """Length of the whole thing, UNKNOWN_SIZE if the source does not say."""
        self.validator = validator
        """What a later If-Range may say about these bytes; empty if the source gives nothing dependable."""
        self._response = response
        self._ahead: asyncio.Queue[bytes | Exception] = asyncio.Queue(AHEAD_CHUNKS)
        self._reader: asyncio.Task[None] | None = None

    def read_ahead(self) -> None:
        """Begin to read."""
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for chunk in self._response.content.iter_any():
                await self._ahead.put(chunk)
            await self._ahead.put(b"")
        except Exception as err:  # noqa: BLE001 - whatever it is, the taker raises it
            await self._ahead.put(err)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes; ends only where the source says that its body ends."""
        while True:
            item = await self._ahead.get()
            if isinstance(item, _BROKEN):
                raise UnavailableError(f"connection to the image source broke: {show(self._response.url)}") from item
            if isinstance(item, Exception):
                raise item
            if not item:
                return
            yield item

    async def close(self) -> None:
        """Stop reading and hang up."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        self._response.close()


class Fetcher:
    """Opens sources. One per service; ``close`` it."""

    def __init__(
        self, policy: SourcePolicy, limits: ConversationLimits, *, resolver: AbstractResolver | None = None
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    @property
    def policy(self) -> SourcePolicy:
        """What may be fetched."""
        return self._policy

    def _connect(self) -> aiohttp.ClientSession:
        if self._session is None:
            inner = self._resolver or aiohttp.ThreadedResolver()
            connector = aiohttp.TCPConnector(
                resolver=GuardedResolver(self._policy, inner),
                socket_factory=guarded_socket(self._policy),
                use_dns_cache=False,  # every connection stands on its own check
                happy_eyeballs_delay=None,  # one address after the other: a refused one ends it
                force_close=True,
                limit=0,  # the importer's slots are the limit
            )
            timeout = aiohttp.ClientTimeout(
                total=None,
                connect=self._limits.connect_timeout_s,
                sock_connect=self._limits.connect_timeout_s,
                sock_read=self._limits.stall_timeout_s,
            )
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    async def close(self) -> None:
        """Close every connection; idempotent."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def open(
        self, source: str, *, offset_bytes: int = 0, validator: str = "", total_bytes: int = UNKNOWN_SIZE
    ) -> AsyncIterator[Body]:
        """Ask for the source from ``offset_bytes`` on, if ``validator`` can prove that it is still the same thing.

        ``total_bytes`` is the length it had. The body may begin at 0 whatever was asked.
        """
        offset = offset_bytes if validator else 0
        body = _accept(await self._ask(source, offset, validator), offset, total_bytes)
        if body is None:  # what we have does not fit what is there now
            body = _accept(await self._ask(source, 0, ""), 0, UNKNOWN_SIZE)
        if body is None:
            raise BadDataError(f"image source makes no sense: {source[:_URL_SHOWN_CHARS]}")
        try:
            if body.total_bytes > self._limits.size_max_bytes:
                raise TooLargeError(f"image source is larger than {self._limits.size_max_bytes} bytes")
            body.read_ahead()
            yield body
        finally:
            await body.close()

    async def _ask(self, source: str, offset: int, validator: str) -> aiohttp.ClientResponse:
        url = self._policy.check_url(source)
        headers = {"Accept-Encoding": "identity", "Accept": "*/*"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
        for _ in range(self._limits.redirects_max + 1):
            response = await self._get(url, headers)
            if response.status not in _REDIRECTS:
                return response
            response.close()
            url = self._next_hop(url, response.headers.get("Location", ""))
        raise BadDataError(
            f"image source redirects more than {self._limits.redirects_max} times: {source[:_URL_SHOWN_CHARS]}"
        )

    def _next_hop(self, url: URL, location: str) -> URL:
        if not location:
            raise BadDataError(f"image source redirects to nowhere: {show(url)}")
        try:
            following = url.join(URL(location))
        except ValueError as err:
            raise BadDataError(f"image source redirects to something that is no URL: {show(url)}") from err
        return self._policy.check_url(str(following))

    async def _get(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        host = url.raw_host or ""
        if is_ip_address(host):  # such a host never reaches the resolver
            self._policy.check_address(host, host)
        try:
            return await self._connect().get(url, headers=headers, allow_redirects=False)
        except MistifyError:
            raise
        except aiohttp.InvalidURL as err:
            raise BadDataError(f"image source is no usable URL: {show(url)}") from err
        except (TimeoutError, aiohttp.ClientError, OSError, UnicodeError) as err:
            raise UnavailableError(f"image source does not answer: {show(url)}") from err


def show(url: URL) -> str:
    """A URL as far as a log or record may show it: no password, no query (it may hold a signature)."""
    return str(url.with_user(None).with_query(None).with_fragment(None))[:_URL_SHOWN_CHARS]


def _accept(response: aiohttp.ClientResponse, offset: int, known_total: int) -> Body | None:
    """The body an answer promises; None if the offset asked for makes no sense to the source any more."""
    try:
        found = _weigh(response, offset, known_total)
    except MistifyError:
        response.close()
        raise
    if found is None:
        response.close()
        return None
    begin, total = found
    return Body(response, offset_bytes=begin, total_bytes=total, validator=validator_of(response.headers))


def _weigh(response: aiohttp.ClientResponse, offset: int, known_total: int) -> tuple[int, int] | None:
    """Where an answer begins and how long the whole is."""
    if response.status == 200:
        length = response.content_length
        return 0, UNKNOWN_SIZE if length is None else length
    if offset and response.status == 206:
        total = _total_of_range(response, offset)
        return None if known_total not in (UNKNOWN_SIZE, total) else (offset, total)
    if offset and response.status == 416:
        return None
    raise _refusal(response)


def _total_of_range(response: aiohttp.ClientResponse, offset: int) -> int:
    text = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.match(text)
    if match is None or int(match[1]) != offset or int(match[2]) < offset:
        raise BadDataError(f"image source sent a range nobody asked for ({text[:80]!r}): {show(response.url)}")
    total = UNKNOWN_SIZE if match[3] == "*" else int(match[3])
    if total != UNKNOWN_SIZE and int(match[2]) != total - 1:
        raise BadDataError(f"image source sent less than the range asked for ({text!r}): {show(response.url)}")
    return total


def _refusal(response: aiohttp.ClientResponse) -> MistifyError:
    status = response.status
    kind: type[MistifyError] = BadDataError
    if status in _TRY_AGAIN:
        kind = UnavailableError
    elif status in {401, 403}:
        kind = NotPermittedError
    elif status in {404, 410}:
        kind = NotFoundError
    return kind(f"unexpected http response code: expected 200, received {status}, url: {show(response.url)}")


def validator_of(headers: Mapping[str, str]) -> str:
    """What If-Range may say about the bytes these headers came with: a strong ETag, or a date old enough to be one."""
    etag = headers.get("ETag", "")
    if etag.startswith('"'):
        return etag
    modified, date = headers.get("Last-Modified", ""), headers.get("Date", "")
    try:
        old_enough = parsedate_to_datetime(date) - parsedate_to_datetime(modified) >= _LAST_MODIFIED_MARGIN
    except (TypeError, ValueError):
        return ""
    return modified if old_enough else ""
