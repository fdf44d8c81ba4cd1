"""HTTP of derived images: which form a request asks for, and ``GET /images/{id}/chunks``."""

from __future__ import annotations

from aiohttp import hdrs, web

from image_service.derive import Deriver
from image_service.derive_forms import Form
from image_service.serving import headers_of, plan
from imaging.blobs.base import BlobInfo
from imaging.errors import InvalidArgumentError, InvalidNameError, NotFoundError
from imaging.names import ImageId
from imaging.threads import Offload

_PARAMETERS = ("format", "compression", "from")

PACKED = "application/octet-stream"
"""A chunk list without words: the sha256 of each chunk, 32 bytes each, a quarter of the JSON. Given to whoever accepts it by name."""

CHUNK_SIZE_HEADER = "X-Chunk-Size"
BLOB_SIZE_HEADER = "X-Blob-Size"
"""What else a packed list says: the size of each chunk but the last, and of all together."""


def read_form(request: web.Request) -> Form:
    """The form a request asks for; InvalidArgumentError."""
    for name in _PARAMETERS:
        if len(request.query.getall(name, [])) > 1:
            raise InvalidArgumentError(f"{name} is given more than once")
    return Form.parse(request.query)


class DerivedEndpoints:
    """Handlers that need a :class:`Deriver`."""

    def __init__(self, deriver: Deriver, offload: Offload) -> None:
        self._deriver = deriver
        self._offload = offload

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        app.router.add_get("/images/{id}/chunks", self.chunks)

    async def find_blob(self, request: web.Request) -> BlobInfo:
        """The blob a request for ``/images/{id}/...`` and its query name."""
        form = read_form(request)
        try:
            image_id = ImageId.parse(request.match_info["id"]).text
        except InvalidNameError as err:
            raise NotFoundError("not found") from err
        return await self._deriver.get_blob(image_id, form)

    async def chunks(self, request: web.Request) -> web.Response:
        """GET and HEAD /images/{id}/chunks: the chunks of what ``/download`` with the same query serves, under the same ETag.

        As JSON, or packed for whoever accepts ``application/octet-stream``.
        """
        info = await self.find_blob(request)
        chosen = plan(hdrs.METH_HEAD, request.headers, info)
        headers = headers_of(chosen, info)
        if chosen.status != web.HTTPOk.status_code:
            return web.Response(status=chosen.status, headers=headers)
        chunks = await self._deriver.get_chunks(info)
        for name in (hdrs.CONTENT_LENGTH, hdrs.CONTENT_TYPE, hdrs.ACCEPT_RANGES, "Repr-Digest"):
            headers.pop(name, None)  # those are of the blob
        headers |= {
            hdrs.VARY: hdrs.ACCEPT,
            CHUNK_SIZE_HEADER: str(chunks.chunk_bytes),
            BLOB_SIZE_HEADER: str(chunks.size_bytes),
        }
        if PACKED in request.headers.get(hdrs.ACCEPT, ""):
            return web.Response(body=chunks.packed, headers=headers, content_type=PACKED)
        body = await self._offload(chunks.to_json)
        return web.Response(body=body, headers=headers, content_type="application/json")
