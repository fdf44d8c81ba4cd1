"""What the agent asks the image service before it fetches: what the image is, and the chunks of the form that suits it.

A server that is no image service of ours (or an older one) answers something else to these questions; the image is then fetched as from
any other source.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import quote, urlencode

import msgspec
import requests
import urllib3

from agent_image.fetch_chunks import ChunkMap
from agent_image.fetch_http import CancelToken, FetchLimits, announced_digest, get_response, open_session, status_error
from agent_image.fetch_server import ImageServer
from imaging.digests import Digest
from imaging.errors import BadDataError, MistifyError, TooLargeError, UnavailableError, UnsupportedError

PATIENCE_S = 1800.0
"""How long to come again for a form that is still being made, before the image is taken as it is stored: 100 GiB at 60 MB/s."""

COME_AGAIN_MAX_S = 30.0
"""No longer between two tries, whatever the server says."""

RECORD_MAX_BYTES = 1 << 20
"""A record is a few hundred bytes; a comment and labels make it some ten thousand."""

LIST_MAX_BYTES = 32 << 20
"""A packed chunk list: for 4 TiB, as much as an image may have here."""

JSON_MAX_BYTES = 8 << 20
"""One in JSON, from a server that knows no other: for 256 GiB. It becomes some ten times as much in memory. The bytes of what is larger
are verified as a whole."""

PACKED = "application/octet-stream"
_ACCEPT = {"Accept": f"{PACKED}, application/json;q=0.9"}
"""Lists are best without words, a quarter as long."""

CHUNK_MAX_BYTES = 8 << 20
"""Larger chunks would take too much memory to hold before they are verified."""

_SIZE = re.compile(r"[0-9]{1,18}\Z")
_OWN_PATH = re.compile(r"/images/([^/?#]+)/download\Z")
_RETRYABLE_BY_PROXIES = frozenset({502, 504})

log = logging.getLogger(__name__)


class ServiceImage(msgspec.Struct, frozen=True, kw_only=True):
    """What the service says of an image; what else it says is ignored."""

    id: str
    status: str
    type: str = ""
    digest: str = ""
    """Of the stored bytes."""
    format: str = ""
    compression: str = ""
    virtual_size_bytes: int = msgspec.field(default=0, name="virtual_size")
    content_digest: str = ""
    """Of the disk."""
    name: str = ""
    version: str = ""
    origin: str = ""


class _Chunk(msgspec.Struct, frozen=True):
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Form:
    """A form of an image: where its bytes are, and where their chunks."""

    base_url: str
    image_id: str
    query: Mapping[str, str]

    @property
    def image_url(self) -> str:
        """The bytes as they are stored."""
        return Form(self.base_url, self.image_id, {}).download_url

    @property
    def download_url(self) -> str:
        """The bytes."""
        return self._url("download")

    @property
    def chunks_url(self) -> str:
        """Their chunks."""
        return self._url("chunks")

    def _url(self, what: str) -> str:
        query = f"?{urlencode(self.query)}" if self.query else ""
        return f"{self.base_url}/images/{quote(self.image_id, safe='')}/{what}{query}"


class ServiceQuestions:
    """Questions to the image service, for one fetch; blocking."""

    def __init__(self, server: ImageServer, limits: FetchLimits, cancel: CancelToken) -> None:
        self._server = server
        self._limits = limits
        self._cancel = cancel

    def find_image(self, url: str) -> tuple[str, ServiceImage] | None:
        """The service's base URL and its record of the image at ``url``; None if that is no complete image of the service."""
        base_url = self._server.base_url()
        match = _OWN_PATH.match(url.removeprefix(base_url)) if url.startswith(base_url) else None
        if match is None:
            return None
        try:
            status, body, _ = self._get(f"{base_url}/images/{match[1]}", RECORD_MAX_BYTES)
            image = msgspec.json.decode(body, type=ServiceImage) if status == requests.codes.ok else None
        except (MistifyError, msgspec.DecodeError) as err:
            self._cancel.check()
            log.info("the source is no image service, or does not answer", extra={"url": url, "cause": str(err)})
            return None
        if image is None or image.id != match[1] or image.status != "complete":
            return None
        return base_url, image

    def get_chunks(self, form: Form) -> ChunkMap:
        """The chunks of a form; waits while the service makes it.

        UnsupportedError if the service refuses or takes too long, BadDataError or TooLargeError if the list is of no use.
        """
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            status, body, headers = self._get(form.chunks_url, LIST_MAX_BYTES, _ACCEPT)
            if status == requests.codes.ok:
                return _chunk_map(form, body, headers)
            if status in _RETRYABLE_BY_PROXIES:
                raise status_error(status, form.chunks_url)
            if status not in {429, 503} or time.monotonic() > give_up_at:
                raise UnsupportedError(f"the image service has no such form: status {status}, url: {form.chunks_url}")
            self._cancel.wait(_delay_s(headers))

    def _get(
        self, url: str, size_max_bytes: int, asked: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, bytes, Mapping[str, str]]:
        self._cancel.check()
        headers = {**self._server.headers_for(url), **asked}
        with open_session() as session, get_response(session, url, headers, self._limits) as response:
            try:
                body = response.raw.read(size_max_bytes + 1, decode_content=True)
            except (urllib3.exceptions.HTTPError, OSError) as err:
                raise UnavailableError(f"the connection broke while asking for {url}") from err
            if len(body) > size_max_bytes:
                raise TooLargeError(f"the answer is longer than {size_max_bytes} bytes: {url}")
            return response.status_code, body, response.headers


def _delay_s(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "")
    return min(float(text), COME_AGAIN_MAX_S) if text.isdigit() else 1.0


def _chunk_map(form: Form, body: bytes, headers: Mapping[str, str]) -> ChunkMap:
    digest = announced_digest(headers)
    if digest is None:
        raise BadDataError(f"a chunk list without a digest: {form.chunks_url}")
    packed = headers.get("Content-Type", "").partition(";")[0].strip() == PACKED
    if not packed and len(body) > JSON_MAX_BYTES:
        raise TooLargeError(f"the chunk list is longer than {JSON_MAX_BYTES} bytes: {form.chunks_url}")
    found = _packed_map(digest, body, headers) if packed else _listed_map(digest, body)
    if found is None:
        raise BadDataError(f"not a chunk list, or one with gaps or chunks of other sizes: {form.chunks_url}")
    return found


def _packed_map(digest: Digest, body: bytes, headers: Mapping[str, str]) -> ChunkMap | None:
    """From digests alone, whose sizes the headers give; None if they do not fit each other."""
    sizes = [headers.get(name, "") for name in ("X-Blob-Size", "X-Chunk-Size")]
    if not all(_SIZE.match(text) for text in sizes):
        return None
    size_bytes, chunk_bytes = map(int, sizes)
    fits = 0 < chunk_bytes <= CHUNK_MAX_BYTES and len(body) == 32 * -(-size_bytes // chunk_bytes)
    return ChunkMap(digest, size_bytes, chunk_bytes, body) if fits else None


def _listed_map(digest: Digest, body: bytes) -> ChunkMap | None:
    """From JSON; None if it is not a list of one chunk behind the other, all of one size but the last."""
    try:
        chunks = msgspec.json.decode(body, type=list[_Chunk])
        packed = b"".join(bytes.fromhex(chunk.sha256) for chunk in chunks)
    except (msgspec.DecodeError, ValueError):
        return None
    chunk_bytes = chunks[0].length if chunks else 1
    found = ChunkMap(digest, sum(chunk.length for chunk in chunks), chunk_bytes, packed)
    right = 0 < chunk_bytes <= CHUNK_MAX_BYTES and len(packed) == 32 * len(chunks)
    right = right and all((chunk.offset, chunk.length) == found.place(n) for n, chunk in enumerate(chunks))
    return found if right else None
