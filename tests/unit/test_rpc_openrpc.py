from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # comes with jsonrpcserver, without types
import msgspec
import pytest

from rpc.dispatch import Registry
from rpc.messages import Guest, GuestRequest, Image, ImageRecord, Message, to_wire
from rpc.methods import AGENT_METHODS
from rpc.openrpc import describe


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    registry = Registry()

    async def handler(request: Message) -> Message:
        """Do it."""
        return request

    for method in AGENT_METHODS:
        registry.offer(method, handler)
    return describe(registry, "agent", "1")


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_document_has_what_the_standard_requires(document: dict[str, Any]) -> None:
    assert document["openrpc"].startswith("1.")
    assert set(document["info"]) == {"title", "version"}
    assert all({"name", "params", "result", "summary"} <= set(method) for method in document["methods"])
    assert all(method["summary"] for method in document["methods"])


def test_document_names_all_methods_aliases_and_itself_once(document: dict[str, Any]) -> None:
    names = [method["name"] for method in document["methods"]]
    assert len(names) == len(set(names)) == 17 + 2 + 1
    assert "rpc.discover" in names


def test_document_resolves_all_its_references(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert found
    assert found <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def test_document_schemas_are_valid_and_hide_the_inner_key(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "*" not in schema.get("properties", {}), name


def test_document_schema_accepts_what_is_written(document: dict[str, Any]) -> None:
    schema = {**document["components"]["schemas"]["GuestRequest"], "components": document["components"]}
    wire = msgspec.json.decode(msgspec.json.encode(to_wire(GuestRequest(guest=Guest(id="g", extra={"owner": 1})))))
    jsonschema.Draft202012Validator(schema).validate(wire)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({"guest": {"id": 5}})


@pytest.mark.parametrize("kind", [Image, ImageRecord])
def test_document_can_be_encoded(document: dict[str, Any], kind: type[Message]) -> None:
    assert msgspec.json.decode(msgspec.json.encode(document)) == document
