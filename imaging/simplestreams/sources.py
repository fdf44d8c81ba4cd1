"""Where documents come from: a web server, a directory, or memory.

A source answers ``fetch(path)`` with the whole document and the URL it was at. Errors: NotFoundError (the source says that there is none),
NotPermittedError (401, 403), TooLargeError, UnavailableError (anything that may pass: refused connections, time-outs, 5xx).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import requests

from imaging.errors import (
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    NotPermittedError,
    TooLargeError,
    UnavailableError,
)
from imaging.files import os_errors
from imaging.simplestreams.paths import check_path, join_url

DOCUMENT_MAX_BYTES = 256 << 20
"""Ubuntu's largest products file has 30 MB; this bounds what a hostile server can make us keep in memory."""

CONNECT_TIMEOUT_S = 10.0
"""A TCP and TLS handshake to the far side of the world takes one second."""

READ_TIMEOUT_S = 60.0
"""No byte for so long: the connection is dead."""

ATTEMPTS_MAX = 3
"""The first try and two more, after one and two seconds: what a restarting web server takes."""

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """A document and where it was."""

    data: bytes
    url: str


class DataSource(Protocol):
    """See the module's docstring."""

    @property
    def description(self) -> str:
        """What an audit calls it."""

    def url(self, path: str) -> str:
        """The full URL of a path."""

    def fetch(self, path: str) -> Fetched:
        """Read a whole document."""


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


class HttpSource:
    """A web server. Documents are limited in size while they stream; what may pass is tried again."""

    def __init__(
        self,
        base: str,
        description: str = "",
        *,
        session: requests.Session | None = None,
        attempts_max: int = ATTEMPTS_MAX,
        document_max_bytes: int = DOCUMENT_MAX_BYTES,
        pause: Callable[[float], None] = _pause,
    ) -> None:
        self.base = base
        self.description = description or base
        self.attempts_max = attempts_max
        self._session = session or requests.Session()
        self._document_max_bytes = document_max_bytes
        self._pause = pause

    def url(self, path: str) -> str:
        """The full URL of a path."""
        return join_url(self.base, path)

    def fetch(self, path: str) -> Fetched:
        """Read a whole document."""
        url = self.url(check_path(path))
        for attempt in range(1, self.attempts_max + 1):
            try:
                return Fetched(self._read(url), url)
            except UnavailableError:
                if attempt == self.attempts_max:
                    raise
                self._pause(2.0 ** (attempt - 1))
        raise UnavailableError(f"no attempt was made to read {url}")

    def _read(self, url: str) -> bytes:
        try:
            with self._session.get(url, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as answer:
                check_status(answer.status_code, url)
                return self._limited(answer, url)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, UnicodeError) as err:
            raise InvalidArgumentError(f"not a URL that can be read: {url[:200]}") from err
        except requests.ConnectionError as err:
            if _never_answered(err):
                raise NotFoundError(f"nobody answers at {url}") from err
            raise UnavailableError(f"cannot read {url}") from err
        except (requests.RequestException, OSError) as err:
            raise UnavailableError(f"cannot read {url}") from err

    def _limited(self, answer: requests.Response, url: str) -> bytes:
        data = bytearray()
        for piece in answer.iter_content(PIECE_BYTES):
            data += piece
            if len(data) > self._document_max_bytes:
                raise TooLargeError(f"document at {url} is larger than {self._document_max_bytes} bytes")
        return bytes(data)


def _never_answered(err: BaseException) -> bool:
    """Whether the connection was refused or the host has no address: waiting a second changes nothing."""
    return any(word in str(err) for word in ("Connection refused", "NewConnectionError", "NameResolutionError"))


def check_status(status: int, url: str) -> None:
    """Our error for an HTTP status that is not 200 (or 206)."""
    if status in {200, 206}:
        return
    if status in {404, 410}:
        raise NotFoundError(f"{url} is not there")
    kind: type[MistifyError] = NotPermittedError if status in {401, 403} else UnavailableError
    raise kind(f"{url} answered with status {status}")


class FileSource:
    """A directory."""

    def __init__(self, directory: Path, description: str = "", *, document_max_bytes: int = DOCUMENT_MAX_BYTES) -> None:
        self.directory = directory
        self.description = description or f"file://{directory}"
        self._document_max_bytes = document_max_bytes

    def url(self, path: str) -> str:
        """The full URL of a path."""
        return join_url(f"file://{self.directory}", path)

    def fetch(self, path: str) -> Fetched:
        """Read a whole document."""
        file = self.directory / check_path(path)
        with os_errors(f"cannot read {file}"):
            if file.stat().st_size > self._document_max_bytes:
                raise TooLargeError(f"document {file} is larger than {self._document_max_bytes} bytes")
            return Fetched(file.read_bytes(), self.url(path))


class MemorySource:
    """Documents by path, in memory."""

    def __init__(
        self, documents: Mapping[str, bytes], description: str = "memory", base: str = "test://memory"
    ) -> None:
        self.documents = documents
        self.description = description
        self.base = base

    def url(self, path: str) -> str:
        """The full URL of a path."""
        return join_url(self.base, path)

    def fetch(self, path: str) -> Fetched:
        """Read a whole document."""
        url = self.url(check_path(path))
        if path not in self.documents:
            raise NotFoundError(f"{url} is not there")
        return Fetched(self.documents[path], url)


def open_source(text: str, description: str = "") -> HttpSource | FileSource:
    """The source a person writes as http(s) URL, file URL or directory; InvalidArgumentError for anything else."""
    parts = urlsplit(text)
    if parts.scheme in {"http", "https"}:
        return HttpSource(text, description)
    if parts.scheme == "file":
        return FileSource(Path(unquote(parts.path)), description or text)
    if text.startswith(("/", "./", "../")):
        return FileSource(Path(text).absolute(), description)
    raise InvalidArgumentError(f"not a source: {text[:200]!r} (want an http, https or file URL, or a directory)")
