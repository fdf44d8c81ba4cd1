"""One file of a catalogue into a directory: resumed, bounded by the size the catalogue gives, verified, then visible.

``NAME.part`` beside the target holds what is here so far; the next attempt, in this process or after a crash, hashes it and asks for
the rest. A source that answers with the whole file makes it start anew. What is too long or has another digest is BadDataError and is
not kept. Existing targets are left alone if their size is right: their content never changes.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import requests
import urllib3

from imaging.digests import Digest, MultiHasher
from imaging.errors import BadDataError, UnavailableError
from imaging.files import make_directory, os_errors, publish
from imaging.simplestreams.paths import check_path, join_url
from imaging.simplestreams.sources import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, FileSource, HttpSource, check_status
from imaging.simplestreams.tree import StreamItem

PIECE_BYTES = 1 << 20
FAILURES_MAX = 5
"""Attempts in a row that brought no byte: with the pauses between them half a minute."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-")


Body = AbstractContextManager[tuple[int, Iterator[bytes]]]
"""Where the bytes begin, and the bytes in pieces."""


class ItemSource(Protocol):
    """Where the files of a catalogue are."""

    def open(self, path: str, offset_bytes: int) -> Body:
        """The bytes from an offset on, or from the start."""


class HttpItems:
    """Files of a web server."""

    def __init__(self, base: str, session: requests.Session | None = None) -> None:
        self._base = base
        self._session = session or requests.Session()

    @contextmanager
    def open(self, path: str, offset_bytes: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes from an offset on, or from the start if the server knows no ranges."""
        url = join_url(self._base, check_path(path))
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset_bytes}-"} if offset_bytes else {})
        try:
            with self._session.get(
                url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
            ) as answer:
                if answer.status_code == 416:  # what is here is as long as all there is, or longer
                    yield 0, iter(())
                    return
                check_status(answer.status_code, url)
                # Not iter_content: it gathers whole pieces, and forgets a half one when the connection breaks.
                yield _begin(answer), iter(lambda: answer.raw.read1(PIECE_BYTES), b"")
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as err:
            raise UnavailableError(f"cannot read {url}") from err


def _begin(answer: requests.Response) -> int:
    """Where an answer begins."""
    match = _CONTENT_RANGE.match(answer.headers.get("Content-Range", "")) if answer.status_code == 206 else None
    return int(match[1]) if match else 0


class FileItems:
    """Files of a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def open(self, path: str, offset_bytes: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes from an offset on."""
        file = self._directory / check_path(path)
        with os_errors(f"cannot read {file}"), file.open("rb") as source:
            source.seek(offset_bytes)
            yield offset_bytes, iter(lambda: source.read(PIECE_BYTES), b"")


def items_of(source: HttpSource | FileSource) -> ItemSource:
    """Where the files of a tree are whose documents come from ``source``."""
    return HttpItems(source.base) if isinstance(source, HttpSource) else FileItems(source.directory)


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


class Transfer:
    """Brings files; see the module's docstring."""

    def __init__(self, source: ItemSource, *, pause: Callable[[float], None] = _pause) -> None:
        self._source = source
        self._pause = pause
        self.received_bytes = 0

    def bring(self, item: StreamItem, target: Path) -> bool:
        """Ensure the item is at ``target``; False if it was. BadDataError, NotFoundError, UnavailableError, NoSpaceError."""
        size, digest = item.size_bytes, item.digest
        with os_errors(f"cannot look at {target}"):
            if target.is_file() and target.stat().st_size == size:
                return False
        make_directory(target.parent)
        part = target.with_name(f"{target.name}.part")
        failures = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                self._attempt(item.path, part, size, digest)
            except UnavailableError:
                failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
                if failures >= FAILURES_MAX:
                    raise
                self._pause(2.0**failures)
            else:
                publish(part, target)
                return True

    def _attempt(self, path: str, part: Path, size: int, digest: Digest) -> None:
        with os_errors(f"cannot write {part}"):
            file = part.open("a+b")
        with file:
            try:
                self._fill(file, path, size, digest)
            except BadDataError:
                part.unlink(missing_ok=True)
                raise

    def _fill(self, file: BinaryIO, path: str, size: int, digest: Digest) -> None:
        hasher = _hash(file, digest.algorithm)
        if hasher.size_bytes > size:
            file.truncate(0)
            hasher = _hash(file, digest.algorithm)
        if hasher.size_bytes < size:
            hasher = self._receive(file, path, size, hasher, digest.algorithm)
        with os_errors(f"cannot write {path}"):
            file.flush()
            os.fsync(file.fileno())
        if hasher.size_bytes < size:
            raise UnavailableError(f"{path} ended after {hasher.size_bytes} of {size} bytes")
        if not hasher.digest(digest.algorithm).matches(digest):
            raise BadDataError(f"{path} is {hasher.digest(digest.algorithm)}, its catalogue says {digest}")

    def _receive(self, file: BinaryIO, path: str, size: int, hasher: MultiHasher, algorithm: str) -> MultiHasher:
        with self._source.open(path, hasher.size_bytes) as (begin, pieces):
            if begin != hasher.size_bytes:
                if begin:
                    raise BadDataError(f"{path} was sent from byte {begin}, not {hasher.size_bytes}")
                file.truncate(0)
                hasher = MultiHasher((algorithm,))
            for piece in pieces:
                if hasher.size_bytes + len(piece) > size:
                    raise BadDataError(f"{path} is longer than the {size} bytes its catalogue says")
                with os_errors(f"cannot write {path}"):
                    file.write(piece)
                hasher.update(piece)
                self.received_bytes += len(piece)
        return hasher


def _hash(file: BinaryIO, algorithm: str) -> MultiHasher:
    """The digest of what the file holds so far."""
    hasher = MultiHasher((algorithm,))
    with os_errors("cannot read a partial file"):
        file.seek(0)
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher


def verify_file(item: StreamItem, path: Path) -> None:
    """BadDataError unless the file is what the catalogue says."""
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        hasher = _hash(file, item.digest.algorithm)
    if hasher.size_bytes != item.size_bytes or not hasher.digest(item.digest.algorithm).matches(item.digest):
        raise BadDataError(f"{path} is not what its catalogue says")
