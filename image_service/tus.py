"""tus 1.0 over HTTP: uploads in parts (https://tus.io, version 1.0.0) at ``/uploads``.

Extensions: creation, creation-with-upload, checksum (sha256, sha1), termination, expiration. ``Upload-Metadata`` says what the
headers of a PUT say: ``type`` (required), ``comment``, ``name``, ``version``, ``origin``, ``digest``, ``format``, ``filename`` (a name if
there is none), and ``label.KEY`` for each label. An upload's id is the id of the image it becomes; ``X-Image-Id`` repeats it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import hmac
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from email.utils import formatdate
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from image_service.bodies import Piece
from image_service.facts import ImageFormat
from image_service.lifecycle import UNKNOWN_SIZE, Details, Expected, ImageType
from image_service.said import parse_size
from image_service.service import ImageService
from image_service.spool import Pools
from image_service.upload_records import Upload
from image_service.uploads import Uploads
from image_service.web import render_error
from imaging.digests import Digest
from imaging.errors import BusyError, InvalidArgumentError, MistifyError, NotFoundError
from imaging.files import os_errors
from rpc.rest import respond_to_error

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,checksum,termination,expiration"
ALGORITHMS = ("sha256", "sha1")
BODY_TYPE = "application/offset+octet-stream"
IMAGE_ID_HEADER = "X-Image-Id"
LABEL_PREFIX = "label."

CHECKED_MEMORY_BYTES = 4 << 20
"""A part with a checksum waits for its last byte: small ones in memory, larger ones in a file without a name."""

PIECE_BYTES = 1 << 20
"""Read at once from such a file."""

Body = Callable[[web.Request], AsyncGenerator[Piece, None]]


class TusEndpoints:
    """The handlers of ``/uploads``."""

    def __init__(
        self,
        uploads: Uploads,
        service: ImageService,
        pools: Pools,
        body: Body,
        *,
        size_max_bytes: int,
        directory: Path | None,
    ) -> None:
        self._uploads = uploads
        self._service = service
        self._pools = pools
        self._body = body
        self._size_max_bytes = size_max_bytes
        self._directory = None if directory is None else str(directory)

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        router = app.router
        router.add_route("OPTIONS", "/uploads", self.options)
        router.add_route("OPTIONS", "/uploads/{id}", self.options)
        router.add_post("/uploads", self._spoken(self.create))
        router.add_head("/uploads/{id}", self._spoken(self.head))
        router.add_patch("/uploads/{id}", self._spoken(self.append))
        router.add_post("/uploads/{id}", self._spoken(self.overridden))
        router.add_delete("/uploads/{id}", self._spoken(self.delete))

    def _spoken(self, handler: Handler) -> Handler:
        """Every answer names the version; a client of another one is refused."""

        @functools.wraps(handler)
        async def speak(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Tus-Resumable") != VERSION:
                response: web.StreamResponse = render_error(412, "this is tus 1.0.0", "unsupported")
                response.headers["Tus-Version"] = VERSION
            else:
                try:
                    response = await handler(request)
                except BusyError as err:
                    response = render_error(423, err.message, err.code)
                except MistifyError as err:
                    response = respond_to_error(err, render_error)
            response.headers["Tus-Resumable"] = VERSION
            return response

        return speak

    async def options(self, _request: web.Request) -> web.Response:
        """OPTIONS: what this server can do."""
        headers = {
            "Tus-Resumable": VERSION,
            "Tus-Version": VERSION,
            "Tus-Extension": EXTENSIONS,
            "Tus-Max-Size": str(self._size_max_bytes),
            "Tus-Checksum-Algorithm": ",".join(ALGORITHMS),
        }
        return web.Response(status=204, headers=headers)

    async def create(self, request: web.Request) -> web.Response:
        """POST /uploads."""
        length = request.headers.get("Upload-Length")
        if length is None:
            raise InvalidArgumentError("missing Upload-Length header")
        metadata = request.headers.get("Upload-Metadata", "")
        values = parse_metadata(metadata)
        upload = await self._uploads.create(
            ImageType.parse(values.get("type"), "invalid type in Upload-Metadata"),
            parse_size(length),
            details=_details(values),
            expected=_expected(values),
            metadata=metadata,
        )
        offset = 0
        if request.content_type == BODY_TYPE or upload.length_bytes == 0:
            upload, offset = await self._take(request, upload.image.id, 0)
        headers = {hdrs.LOCATION: f"/uploads/{upload.image.id}", "Upload-Offset": str(offset)}
        return web.Response(status=201, headers=headers | _headers(upload))

    async def head(self, request: web.Request) -> web.Response:
        """HEAD /uploads/{id}."""
        upload_id = request.match_info["id"]
        headers: dict[str, str] = {hdrs.CACHE_CONTROL: "no-store"}
        try:
            upload, offset = await self._uploads.state(upload_id)
            headers |= _headers(upload) | {"Upload-Metadata": upload.metadata}
            length = upload.length_bytes
        except NotFoundError:
            _, info = await self._service.get_blob(upload_id)  # it has become an image
            offset = length = info.size_bytes
        return web.Response(headers=headers | {"Upload-Offset": str(offset), "Upload-Length": str(length)})

    async def append(self, request: web.Request) -> web.Response:
        """PATCH /uploads/{id}."""
        if request.content_type != BODY_TYPE:
            return render_error(415, f"a part must be of type {BODY_TYPE}", "unsupported")
        offset = request.headers.get("Upload-Offset")
        if offset is None:
            raise InvalidArgumentError("missing Upload-Offset header")
        try:
            upload, now_at = await self._take(request, request.match_info["id"], parse_size(offset))
        except _MismatchError:
            return render_error(460, "the part is not what its checksum says", "bad_data")
        return web.Response(status=204, headers={"Upload-Offset": str(now_at)} | _headers(upload))

    async def overridden(self, request: web.Request) -> web.StreamResponse:
        """POST /uploads/{id} by a client that can't send other methods."""
        handlers = {"PATCH": self.append, "DELETE": self.delete, "HEAD": self.head}
        handler = handlers.get(request.headers.get("X-HTTP-Method-Override", "").upper())
        if handler is None:
            raise InvalidArgumentError("a POST here must name its method in X-HTTP-Method-Override")
        return await handler(request)

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /uploads/{id}."""
        await self._uploads.delete(request.match_info["id"])
        return web.Response(status=204)

    # -- parts -------------------------------------------------------------------------------------------------------

    async def _take(self, request: web.Request, upload_id: str, offset: int) -> tuple[Upload, int]:
        async with contextlib.aclosing(self._body(request)) as pieces:
            said = request.headers.get("Upload-Checksum")
            if said is None:
                return await self._uploads.append(upload_id, offset, pieces)
            return await self._take_checked(upload_id, offset, pieces, said)

    async def _take_checked(
        self, upload_id: str, offset: int, pieces: AsyncIterator[Piece], said: str
    ) -> tuple[Upload, int]:
        """Nothing of a part is handed on before all of it was found right."""
        algorithm, wanted = parse_checksum(said)
        with os_errors("cannot make a temporary file"):
            file = tempfile.SpooledTemporaryFile(CHECKED_MEMORY_BYTES, dir=self._directory)  # noqa: SIM115 - closed below
        try:
            hasher, buffer = hashlib.new(algorithm), bytearray()
            async for piece in pieces:
                buffer += piece
                if len(buffer) >= PIECE_BYTES:
                    await self._pools.data(_put, file, hasher, buffer)
                    buffer = bytearray()
            await self._pools.data(_put, file, hasher, buffer)
            if not hmac.compare_digest(hasher.digest(), wanted):
                raise _MismatchError
            return await self._uploads.append(upload_id, offset, self._read(file))
        finally:
            await self._pools.data(file.close)

    async def _read(self, file: tempfile.SpooledTemporaryFile[bytes]) -> AsyncIterator[bytes]:
        await self._pools.data(file.seek, 0)
        while piece := await self._pools.data(file.read, PIECE_BYTES):
            yield piece


class _MismatchError(Exception):
    """A part is not what its checksum says; nothing of it was taken."""


def _put(file: tempfile.SpooledTemporaryFile[bytes], hasher: hashlib._Hash, piece: bytearray) -> None:
    hasher.update(piece)
    with os_errors("cannot keep a part of an upload"):
        file.write(piece)


def _headers(upload: Upload) -> dict[str, str]:
    """What every answer about an upload says."""
    return {
        "Upload-Expires": formatdate(upload.expires_s, usegmt=True),
        "Upload-Length": str(upload.length_bytes),
        IMAGE_ID_HEADER: upload.image.id,
    }


def parse_checksum(text: str) -> tuple[str, bytes]:
    """``sha256 <base64>``; InvalidArgumentError."""
    algorithm, _, encoded = text.partition(" ")
    if algorithm not in ALGORITHMS:
        raise InvalidArgumentError(f"checksum must be of {' or '.join(ALGORITHMS)}, not {algorithm[:32]!r}")
    return algorithm, _decode(encoded)


def parse_metadata(text: str) -> Mapping[str, str]:
    """``key base64,key base64``; InvalidArgumentError."""
    values: dict[str, str] = {}
    for pair in text.split(",") if text.strip() else ():
        key, _, encoded = pair.strip().partition(" ")
        if not key or not key.isascii() or key in values:
            raise InvalidArgumentError(f"malformed Upload-Metadata header: {pair[:64]!r}")
        values[key] = _decode(encoded).decode("utf-8", "replace")
    return values


def _decode(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as err:
        raise InvalidArgumentError(f"not base64: {encoded[:64]!r}") from err


def _details(values: Mapping[str, str]) -> Details:
    return Details(
        comment=values.get("comment", ""),
        name=values.get("name", values.get("filename", "")),
        version=values.get("version", ""),
        origin=values.get("origin", ""),
        labels={key.removeprefix(LABEL_PREFIX): value for key, value in values.items() if key.startswith(LABEL_PREFIX)},
    )


def _expected(values: Mapping[str, str]) -> Expected:
    digest, kind = values.get("digest", ""), values.get("format", "")
    return Expected(Digest.parse(digest) if digest else None, UNKNOWN_SIZE, ImageFormat.parse(kind) if kind else None)
