"""The OpenAPI document, made from the routes, their handlers' docstrings, and the structs that are read and written.

A route's docstring gives its summary. What a signature can't say (query parameters, headers, bodies, statuses) stands in ``_OPERATIONS``; a
route that is not there is described by its path alone. Routes that only repeat others are left out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from image_service import said
from image_service.facts import ImageFormat
from image_service.lifecycle import ImageStatus, ImageType
from image_service.web import PAGE_MAX, WAIT_MAX_S
from rpc.messages import EXTRA_KEY, FetchRequest, ImageRecord

PATH = "/openapi.json"
_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)[^}]*\}")
_LEFT_OUT = frozenset({"*", "HEAD"})

Schema = Mapping[str, Any]

_STRING: Schema = {"type": "string"}
_BYTES: Schema = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_DIGEST: Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
_SIZE: Schema = {"type": "integer", "minimum": 0}
_RECORD: Schema = {"application/json": {"schema": {"$ref": _REF.format(name="ImageRecord")}}}
_TUS: Schema = {"type": "string", "enum": ["1.0.0"]}
_ERROR: Schema = {
    "type": "object",
    "properties": {"message": _STRING, "code": {"type": "integer"}, "stack": {"type": "array"}},
    "required": ["message"],
}


def _values(kind: type[Any]) -> Schema:
    return {"type": "string", "enum": [str(value) for value in kind]}


@dataclass(frozen=True, slots=True)
class Operation:
    """What an endpoint takes and answers."""

    answers: Mapping[int, Schema] = field(default_factory=lambda: {200: {}})
    """Status -> media types and their schemas."""
    query: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    """Headers a request must have."""
    body: Schema | None = None


_LIST = {"application/json": {"schema": {"type": "array", "items": {"$ref": _REF.format(name="ImageRecord")}}}}
_RANGE = {200: _BYTES, 206: _BYTES, 304: {}, 412: {}, 416: {}}
_CONDITIONS = dict.fromkeys(("Range", "If-Range", "If-Match", "If-None-Match"), _STRING)
_UPLOAD_HEADERS: Mapping[str, Schema] = {
    said.TYPE_HEADER: _values(ImageType),
    said.COMMENT_HEADER: _STRING,
    said.NAME_HEADER: _STRING,
    said.VERSION_HEADER: _STRING,
    said.ORIGIN_HEADER: _STRING,
    said.LABEL_HEADER: {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._/:-]*=[^\\x00-\\x1f]*$"},
    said.DIGEST_HEADER: _DIGEST,
    said.SIZE_HEADER: _SIZE,
    said.FORMAT_HEADER: _values(ImageFormat),
}
_SCRUB: Schema = {
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {
                "running": {"type": "boolean"},
                "checked": _SIZE,
                "checked_size": _SIZE,
                "damaged": {"type": "array", "items": _DIGEST},
                "images": {"type": "array", "items": _STRING},
            },
            "required": ["running", "checked", "checked_size", "damaged", "images"],
        }
    }
}
_COLLECTED: Schema = {
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {
                "dry_run": {"type": "boolean"},
                "blobs": {"type": "array", "items": _DIGEST},
                "ingests": {"type": "array", "items": _STRING},
                "freed": _SIZE,
                "kept": _SIZE,
                "complete": {"type": "boolean"},
            },
            "required": ["dry_run", "blobs", "freed", "kept", "complete"],
        }
    }
}

_CHUNKS: Schema = {
    "application/json": {
        "schema": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"offset": _SIZE, "length": _SIZE, "sha256": _STRING},
                "required": ["offset", "length", "sha256"],
            },
        }
    },
    **_BYTES,
}
_FORM: Mapping[str, Schema] = {
    "format": {"type": "string", "enum": ["zvol", "raw"]},
    "compression": {"type": "string", "enum": ["zstd", "gzip", "none"]},
    "from": _STRING,
}

_OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/images"): Operation(
        {200: _LIST},
        query={
            "type": _values(ImageType),
            "status": _values(ImageStatus),
            "name": _STRING,
            "label": {"type": "array", "items": _STRING},
            "limit": {"type": "integer", "minimum": 1, "maximum": PAGE_MAX},
            "after": _STRING,
        },
    ),
    ("POST", "/images"): Operation(
        {202: _RECORD}, body={"application/json": {"schema": {"$ref": _REF.format(name="FetchRequest")}}}
    ),
    ("PUT", "/images"): Operation(
        {200: _RECORD}, headers=_UPLOAD_HEADERS, required=frozenset({said.TYPE_HEADER}), body=_BYTES
    ),
    ("GET", "/images/{id}"): Operation(
        {200: _RECORD}, headers={"Prefer": {"type": "string", "description": f"wait=SECONDS, at most {WAIT_MAX_S}"}}
    ),
    ("DELETE", "/images/{id}"): Operation({200: _RECORD}),
    ("GET", "/images/{id}/events"): Operation({200: {"text/event-stream": {"schema": {"type": "object"}}}}),
    ("GET", "/images/{id}/download"): Operation(_RANGE, query=_FORM, headers=_CONDITIONS),
    ("GET", "/images/{id}/chunks"): Operation({200: _CHUNKS, 304: {}, 412: {}}, query=_FORM),
    ("GET", "/blobs/{digest}"): Operation(_RANGE, headers=_CONDITIONS),
    ("OPTIONS", "/uploads"): Operation({204: {}}),
    ("OPTIONS", "/uploads/{id}"): Operation({204: {}}),
    ("POST", "/uploads"): Operation(
        {201: {}},
        headers={"Tus-Resumable": _TUS, "Upload-Length": _SIZE, "Upload-Metadata": _STRING},
        required=frozenset({"Tus-Resumable", "Upload-Length", "Upload-Metadata"}),
    ),
    ("PATCH", "/uploads/{id}"): Operation(
        {204: {}},
        headers={"Tus-Resumable": _TUS, "Upload-Offset": _SIZE, "Upload-Checksum": _STRING},
        required=frozenset({"Tus-Resumable", "Upload-Offset"}),
        body={"application/offset+octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    ),
    ("DELETE", "/uploads/{id}"): Operation(
        {204: {}}, headers={"Tus-Resumable": _TUS}, required=frozenset({"Tus-Resumable"})
    ),
    ("POST", "/upkeep/collect"): Operation(
        {200: _COLLECTED}, query={"dry_run": {"type": "boolean"}, "limit": {**_SIZE, "maximum": 10**9}}
    ),
    ("POST", "/upkeep/scrub"): Operation({202: _SCRUB}),
    ("GET", "/upkeep/scrub"): Operation({200: _SCRUB}),
    ("GET", "/healthz"): Operation({200: {"text/plain": {"schema": _STRING}}}),
    ("GET", "/readyz"): Operation({200: {"application/json": {"schema": {"type": "object"}}}}),
    ("GET", "/metrics"): Operation({200: {"text/plain": {"schema": _STRING}}}),
    ("GET", "/"): Operation({200: {"text/html": {"schema": _STRING}}}),
    ("GET", PATH): Operation({200: {"application/json": {"schema": {"type": "object"}}}}),
}


def describe(app: web.Application, title: str, version: str) -> dict[str, Any]:
    """The document of everything the application answers."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, summary in _routes(app):
        paths.setdefault(path, {})[method.lower()] = _describe(method, path, summary)
    _, schemas = msgspec.json.schema_components([FetchRequest, ImageRecord], ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": {name: _plain(schema) for name, schema in schemas.items()} | {"Error": _ERROR}},
    }


def _routes(app: web.Application) -> Iterator[tuple[str, str, str]]:
    for route in app.router.routes():
        path = route.resource.canonical if route.resource is not None else ""
        if route.method not in _LEFT_OUT and path:
            text = inspect.getdoc(getattr(route.handler, "__wrapped__", route.handler)) or ""
            yield route.method, _PARAMETER.sub(r"{\1}", path), text.partition("\n")[0]


def _describe(method: str, path: str, summary: str) -> dict[str, Any]:
    operation = _OPERATIONS.get((method, path), Operation({}))
    described: dict[str, Any] = {
        "summary": summary or f"{method} {path}",
        "operationId": f"{method.lower()}{re.sub(r'[^A-Za-z0-9]+', '-', path).rstrip('-')}",
        "parameters": [
            *_parameters("path", dict.fromkeys(_PARAMETER.findall(path), _STRING), None),
            *_parameters("query", operation.query, frozenset()),
            *_parameters("header", operation.headers, operation.required),
        ],
        "responses": {str(status): _answer(content) for status, content in operation.answers.items()},
    }
    described["responses"]["default"] = {
        "description": "a refusal" if operation.answers else "see the operator's pages"
    }
    if operation.answers:
        error = {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}}
        described["responses"]["default"]["content"] = error
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": operation.body}
    return described


def _answer(content: Schema) -> dict[str, Any]:
    return {"description": "as asked for"} | ({"content": content} if content else {})


def _parameters(place: str, named: Mapping[str, Schema], required: frozenset[str] | None) -> Iterator[dict[str, Any]]:
    for name, schema in named.items():
        needed = required is None or name in required
        yield {"name": name, "in": place, "required": needed, "schema": schema}


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Unknown keys are allowed by being unknown, not by the name they have inside."""
    properties = {name: value for name, value in schema.get("properties", {}).items() if name != EXTRA_KEY}
    return {**schema, "properties": properties}


class OpenApiEndpoint:
    """``/openapi.json``."""

    def __init__(self, title: str, version: str) -> None:
        self._title = title
        self._version = version
        self._document: bytes | None = None

    def add_to(self, app: web.Application) -> None:
        """Route requests here."""
        app.router.add_get(PATH, self.get)

    async def get(self, request: web.Request) -> web.Response:
        """GET /openapi.json: this document."""
        if self._document is None:
            self._document = msgspec.json.encode(describe(request.app, self._title, self._version))
        return web.Response(body=self._document, content_type="application/json")
