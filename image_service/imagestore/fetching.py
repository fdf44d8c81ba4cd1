"""Downloader: app container images from URLs, asked for only when they may have changed, continued where they broke off.

What a URL gave is a remote: within its max-age nobody is asked; later the source is asked with the ETag, and "not modified" renews the
remote. A download that breaks leaves its file; the next one continues it with ``Range`` and ``If-Range``, so that a source that changed
begins anew.

With keys nothing counts without a good signature over the bytes as they came: ``X.aci.asc`` beside ``X.aci``. A source may say that it is
not ready yet (202); then the image is fetched first, and the signature once more after it.

Names are looked up (:mod:`image_service.imagestore.discovery`), and dependencies may be fetched as well, breadth first, each once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import requests
import urllib3

from image_service.imagestore.discovery import find_image_urls
from image_service.imagestore.infos import Remote
from image_service.imagestore.keys import PREFIX
from image_service.imagestore.spool import Temporary
from image_service.imagestore.steps import step
from image_service.imagestore.store import ImageStore
from imaging.aci import AppName, Dependency
from imaging.errors import (
    BadDataError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    NotPermittedError,
    TooLargeError,
    UnavailableError,
)
from imaging.files import os_errors, write_all
from imaging.simplestreams.signing import Verifier

CONNECT_TIMEOUT_S = 10.0
"""A TCP and TLS handshake to the far side of the world takes one second."""

STALL_TIMEOUT_S = 60.0
"""No byte for so long: the connection is dead, whatever it says."""

REDIRECTS_MAX = 10

DOWNLOAD_MAX_BYTES = 256 << 30
"""As long as the longest image may be unpacked."""

PIECE_BYTES = 1 << 20

MAX_AGE_MAX_S = 10 * 365 * 86400
"""Longer is for ever, and must fit into a record."""

SIGNATURE_MAX_BYTES = 64 << 10
"""An armoured signature has less than one kilobyte, and there may be several."""

DEPENDENCIES_MAX = 1000
"""Far more than any image is laid over."""

_NEVER = "unable to fetch: the image is not in the store and the pull policy is never"

_MAX_AGE = re.compile(r"max-age=(0|[1-9]\d*)\Z", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)\Z", re.ASCII)


class PullPolicy(StrEnum):
    """When the source is asked."""

    NEW = "new"
    """If the store knows nothing of the URL."""
    UPDATE = "update"
    """If what is known is older than it may be."""
    NEVER = "never"


def parse_max_age(cache_control: str) -> int:
    """Seconds for which an answer may be believed; of several directives the last one counts."""
    max_age_s = 0
    for directive in cache_control.split(","):
        text = directive.strip().lower()
        if text in {"no-store", "no-cache"}:
            max_age_s = 0
        elif match := _MAX_AGE.match(text):
            max_age_s = min(int(match[1]), MAX_AGE_MAX_S)
    return max_age_s


def use_cached(download_time_ns: int, max_age_s: int, now_ns: int) -> bool:
    """Whether an answer of that time is still fresh."""
    return max_age_s > 0 and (now_ns - download_time_ns) // 10**9 < max_age_s


def signature_url(url: str) -> str:
    """Where the signature of the image at a URL is: beside it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path}.asc"))


def check_signature(verifier: Verifier, path: Path, signature: bytes, what: str) -> None:
    """BadDataError unless the signature is over the file as it is here."""
    try:
        verifier.verify_detached_file(path, signature)
    except BadDataError as err:
        raise BadDataError(f"cannot trust {what[:300]}: {err.message}") from err


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of asking. Without a key the source said that nothing changed."""

    key: str | None
    headers: Mapping[str, str]


class Downloader:
    """Fetches into a store; one per thread."""

    def __init__(
        self, store: ImageStore, session: requests.Session | None = None, *, verifier: Verifier | None = None
    ) -> None:
        self._store = store
        self._verifier = verifier
        self._session = session or requests.Session()
        self._session.max_redirects = REDIRECTS_MAX

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def fetch_name(self, app: AppName, *, policy: PullPolicy = PullPolicy.UPDATE, latest: bool | None = None) -> str:
        """The key of the image of a name and labels, from the first address that has it; it must be called so.

        Asked for without a version, it is marked the latest.
        """
        if policy is not PullPolicy.UPDATE:
            with suppress(NotFoundError):
                return self._store.get_aci(app.name, app.labels)
        if policy is PullPolicy.NEVER:
            raise NotFoundError(_NEVER)
        failure: MistifyError | None = None
        marked = latest if latest is not None or "version" in app.labels else True
        for url in find_image_urls(app, self._session):
            try:
                return self.fetch(url, latest=marked, name=app.name)
            except NotFoundError as err:
                failure = failure or err
        assert failure is not None  # there is at least one address
        raise failure

    def fetch_dependencies(self, key: str, *, policy: PullPolicy = PullPolicy.NEW) -> list[str]:
        """Keys of everything the image is laid over, breadth first, each once; fetched as far as the store lacks it."""
        found: list[str] = []
        waiting = [key]
        while waiting:
            for dependency in self._store.get_image_manifest(waiting.pop(0)).dependencies:
                got = self._fetch_dependency(dependency, policy)
                if got not in {key, *found}:
                    found.append(got)
                    waiting.append(got)
                if len(found) > DEPENDENCIES_MAX:
                    raise BadDataError(f"an image has more than {DEPENDENCIES_MAX} dependencies")
        return found

    def _fetch_dependency(self, dependency: Dependency, policy: PullPolicy) -> str:
        """By its id if it has one: another image of the same name is not it."""
        if dependency.image_id:
            with suppress(NotFoundError):
                return self._store.resolve_key(dependency.image_id)
        labels = {label.name: label.value for label in dependency.labels or ()}
        key = self.fetch_name(
            AppName(dependency.image_name, labels), policy=PullPolicy.UPDATE if dependency.image_id else policy
        )
        if dependency.image_id and self._store.get_aci_info(key).image_id != dependency.image_id:
            raise BadDataError(f"image {dependency.image_name} is {key}, not {dependency.image_id}")
        return key

    def fetch(
        self, url: str, *, policy: PullPolicy = PullPolicy.UPDATE, latest: bool | None = None, name: str = ""
    ) -> str:
        """The key of the image at ``url``. NotFoundError, NotPermittedError, UnavailableError; what an import refuses."""
        if not url.startswith(("http://", "https://")):
            raise InvalidArgumentError(f"not an http or https URL: {url[:300]!r}")
        remote = self._find_usable(url, name)
        if remote is not None and self._is_enough(remote, policy):
            return remote.blob_key
        if policy is PullPolicy.NEVER:
            raise NotFoundError(_NEVER)
        answer = self._ask(url, remote.etag if remote else "", latest, name)
        if answer.key is None and remote is not None:
            self._store.save_remote(self._renewed(remote, answer.headers))
            return remote.blob_key
        if answer.key is None:
            raise BadDataError("bad HTTP status code: 304")
        self._store.save_remote(self._renewed(Remote(url, self._signature_url(url), "", answer.key), answer.headers))
        return answer.key

    def _signature_url(self, url: str) -> str:
        """Where the signature is, if one is wanted."""
        return signature_url(url) if self._verifier is not None else ""

    def _find_usable(self, url: str, name: str) -> Remote | None:
        """What is known of a URL, if the image is still there; with keys only if its signature was checked."""
        remote = self._store.infos.find_remote(url)
        info = self._store.infos.find(remote.blob_key) if remote is not None else None
        if remote is None or info is None or name not in {"", info.name}:
            return None
        return remote if self._verifier is None or remote.sig_url == signature_url(url) else None

    def _is_enough(self, remote: Remote, policy: PullPolicy) -> bool:
        if policy is not PullPolicy.UPDATE:
            return True
        return use_cached(remote.download_time_ns, remote.cache_max_age_s, self._store.now_ns())

    def _renewed(self, remote: Remote, headers: Mapping[str, str]) -> Remote:
        return replace(
            remote,
            etag=headers.get("ETag", remote.etag),
            cache_max_age_s=parse_max_age(headers.get("Cache-Control", "")),
            download_time_ns=self._store.now_ns(),
        )

    # -- one download --------------------------------------------------------------------------------------------------

    def _ask(self, url: str, etag: str, latest: bool | None, name: str) -> _Answer:  # noqa: FBT001  passed on
        signature = self._find_signature(url)
        file_name = f"{PREFIX}{hashlib.sha512(url.encode()).hexdigest()[:64]}"
        with self._store.tmp_named_file(file_name) as partial:
            validator = partial.path.with_name(f"{partial.path.name}.validator")
            headers = self._download(url, etag, partial, _Validator(validator))
            if headers[0] == requests.codes.not_modified:
                return _Answer(None, headers[1])
            try:
                self._check_signature(url, partial.path, signature)
                with os_errors("cannot read the download"), partial.path.open("rb", buffering=0) as source:
                    key = self._store.write_aci(
                        source, latest=latest, name=name
                    )  # its errors pass: they are told as an import's
            finally:  # whole but refused, or imported: either way nothing to continue
                partial.path.unlink(missing_ok=True)
                validator.unlink(missing_ok=True)
            return _Answer(key, headers[1])

    def _find_signature(self, url: str) -> bytes | None:
        """The signature; None if none is wanted, or the source says that it is not ready."""
        if self._verifier is None:
            return None
        with self._answer(signature_url(url), {"Accept-Encoding": "identity"}) as answer:
            if answer.status_code == requests.codes.accepted:
                return None
            if answer.status_code == requests.codes.not_found:
                raise NotFoundError(f"no signature at {signature_url(url)[:300]}")
            _check_status(answer.status_code)
            data = answer.raw.read(SIGNATURE_MAX_BYTES + 1, decode_content=False)
        if len(data) > SIGNATURE_MAX_BYTES:
            raise TooLargeError(f"the signature is larger than {SIGNATURE_MAX_BYTES} bytes")
        return bytes(data)

    def _check_signature(self, url: str, path: Path, signature: bytes | None) -> None:
        if self._verifier is None:
            return
        signature = signature or self._find_signature(url)
        if signature is None:
            raise UnavailableError(f"the signature at {signature_url(url)[:300]} is not ready yet")
        check_signature(self._verifier, path, signature, url)

    def _download(
        self, url: str, etag: str, partial: Temporary, validator: _Validator
    ) -> tuple[int, Mapping[str, str]]:
        """Fill the file; the answer's status and headers."""
        offset = os.fstat(partial.fd).st_size
        known = validator.load() if offset else ""
        wanted = {"Accept-Encoding": "identity"}
        if known:
            wanted |= {"Range": f"bytes={offset}-", "If-Range": known}
        elif etag:
            wanted["If-None-Match"] = etag
        with self._answer(url, wanted) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable and known:
                validator.forget()
                return self._download(url, etag, partial, validator)
            if answer.status_code == requests.codes.not_modified:
                partial.path.unlink(missing_ok=True)
                return answer.status_code, answer.headers
            _check_status(answer.status_code)
            begin = _begin(answer, offset if known else 0)
            validator.save(answer.headers)
            self._fill(answer, partial, begin)
            return answer.status_code, answer.headers

    @contextmanager
    def _answer(self, url: str, headers: Mapping[str, str]) -> Iterator[requests.Response]:
        try:
            with self._session.get(
                url, headers=dict(headers), stream=True, timeout=(CONNECT_TIMEOUT_S, STALL_TIMEOUT_S)
            ) as answer:
                yield answer
        except requests.TooManyRedirects as err:
            raise BadDataError(f"more than {REDIRECTS_MAX} redirects from {url[:300]}") from err
        except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
            raise UnavailableError(f"cannot fetch {url[:300]}") from err

    def _fill(self, answer: requests.Response, partial: Temporary, begin: int) -> None:
        with os_errors("cannot write the download"):
            os.ftruncate(partial.fd, begin)
        offset, expected = begin, answer.headers.get("Content-Length", "")
        while piece := answer.raw.read(PIECE_BYTES, decode_content=False):
            if offset + len(piece) > DOWNLOAD_MAX_BYTES:
                raise TooLargeError(f"the download is longer than {DOWNLOAD_MAX_BYTES} bytes")
            with step("cannot write the download"):
                write_all(partial.fd, piece, offset)
            offset += len(piece)
        if expected.isdigit() and offset - begin < int(expected):
            raise UnavailableError(f"the download broke off after {offset} bytes")


class _Validator:
    """What a later ``If-Range`` may say, in a file beside the partial download."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> str:
        """The validator, empty if there is none; the download begins anew then."""
        with os_errors("cannot read the download"):
            return self._path.read_text("latin-1") if self._path.exists() else ""

    def save(self, headers: Mapping[str, str]) -> None:
        """Keep a strong ETag or, without one, the date."""
        etag = headers.get("ETag", "")
        text = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
        with os_errors("cannot write the download"):
            self._path.write_text(text, "latin-1")

    def forget(self) -> None:
        """Begin anew."""
        with os_errors("cannot write the download"):
            self._path.unlink(missing_ok=True)


def _begin(answer: requests.Response, offset_bytes: int) -> int:
    """Where the body belongs: 206 must begin where we are, 200 is everything."""
    if answer.status_code != requests.codes.partial_content:
        return 0
    match = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != offset_bytes:
        raise BadDataError("the source answered with another range than was asked for")
    return offset_bytes


_STATUS_ERRORS: dict[int, type[MistifyError]] = {
    401: NotPermittedError,
    403: NotPermittedError,
    404: NotFoundError,
    408: UnavailableError,
    410: NotFoundError,
    425: UnavailableError,
    429: UnavailableError,
}


def _check_status(status: int) -> None:
    if status in {200, 206}:
        return
    kind = _STATUS_ERRORS.get(status, UnavailableError if status >= 500 else BadDataError)
    raise kind(f"bad HTTP status code: {status}")
