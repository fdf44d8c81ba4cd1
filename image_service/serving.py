"""Sending a blob: which bytes the request's conditions ask for, and the bytes themselves by sendfile.

The entity tag is the digest, so it is strong, the same on every server, and ``If-Range`` with it is a proof. Conditions are weighed in
the order of RFC 9110, 13.2.2: If-Match, If-None-Match, then Range with If-Range. One range is served; a request for several gets
the whole, as the RFC allows.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aiohttp import hdrs, web

from image_service.collector import Collector
from image_service.said import DIGEST_HEADER
from image_service.spool import Pools
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import InvalidArgumentError, NotFoundError, from_os_error
from imaging.threads import Offload

SEGMENT_BYTES = 8 << 20
"""Sent in one call of sendfile: large enough that the calls cost nothing, small enough to notice a stalled reader."""

SEGMENT_TIMEOUT_S = 600.0
"""A reader that takes longer for a segment (below 14 kB/s) is gone, and its descriptor is given back."""

PIECE_BYTES = 1 << 20
"""Read at once from a store without local files."""

IMMUTABLE = "public, max-age=31536000, immutable"
"""What has its digest for a name never changes; a year is as long as caches count."""

_OF_THE_BODY = frozenset({hdrs.CONTENT_TYPE, hdrs.CONTENT_LENGTH, hdrs.CONTENT_RANGE})
"""Headers that a redirect, which has no body, does not have."""

_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*\Z")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to answer: a status, and which bytes."""

    status: int
    offset_bytes: int = 0
    count_bytes: int = 0


def entity_tag(digest: Digest) -> str:
    """The ETag of a blob, quotes included."""
    return f'"{digest}"'


def _names(condition: str, tag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags names ``tag``."""
    tags = [one.strip() for one in condition.split(",")]
    if weak:
        tags = [one.removeprefix("W/") for one in tags]
    return "*" in tags or tag in tags


def plan(method: str, headers: Mapping[str, str], info: BlobInfo) -> Plan:
    """What the request's conditions ask for."""
    tag, size = entity_tag(info.digest), info.size_bytes
    if hdrs.IF_MATCH in headers and not _names(headers[hdrs.IF_MATCH], tag, weak=False):
        return Plan(412)
    if hdrs.IF_NONE_MATCH in headers and _names(headers[hdrs.IF_NONE_MATCH], tag, weak=True):
        return Plan(304)
    whole = Plan(200, 0, size)
    if method != hdrs.METH_GET or headers.get(hdrs.IF_RANGE, tag).strip() != tag:
        return whole
    return _ranged(headers.get(hdrs.RANGE, ""), size) or whole


def _ranged(text: str, size: int) -> Plan | None:
    """The plan for a Range header; None if it is one to be ignored (malformed, several ranges, another unit)."""
    match = _RANGE.match(text)
    if match is None or match[1] == match[2] == "":
        return None
    if not match[1]:  # the last so many bytes
        count = min(int(match[2]), size)
        return Plan(206, size - count, count) if count else Plan(416)
    first, last = int(match[1]), int(match[2] or size)
    if match[2] and last < first:
        return None
    if first >= size:
        return Plan(416)
    return Plan(206, first, min(last + 1, size) - first)


def headers_of(chosen: Plan, info: BlobInfo) -> dict[str, str]:
    """The headers that say what is sent."""
    headers = {
        "ETag": entity_tag(info.digest),
        "Accept-Ranges": "bytes",
        DIGEST_HEADER: str(info.digest),
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(info.digest.hex)).decode()}:",
    }
    if chosen.status in {200, 206}:
        headers[hdrs.CONTENT_TYPE] = "application/octet-stream"
        headers[hdrs.CONTENT_LENGTH] = str(chosen.count_bytes)
    if chosen.status == 206:
        last = chosen.offset_bytes + chosen.count_bytes - 1
        headers[hdrs.CONTENT_RANGE] = f"bytes {chosen.offset_bytes}-{last}/{info.size_bytes}"
    if chosen.status == 416:
        headers[hdrs.CONTENT_RANGE] = f"bytes */{info.size_bytes}"
    return headers


class BlobEndpoints:
    """``/blobs/sha256:<hex>``: blobs by their own name, for caches."""

    def __init__(self, collector: Collector, blobs: BlobStore, pools: Pools) -> None:
        self._collector = collector
        self._blobs = blobs
        self._pools = pools

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        app.router.add_get("/blobs/{digest}", self.get)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD of a blob an image (or something derived from one) has."""
        try:
            digest = Digest.parse(request.match_info["digest"])
        except InvalidArgumentError as err:
            raise NotFoundError("not found") from err
        if digest.algorithm != "sha256" or not await self._pools.records(self._collector.is_shown, digest):
            raise NotFoundError("not found")
        info = await self._pools.data(self._blobs.info, digest)
        return await send_blob(request, self._blobs, info, self._pools.data, {hdrs.CACHE_CONTROL: IMMUTABLE})


async def send_blob(
    request: web.Request,
    blobs: BlobStore,
    info: BlobInfo,
    offload: Offload,
    more_headers: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    """Answer a GET or HEAD for a blob."""
    chosen = plan(request.method, request.headers, info)
    headers = headers_of(chosen, info) | dict(more_headers or {})
    if chosen.status not in {200, 206}:
        return web.Response(status=chosen.status, headers=headers)
    response = web.StreamResponse(status=chosen.status, headers=headers)
    if request.method == hdrs.METH_HEAD or not chosen.count_bytes:
        await response.prepare(request)
        return response
    url = await offload(blobs.redirect_url, info.digest)
    if url is not None:
        return _redirect(url, headers)
    path = await offload(blobs.path, info.digest)
    if path is None:
        await _send_pieces(request, response, blobs, info, chosen, offload)
    else:
        await _send_file(request, response, Path(path), chosen, offload)
    return response


def _redirect(url: str, headers: Mapping[str, str]) -> web.Response:
    """Let the client read from the store itself: it repeats its Range there. The address is good for it alone, and not for long."""
    told = {name: value for name, value in headers.items() if name not in _OF_THE_BODY}
    return web.Response(status=307, headers=told | {hdrs.LOCATION: url, hdrs.CACHE_CONTROL: "no-store"})


async def _open(path: Path, offload: Offload) -> BinaryIO:
    try:
        return await offload(path.open, "rb")
    except FileNotFoundError as err:
        raise NotFoundError("the image's data is gone") from err
    except OSError as err:
        raise from_os_error(err, "the image's data can't be opened") from err


async def _send_file(
    request: web.Request, response: web.StreamResponse, path: Path, chosen: Plan, offload: Offload
) -> None:
    file = await _open(path, offload)
    try:
        await response.prepare(request)
        with _cut_short(request):
            await _sendfile(request, file, chosen)
            await response.write_eof()
    finally:
        await offload(file.close)


async def _sendfile(request: web.Request, file: BinaryIO, chosen: Plan) -> None:
    """The kernel copies from the page cache to the socket; the loop only waits for room."""
    loop, offset = asyncio.get_running_loop(), chosen.offset_bytes
    end = offset + chosen.count_bytes
    while offset < end:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away")
        async with asyncio.timeout(SEGMENT_TIMEOUT_S):
            sent = await loop.sendfile(transport, file, offset, min(SEGMENT_BYTES, end - offset))
        if not sent:
            raise EOFError("the file is shorter than its blob")
        offset += sent


async def _send_pieces(
    request: web.Request,
    response: web.StreamResponse,
    blobs: BlobStore,
    info: BlobInfo,
    chosen: Plan,
    offload: Offload,
) -> None:
    """Read from the store on a thread and write to the socket."""
    opened = blobs.open(info.digest, offset_bytes=chosen.offset_bytes)
    file = await offload(opened.__enter__)
    try:
        await response.prepare(request)
        left = chosen.count_bytes
        with _cut_short(request):
            while left:
                piece = await offload(file.read, min(PIECE_BYTES, left))
                if not piece:
                    raise EOFError("the blob is shorter than its record")
                left -= len(piece)
                async with asyncio.timeout(SEGMENT_TIMEOUT_S):
                    await response.write(piece)
            await response.write_eof()
    finally:
        await offload(opened.__exit__, None, None, None)


@contextlib.contextmanager
def _cut_short(request: web.Request) -> Iterator[None]:
    """After the headers only the connection's end can tell the client that something is wrong: it then ends short."""
    try:
        yield
    except (OSError, EOFError) as err:  # TimeoutError is an OSError
        level = logging.INFO if isinstance(err, (ConnectionError, TimeoutError)) else logging.ERROR
        log.log(level, "download ended short: %s", err, extra={"path": request.path})
        if request.transport is not None:
            request.transport.abort()
