"""The bytes of one URL, read with limits: connect, stall and total time, length, and a way to cancel from another thread."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

import requests
import urllib3

from agent_image.fetch_spool import BodyFacts, Spool
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    ConflictError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)

PIECE_BYTES = 1 << 20
"""Larger reads gain nothing, smaller ones cost: 0.25 CPU seconds a GB against 0.85 at 64 KiB."""

REDIRECTS_MAX = 5
"""A mirror behind a balancer behind an old name; more is a loop."""

RESUMES_MAX = 5
"""Broken connections in a row, without a byte between them, before the attempt is given up."""

RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_TEXT_TYPES = re.compile(r"(text/|application/(json|xml|xhtml))")
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")
_DIGEST_HEADERS = ("X-Image-Digest", "X-Content-Digest", "ETag")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """How long a fetch may take and how large an image may be."""

    connect_s: float = 10.0
    """A server on the same network answers within milliseconds; a lost SYN is sent again after 1, 3 and 7 s."""
    stall_s: float = 60.0
    """Without a byte for so long, nothing is coming any more."""
    total_s: float = 6 * 3600.0
    """A 1 TiB image at 50 MB/s; a source that drips can't hold a worker for longer."""
    image_max_bytes: int = 4 << 40
    """Of the volume. Far above what hypervisors hold; it ends an image that decompresses for ever."""
    resume_delay_s: float = 0.5
    """Before a broken connection is made again."""


class Shuttable(Protocol):
    """A connection that another thread can end."""

    def shutdown(self) -> None:
        """Wake whoever waits for it."""


class CancelToken:
    """Says from another thread that a fetch is to stop, and wakes it if it waits for the network."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._waiting_on: Shuttable | None = None

    @property
    def cancelled(self) -> bool:
        """Whether the fetch is to stop."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Stop the fetch; idempotent."""
        self._event.set()
        with self._lock:
            if self._waiting_on is not None:
                shut(self._waiting_on)

    def check(self) -> None:
        """ConflictError if the fetch is to stop."""
        if self.cancelled:
            raise ConflictError("the fetch was cancelled")

    def wait(self, delay_s: float) -> None:
        """Wait; ConflictError as soon as the fetch is to stop."""
        self._event.wait(delay_s)
        self.check()

    @contextmanager
    def closing(self, response: Shuttable) -> Iterator[None]:
        """While inside, ``cancel`` shuts this connection."""
        with self._lock:
            self._waiting_on = response
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._waiting_on = None


def shut(response: Shuttable) -> None:
    """End a connection; one that has ended already is fine."""
    try:
        response.shutdown()
    except (OSError, ValueError, RuntimeError, AttributeError) as err:
        log.debug("a connection was closed already", extra={"cause": repr(err)})


def status_error(status: int, url: str) -> MistifyError:
    """What a server's refusal means, in the words old clients know."""
    text = f"unexpected http response code: expected 200, received {status}, url: {url}"
    if status in RETRYABLE_STATUS:
        return UnavailableError(text)
    known: Mapping[int, type[MistifyError]] = {
        401: NotPermittedError,
        403: NotPermittedError,
        404: NotFoundError,
        410: NotFoundError,
    }
    return known.get(status, InvalidArgumentError)(text)


def shown_url(url: str) -> str:
    """The URL without user and password: what errors, logs and records may say of it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else url


def get_response(
    session: requests.Session, url: str, headers: Mapping[str, str], limits: FetchLimits
) -> requests.Response:
    """One GET, answered as far as its headers; its body is still to be read. The error says what went wrong, in our words."""
    try:
        return session.get(url, headers=headers, stream=True, timeout=(limits.connect_s, limits.stall_s))
    except requests.Timeout as err:
        raise UnavailableError(f"timed out while asking for {shown_url(url)}") from err
    except requests.TooManyRedirects as err:
        raise BadDataError(f"more than {REDIRECTS_MAX} redirects from {shown_url(url)}") from err
    except ValueError as err:  # requests' own for URLs are, and what a redirect that is none makes of urllib is
        raise InvalidArgumentError(f"can't fetch from {shown_url(url)}: not a valid http URL") from err
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as err:
        raise UnavailableError(f"can't reach {shown_url(url)}") from err


class HttpBody:
    """The body of one GET, as a blocking source of bytes.

    Reads what is there, at most a piece. A connection that breaks is made again where it broke, if the server has given a strong
    ETag and takes ranges; otherwise, and when the body is shorter than announced, UnavailableError. What an earlier attempt
    left in ``spool`` comes first, and only the rest is asked for.
    """

    def __init__(
        self, url: str, limits: FetchLimits, cancel: CancelToken, headers: Mapping[str, str], spool: Spool
    ) -> None:
        self.url = shown_url(url)
        self._spool = spool
        self._address = url
        self.received_bytes = 0
        self.expected_bytes: int | None = None
        self.digest: Digest | None = None
        """What the server says the whole body is."""
        self.type = ""
        """What the server says the image is for (``kvm``, ``container``)."""
        self._limits = limits
        self._cancel = cancel
        self._headers = dict(headers) | {"Accept-Encoding": "identity"}
        self._deadline = time.monotonic() + limits.total_s
        self._session = open_session()
        self._raw: urllib3.HTTPResponse | None = None
        self._etag = ""
        self._failures = 0
        self._closed = False

    def __enter__(self) -> HttpBody:
        try:
            if not self._take_up():
                self._start(self._get({}))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wake(self) -> None:
        """From another thread: no more bytes are wanted; a ``read`` that waits for the network ends."""
        self._closed = True
        if self._raw is not None:
            shut(self._raw)

    def close(self) -> None:
        """Release the connection; idempotent."""
        self._closed = True
        self._session.close()
        if self._raw is not None:
            self._raw.close()

    def _take_up(self) -> bool:
        """Whether what is kept is of this body, and what is missing is on its way."""
        kept = self._spool.find(self.url)
        if kept is None or not self._spool.size_bytes:
            return False
        self._know(kept)
        self.received_bytes = self._spool.size_bytes
        if self.received_bytes == self.expected_bytes:
            log.info("all of an image's bytes had arrived before the last stop", extra={"url": self.url})
            return True
        response = self._ask_for_rest() if self._etag else None
        if response is not None and self._is_rest(response):
            return True
        if response is not None:
            response.close()
        self.received_bytes = 0
        return False

    def _start(self, response: requests.Response) -> None:
        if response.status_code != requests.codes.ok:
            raise status_error(response.status_code, self.url)
        self._refuse_text(response)
        length, etag = response.headers.get("Content-Length", ""), response.headers.get("ETag", "")
        digest = announced_digest(response.headers)
        facts = BodyFacts(
            url=self.url,
            etag=etag if etag.startswith('"') else "",
            size_bytes=int(length) if length.isdigit() else None,
            digest="" if digest is None else str(digest),
            kind=response.headers.get("X-Image-Type", ""),
        )
        self._know(facts)
        self._spool.begin(facts)

    def _know(self, facts: BodyFacts) -> None:
        self.expected_bytes, self._etag, self.type = facts.size_bytes, facts.etag, facts.kind
        self.digest = Digest.parse(facts.digest) if facts.digest else None

    def _refuse_text(self, response: requests.Response) -> None:
        kind = response.headers.get("Content-Type", "")
        if _TEXT_TYPES.match(kind.strip().lower()):
            raise BadDataError(f"{self.url} is not an image: the server says it is {kind[:64]}")

    def _get(self, headers: Mapping[str, str]) -> requests.Response:
        """One request; its raw body becomes the current one."""
        self._cancel.check()
        response = get_response(self._session, self._address, self._headers | dict(headers), self._limits)
        self._raw = response.raw
        return response

    def read(self, size: int = PIECE_BYTES, /) -> bytes:
        """What has arrived, at most ``size`` bytes; empty at the end of the whole body."""
        kept = self._spool.read(size)
        if kept:
            self._check_time()
            return kept
        if self._raw is None and self.received_bytes == self.expected_bytes:
            return b""  # all of it was kept
        while True:
            try:
                data = self._read_once(size)
            except UnavailableError as err:
                self._resume(err)
                continue
            if data:
                self._spool.append(data)
                self.received_bytes += len(data)
                self._failures = 0
            return data

    def _read_once(self, size: int) -> bytes:
        raw = self._raw
        if raw is None:
            raise UnavailableError(f"not connected to {self.url}")
        self._check_time()
        try:
            with self._cancel.closing(raw):
                data = raw.read1(size, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as err:
            self._cancel.check()
            self._check_time()
            raise UnavailableError(f"the connection broke after {self.received_bytes} bytes of {self.url}") from err
        if not data:
            self._check_end()
        return data

    def _check_time(self) -> None:
        self._cancel.check()
        if time.monotonic() > self._deadline:
            self._etag = ""  # no time is left to resume in
            raise UnavailableError(f"{self.url} was not fetched within {self._limits.total_s:.0f} s")

    def _check_end(self) -> None:
        self._cancel.check()  # a connection that cancel() shut ends like a complete one
        if self.expected_bytes is not None and self.received_bytes < self.expected_bytes:
            raise UnavailableError(
                f"the connection ended after {self.received_bytes} of {self.expected_bytes} bytes of {self.url}"
            )

    def _resume(self, broken: UnavailableError) -> None:
        """Ask for the rest; the error itself if the server can't give it."""
        if self._closed or not self._etag or self.received_bytes == 0 or self._failures >= RESUMES_MAX:
            raise broken
        self._failures += 1
        log.info(
            "resuming a fetch", extra={"url": self.url, "offset_bytes": self.received_bytes, "why": broken.message}
        )
        self._cancel.wait(self._limits.resume_delay_s * 2 ** (self._failures - 1))
        if self._raw is not None:
            self._raw.close()
            self._raw = None
        try:
            response = self._ask_for_rest()
        except UnavailableError:
            return  # the next read fails at once and comes back here, until the failures are too many
        if response.status_code in RETRYABLE_STATUS:
            response.close()
            self._raw = None
        elif not self._is_rest(response):
            raise broken

    def _ask_for_rest(self) -> requests.Response:
        return self._get({"Range": f"bytes={self.received_bytes}-", "If-Range": self._etag})

    def _is_rest(self, response: requests.Response) -> bool:
        """Whether the answer is exactly the bytes that are missing."""
        match = CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if response.status_code != requests.codes.partial_content or match is None:
            return False
        total = None if match[3] == "*" else int(match[3])
        return int(match[1]) == self.received_bytes and total in {None, self.expected_bytes}


def open_session() -> requests.Session:
    """Connections of one thread."""
    session = requests.Session()
    session.trust_env = False  # neither ~/.netrc nor a proxy of the environment: sources are named by the caller
    session.max_redirects = REDIRECTS_MAX
    return session


def announced_digest(headers: Mapping[str, str]) -> Digest | None:
    """The digest a server gives for the body, in a header of its own or as a strong ETag ``"sha256:..."``."""
    for name in _DIGEST_HEADERS:
        value = headers.get(name, "").strip().strip('"').lower()
        if value.startswith("sha256:"):
            try:
                return Digest.parse(value)
            except InvalidArgumentError:
                log.warning("a digest header that is none", extra={"header": name})
    return None


ProgressCallback = Callable[[int, int | None], None]
"""Told how many bytes arrived, of how many."""
