"""The catalogue's HTTP endpoints.

``/streams/v1/...`` are the documents, ``/files/<sha256>/<name>`` the files they name, ``/catalog/images[/<id>]`` shows and sets how images
appear. Documents named by their content never change and may be cached for ever; an index is asked for anew each time.
"""

from __future__ import annotations

import hashlib
import os
import re
from email.utils import formatdate
from pathlib import Path

import msgspec
from aiohttp import hdrs, web

from image_service.catalog import Catalog
from image_service.catalog_entries import CatalogLabels
from image_service.service import ImageService
from image_service.serving import send_blob
from image_service.spool import Pools
from imaging.blobs.base import BlobStore
from imaging.digests import Digest
from imaging.errors import InvalidArgumentError, InvalidNameError, NotFoundError
from imaging.files import os_errors
from imaging.names import ImageId
from rpc.server import read_body

FOREVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"

_DOCUMENT = re.compile(r"[A-Za-z0-9-][A-Za-z0-9.-]{0,200}\.(?:json|sjson|json\.gpg)\Z")
_INDEX = re.compile(r"index\.")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class CatalogEndpoints:
    """See the module's docstring."""

    def __init__(self, catalog: Catalog, service: ImageService, blobs: BlobStore, pools: Pools) -> None:
        self._catalog = catalog
        self._service = service
        self._blobs = blobs
        self._pools = pools

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        app.router.add_get("/streams/v1/{name}", self.document)
        app.router.add_get("/files/{sha256}/{name}", self.file)
        app.router.add_get("/catalog/images", self.list)
        app.router.add_get("/catalog/images/{id}", self.get)
        app.router.add_put("/catalog/images/{id}", self.put)
        app.on_shutdown.append(self._stop)

    async def _stop(self, _app: web.Application) -> None:
        self._catalog.stop()

    async def document(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD /streams/v1/{name}."""
        name = request.match_info["name"]
        if not _DOCUMENT.match(name):
            raise NotFoundError("not found")
        is_index = bool(_INDEX.match(name))
        if is_index:
            await self._catalog.refresh()
        data, modified_s = await self._read(name)
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {hdrs.ETAG: tag, hdrs.CACHE_CONTROL: ASK_AGAIN if is_index else FOREVER} | _modified(modified_s)
        conditions = {one.strip().removeprefix("W/") for one in request.headers.get(hdrs.IF_NONE_MATCH, "").split(",")}
        if conditions & {tag, "*"}:
            return web.Response(status=304, headers=headers)
        kind = "application/json" if name.endswith(".json") else "text/plain"
        return web.Response(body=data, headers=headers, content_type=kind, charset="utf-8")

    async def _read(self, name: str) -> tuple[bytes, float]:
        """A document; one that is not here may be in an index that another replica gave, and is built."""
        path = self._catalog.directory / "streams" / "v1" / name
        try:
            return await self._pools.data(_read, path)
        except NotFoundError:
            await self._catalog.refresh()
            return await self._pools.data(_read, path)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD /files/{sha256}/{name}."""
        sha256 = request.match_info["sha256"]
        if not _SHA256.match(sha256):
            raise NotFoundError("not found")
        info = await self._pools.data(self._blobs.info, Digest("sha256", sha256))
        return await send_blob(
            request, self._blobs, info, self._pools.data, {hdrs.CACHE_CONTROL: FOREVER} | _modified(info.created_s)
        )

    async def list(self, _request: web.Request) -> web.Response:
        """GET /catalog/images."""
        return _json([msgspec.to_builtins(entry) for entry in await self._catalog.entries()])

    async def get(self, request: web.Request) -> web.Response:
        """GET /catalog/images/{id}."""
        image = await self._service.get(_image_id(request))
        return _json(msgspec.to_builtins((await self._catalog.find_labels(image.id)).filled(image)))

    async def put(self, request: web.Request) -> web.Response:
        """PUT /catalog/images/{id}."""
        image = await self._service.get(_image_id(request))
        try:
            labels = msgspec.json.decode(await read_body(request), type=CatalogLabels)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            raise InvalidArgumentError(f"invalid labels: {err}") from err
        _check(labels)
        await self._catalog.put_labels(image.id, labels)
        return _json(msgspec.to_builtins(labels.filled(image)))


def _check(labels: CatalogLabels) -> None:
    """Names must not break the places they are written to: product ids (``:``), lists of aliases (``,``)."""
    for text in (labels.os, labels.release, labels.arch, labels.variant):
        if ":" in text or not text.isprintable():
            raise InvalidArgumentError(f"invalid label {text[:80]!r}: no colons, please")
    for alias in labels.aliases:
        if not alias or "," in alias or not alias.isprintable() or alias != alias.strip():
            raise InvalidArgumentError(f"invalid alias {alias[:80]!r}")


def _image_id(request: web.Request) -> str:
    try:
        return ImageId.parse(request.match_info["id"]).text
    except InvalidNameError as err:
        raise NotFoundError("not found") from err


def _modified(time_s: float) -> dict[str, str]:
    return {hdrs.LAST_MODIFIED: formatdate(time_s, usegmt=True)}


def _read(path: Path) -> tuple[bytes, float]:
    """A document, and when it was written."""
    try:
        with os_errors("no such document"), path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime
    except NotFoundError as err:
        raise NotFoundError("not found") from err


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
