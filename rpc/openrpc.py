"""``rpc.discover``: the OpenRPC document of a registry, made from the structs themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from rpc.dispatch import Method, Registry
from rpc.messages import EXTRA_KEY, Message

OPENRPC_VERSION = "1.3.2"

DISCOVER = "rpc.discover"

_REF = "#/components/schemas/{name}"

_DISCOVER_METHOD: dict[str, Any] = {
    "name": DISCOVER,
    "summary": "This document.",
    "params": [],
    "result": {"name": "document", "schema": {"type": "object"}},
}


class DiscoverRequest(Message, kw_only=True):
    """Nothing to say."""


def describe(registry: Registry, title: str, version: str) -> dict[str, Any]:
    """The OpenRPC document: every method and alias, and the schema of every struct they name."""
    methods = [method for method in registry if method.name != DISCOVER]
    kinds = {kind for method in methods for kind in (method.request, method.answer)}
    _, schemas = msgspec.json.schema_components(sorted(kinds, key=lambda kind: kind.__name__), ref_template=_REF)
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {"title": title, "version": version},
        "methods": [*map(_describe_method, methods), _DISCOVER_METHOD],
        "components": {"schemas": {name: _without_extra(schema) for name, schema in schemas.items()}},
    }


def _describe_method(method: Method) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": method.name,
        "summary": f"Same as {method.alias_of}." if method.alias_of else method.summary,
        "paramStructure": "by-position",
        "params": [{"name": "request", "schema": _reference(method.request)}],
        "result": {"name": "answer", "schema": _reference(method.answer)},
    }
    return described


def _reference(kind: type[Message]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _without_extra(schema: dict[str, Any]) -> dict[str, Any]:
    """Unknown keys are allowed by being unknown, not by the name they have inside."""
    properties = {name: value for name, value in schema.get("properties", {}).items() if name != EXTRA_KEY}
    return {**schema, "properties": properties}


def register_discovery(registry: Registry, title: str, version: str) -> None:
    """Offer ``rpc.discover``; the document is made when it is asked for, so it has every method."""

    async def discover(_request: DiscoverRequest) -> dict[str, Any]:
        """Describe every method of this server."""
        return describe(registry, title, version)

    if DISCOVER not in registry:
        registry.register(DISCOVER, discover, request=DiscoverRequest, answer=dict)
