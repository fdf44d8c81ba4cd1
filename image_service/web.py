"""The image service's HTTP endpoints: reading requests, writing answers, nothing else.

Errors are JSON: ``{"message"}`` for 400 and otherwise ``{"message", "code", "stack"}`` with the HTTP status as code and an empty stack, as
existing clients know them. Headers of ours: ``X-Image-Digest: sha256:<hex>`` on downloads (of the whole blob, also on a range) and, if the
client knows it, on uploads, which are then refused with 422 if they are something else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
from aiohttp import hdrs, web

from image_service.bodies import Bodies
from image_service.derive_web import DerivedEndpoints
from image_service.lifecycle import UNKNOWN_SIZE, Image, ImageType
from image_service.said import (
    TYPE_HEADER,
    Wanted,
    details_of_headers,
    details_of_request,
    expected_of,
    expected_of_request,
    parse_size,
)
from image_service.service import ImageService
from image_service.serving import send_blob
from image_service.spool import Pools
from imaging.blobs.base import BlobStore
from imaging.errors import InvalidArgumentError, InvalidNameError, NotFoundError
from imaging.names import ImageId
from rpc.messages import ZERO_TIME, FetchRequest, ImageRecord, from_wire

BODY_TIMEOUT_S = 30.0
"""A request body of up to a megabyte over the slowest sane link."""


PAGE_MAX = 1000
"""Records of a page: about a megabyte."""

WAIT_MAX_S = 120
"""Longer than this a proxy between would hang up."""


@dataclass(frozen=True, slots=True)
class WebLimits:
    """Limits on connections."""

    upload_stall_timeout_s: float = 60.0
    """An upload that brings no byte for so long is given up."""


def render_error(status: int, message: str, _code: str) -> web.Response:
    """The answer to a failed request; see the module's docstring."""
    body: dict[str, Any] = {"message": message}
    if status != web.HTTPBadRequest.status_code:
        body |= {"code": status, "stack": []}
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


def to_record(image: Image, same_as: Sequence[str] = ()) -> ImageRecord:
    """A record as the wire shows it."""
    return ImageRecord(
        id=image.id,
        source=image.source,
        type=image.type.value,
        comment=image.comment,
        status=image.status.value,
        size_bytes=image.size_bytes,
        expected_size_bytes=image.expected_size_bytes,
        download_start=image.download_start or ZERO_TIME,
        download_end=image.download_end or ZERO_TIME,
        digest=image.digest,
        format=image.format,
        compression=image.compression,
        virtual_size_bytes=image.virtual_size_bytes,
        content_digest=image.content_digest,
        unpacked_digest=image.unpacked_sha256,
        unpacked_sha512=image.unpacked_sha512,
        unpacked_size_bytes=image.unpacked_size_bytes,
        same_as=list(same_as),
        name=image.name,
        version=image.version,
        origin=image.origin,
        error=image.error,
        labels=image.labels,
    )


def _json(status: int, value: Any) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _image_id(request: web.Request) -> str:
    """The id in the path. One that can't be an id belongs to no image."""
    try:
        return ImageId.parse(request.match_info["id"]).text
    except InvalidNameError as err:
        raise NotFoundError("not found") from err


def _limit(request: web.Request) -> int | None:
    """How many a page holds; None if no page was asked for: then everything is shown, as it has always been."""
    text = request.query.get("limit")
    if text is None:
        return PAGE_MAX if "after" in request.query else None
    limit = parse_size(text)
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidArgumentError(f"limit must be from 1 to {PAGE_MAX}")
    return limit


def wait_of(preferences: Sequence[str]) -> int:
    """The seconds of ``wait`` in Prefer headers (RFC 7240), bounded; 0 if there is none that makes sense."""
    for preference in ",".join(preferences).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        digits = value.strip().strip('"')
        if name.strip().lower() == "wait" and digits.isascii() and digits.isdigit():
            return min(int(digits[:9]), WAIT_MAX_S)
    return 0


def _event(name: str, data: bytes) -> bytes:
    """A server-sent event; JSON has no line breaks."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class ImageEndpoints:
    """The handlers of ``/images``."""

    def __init__(
        self, service: ImageService, blobs: BlobStore, pools: Pools, limits: WebLimits, derived: DerivedEndpoints
    ) -> None:
        self._service = service
        self._derived = derived
        self._blobs = blobs
        self._pools = pools
        self.bodies = Bodies(limits.upload_stall_timeout_s)
        """Request bodies, for uploads of every kind."""

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        self.bodies.add_to(app)
        router = app.router
        router.add_get("/images", self.list)
        router.add_post("/images", self.create)
        router.add_put("/images", self.upload, expect_handler=_expect_nothing_yet)
        router.add_get("/images/{id}", self.get)
        router.add_delete("/images/{id}", self.delete)
        router.add_get("/images/{id}/download", self.download)
        router.add_get("/images/{id}/events", self.events, allow_head=False)
        router.add_route("*", "/images{rest:(?:/[^/]+)*}/", _without_slash)

    async def list(self, request: web.Request) -> web.Response:
        """GET /images: all that fit, or a page of them."""
        wanted, after, limit = Wanted.parse(request.query), request.query.get("after", ""), _limit(request)
        images, more = await self._service.page(wanted.fits, after_id=after, limit=limit)
        twins = await self._service.twins(images)
        response = _json(200, [to_record(image, twins[image.id]) for image in images])
        if more:
            following = request.rel_url.update_query(after=images[-1].id)
            response.headers[hdrs.LINK] = f'<{following}>; rel="next"'
        return response

    async def create(self, request: web.Request) -> web.Response:
        """POST /images."""
        wanted = await _read_fetch_request(request)
        if not wanted.source:
            raise InvalidArgumentError("missing image source")
        image_type = ImageType.parse(wanted.type, "invalid image type")
        image = await self._service.create(
            wanted.source, image_type, details_of_request(wanted), expected_of_request(wanted)
        )
        return _json(202, to_record(image))

    async def upload(self, request: web.Request) -> web.Response:
        """PUT /images."""
        image_type = ImageType.parse(request.headers.get(TYPE_HEADER), f"invalid {TYPE_HEADER} header")
        length = request.content_length
        async with contextlib.aclosing(self.bodies.pieces(request)) as pieces:
            image = await self._service.upload(
                image_type,
                pieces,
                length_bytes=UNKNOWN_SIZE if length is None else length,
                details=details_of_headers(request.headers),
                expected=expected_of(request.headers),
            )
        return _json(200, to_record(image))

    async def get(self, request: web.Request) -> web.Response:
        """GET /images/{id}; with ``Prefer: wait=SECONDS`` when it is complete or has failed, or that time is over."""
        image_id, wait_s = _image_id(request), wait_of(request.headers.getall("Prefer", []))
        image = await self._service.get(image_id)
        if wait_s:
            image = await self._wait(image, wait_s)
        response = _json(200, to_record(image, (await self._service.twins([image]))[image.id]))
        if wait_s:
            response.headers["Preference-Applied"] = f"wait={wait_s}"
        return response

    async def _wait(self, image: Image, wait_s: int) -> Image:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), contextlib.aclosing(self._service.watch(image.id)) as changes:
                async for changed in changes:
                    image = changed
        return image

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /images/{id}/events: the record as a server-sent event, now and whenever it changes, until it is complete or has failed."""
        image_id = _image_id(request)
        await self._service.get(image_id)  # an unknown one is refused before the stream begins
        response = web.StreamResponse(
            headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        async with contextlib.aclosing(self._service.watch(image_id)) as changes:
            try:
                async for image in changes:
                    await response.write(_event(image.status.value, msgspec.json.encode(to_record(image))))
            except NotFoundError:
                await response.write(_event("deleted", msgspec.json.encode({"id": image_id})))
        await response.write_eof()
        return response

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /images/{id}."""
        return _json(200, to_record(await self._service.delete(_image_id(request))))

    async def download(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD /images/{id}/download, in the form the query asks for."""
        info = await self._derived.find_blob(request)
        return await send_blob(request, self._blobs, info, self._pools.data)


async def _expect_nothing_yet(request: web.Request) -> web.StreamResponse | None:
    """``100 Continue`` is sent when the upload has been admitted (:meth:`Bodies.pieces`), so that a refused one is never sent."""
    expectation = request.headers.get(hdrs.EXPECT, "")
    if expectation.lower() == "100-continue":
        return None
    return render_error(417, f"unknown expectation {expectation[:64]!r}", "")


async def _without_slash(request: web.Request) -> NoReturn:
    target = request.rel_url
    query = f"?{target.raw_query_string}" if target.raw_query_string else ""
    raise web.HTTPMovedPermanently(target.raw_path.rstrip("/") + query)


async def _read_fetch_request(request: web.Request) -> FetchRequest:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError as err:
        raise web.HTTPRequestTimeout(reason=f"No body within {BODY_TIMEOUT_S:g} s") from err
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise InvalidArgumentError(f"invalid JSON: {err}") from err
    return from_wire(FetchRequest, value)
