"""Both dialects through the dispatcher, bytes to bytes."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging import errors
from imaging.errors import InternalError, MistifyError
from rpc import dispatch, jsonrpc
from rpc.dispatch import Dispatcher, Registry, error_number
from rpc.jsonrpc import Reply
from rpc.messages import ImageRequest, ImagesAnswer
from rpc.methods import AGENT_METHODS
from tests.unit.rpc_parts import sample_registry

GET = "ImageStore.GetImage"
SHOWN = {"id": "a", "type": "kvm", "size": 4, "status": "complete"}


async def answer(body: bytes | str | dict[str, Any] | list[Any]) -> Reply:
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return await Dispatcher(sample_registry()).dispatch(data)


async def value(body: Any) -> Any:
    reply = await answer(body)
    assert (reply.status, reply.content_type) == (200, "application/json; charset=utf-8")
    assert reply.body.endswith(b"\n")
    return json.loads(reply.body)


# -- 1.0 -------------------------------------------------------------------------------------------------------------------


async def test_legacy_call_writes_result_error_and_id_in_order_with_a_newline() -> None:
    reply = await answer('{"method": "ImageStore.GetImage", "params": [{"id": "a"}], "id": 7}')
    assert (
        reply.body
        == b'{"result":{"images":[{"id":"a","type":"kvm","size":4,"status":"complete"}]},"error":null,"id":7}\n'
    )


@pytest.mark.parametrize(
    "given_id", ["0", "7", "-1", "1.50e3", '"x"', '""', "true", "false", '{"a": [1]}', "[1,  2]", "9" * 60]
)
async def test_legacy_id_of_any_type_comes_back_as_it_came(given_id: str) -> None:
    reply = await answer(f'{{"method": "ImageStore.GetImage", "params": [{{"id": "a"}}], "id": {given_id}}}')
    assert reply.body.endswith(b'"id":' + given_id.encode() + b"}\n")


@pytest.mark.parametrize("tail", ["", ', "id": null', ', "ID": null'])
@pytest.mark.parametrize("image", ["a", "missing", "broken"])
async def test_legacy_notification_gets_an_empty_body(tail: str, image: str) -> None:
    reply = await answer(f'{{"method": "ImageStore.GetImage", "params": [{{"id": "{image}"}}]{tail}}}')
    assert (reply.status, reply.body) == (200, b"")


async def test_legacy_error_is_status_200_and_a_string() -> None:
    assert await value({"method": GET, "params": [{"id": "missing"}], "id": 1}) == {
        "result": None,
        "error": "not found",
        "id": 1,
    }


@pytest.mark.parametrize("params", [[], [None], [{}], [None, 5, "further"]])
async def test_legacy_empty_params_mean_all_defaults(params: list[Any]) -> None:
    assert (await value({"method": GET, "params": params, "id": 1}))["error"] == "not found"


async def test_legacy_further_params_unknown_keys_and_other_spellings_are_ignored() -> None:
    body = {"METHOD": GET, "Params": [{"ID": "a", "colour": 1}, {"id": "b"}, 3], "Id": 1, "extra": {}}
    assert await value(body) == {"result": {"images": [SHOWN]}, "error": None, "id": 1}


@pytest.mark.parametrize("tail", [b" ", b"\n\n", b"garbage", b"{}", b"\xff\xfe", b"]"])
async def test_legacy_bytes_after_the_first_value_are_ignored(tail: bytes) -> None:
    assert (await value(b' \r\n{"method":"ImageStore.GetImage","params":[{"id":"a"}],"id":1}' + tail))["error"] is None


@pytest.mark.parametrize("version", ['"1.0"', "2.0", "null", '""'])
async def test_legacy_call_that_names_another_version_is_legacy(version: str) -> None:
    body = f'{{"jsonrpc": {version}, "method": "ImageStore.GetImage", "params": [{{"id": "a"}}], "id": 1}}'
    assert set(await value(body)) == {"result", "error", "id"}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("", "EOF"),
        (" \n", "EOF"),
        ('{"method":"M","params":[],"id":1}', 'rpc: service/method request ill-formed: "M"'),
        ('{"method":"A.B.C","params":[],"id":1}', 'rpc: service/method request ill-formed: "A.B.C"'),
        ('{"params":[],"id":1}', 'rpc: service/method request ill-formed: ""'),
        ('{"method":null,"params":[],"id":1}', 'rpc: service/method request ill-formed: ""'),
        ('{"method":"Nope.GetImage","params":[],"id":1}', 'rpc: can\'t find service "Nope.GetImage"'),
        ('{"method":"imagestore.GetImage","params":[],"id":1}', 'rpc: can\'t find service "imagestore.GetImage"'),
        ('{"method":"ImageStore.Nope","params":[],"id":1}', 'rpc: can\'t find method "ImageStore.Nope"'),
        ('{"method":"ImageStore.getImage","params":[],"id":1}', 'rpc: can\'t find method "ImageStore.getImage"'),
        ('{"method":"ImageStore.GetImage","id":1}', "rpc: method request ill-formed: missing params field"),
        (
            '{"method":"ImageStore.GetImage","params":null,"id":1}',
            "rpc: method request ill-formed: missing params field",
        ),
        ('{"method":"ImageStore.Nope","id":1}', 'rpc: can\'t find method "ImageStore.Nope"'),
    ],
)
async def test_legacy_transport_error_is_400_with_the_known_text(body: str, text: str) -> None:
    assert await answer(body) == Reply(400, "text/plain; charset=utf-8", text.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nonsense",
        b"5",
        b'"x"',
        b"null",
        b'{"method":5,"params":[],"id":1}',
        b'{"method":"ImageStore.GetImage","params":{},"id":1}',
        b'{"method":"ImageStore.GetImage","params":5,"id":1}',
        b'{"method":"ImageStore.GetImage","params":[5],"id":1}',
        b'{"method":"ImageStore.GetImage","params":[{"id":5}],"id":1}',
        b'{"method":"ImageStore.GetImage","params":[{"id":NaN}],"id":1}',
        b'{"method":"ImageStore.GetImage","params":[{"x":' + b"9" * 6000 + b'}],"id":1}',
        b'{"a":' * 100_000,
    ],
)
async def test_legacy_json_of_the_wrong_shape_is_400_in_words(body: bytes) -> None:
    reply = await answer(body)
    assert (reply.status, reply.content_type) == (400, "text/plain; charset=utf-8")
    assert reply.body
    assert not reply.body.endswith(b"\n")


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json;x"]
)
def test_check_transport_of_a_call_passes(method: str, kind: str) -> None:
    assert jsonrpc.check_transport(method, kind) is None


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS", "BREW"])
def test_check_transport_of_another_method_is_405(method: str) -> None:
    reply = jsonrpc.check_transport(method, "application/json")
    assert reply == Reply(405, "text/plain; charset=utf-8", f"rpc: POST method required, received {method}".encode())


@pytest.mark.parametrize("kind", ["text/plain", "", "application/xml; charset=utf-8", "application/jsonx"])
def test_check_transport_of_another_content_type_is_415(kind: str) -> None:
    expected = f"rpc: unrecognized Content-Type: {kind.partition(';')[0]}".encode()
    assert jsonrpc.check_transport("POST", kind) == Reply(415, "text/plain; charset=utf-8", expected)


# -- 2.0 -------------------------------------------------------------------------------------------------------------------


def call(params: Any, call_id: Any = 1, method: str = GET) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params, "id": call_id}


@pytest.mark.parametrize("params", [[{"id": "a"}], {"id": "a"}, {"ID": "a", "further": 1}])
async def test_call_by_position_or_name_gives_the_result(params: Any) -> None:
    assert await value(call(params)) == {"jsonrpc": "2.0", "result": {"images": [SHOWN]}, "id": 1}


@pytest.mark.parametrize("call_id", ["x", 0, -3, 1.5, None])
async def test_call_id_comes_back(call_id: Any) -> None:
    assert (await value(call({"id": "a"}, call_id)))["id"] == call_id


async def test_call_without_params_means_all_defaults() -> None:
    assert (await value({"jsonrpc": "2.0", "method": "ImageStore.ListImages", "id": 1}))["result"] == {"images": []}


@pytest.mark.parametrize("image", ["a", "missing", "broken"])
async def test_notification_gets_an_empty_body(image: str) -> None:
    reply = await answer({"jsonrpc": "2.0", "method": GET, "params": {"id": image}})
    assert (reply.status, reply.body) == (200, b"")


@pytest.mark.parametrize(
    ("body", "code", "data_code"),
    [
        (call({"id": "missing"}), -32001, "not_found"),
        (call({"id": 5}), -32602, "invalid_argument"),
        (call([5]), -32602, "invalid_argument"),
        (call([{}, {}]), -32602, "invalid_argument"),
        (call({}, method="ImageStore.Nope"), -32601, "unsupported"),
        (call({}, method="nope"), -32601, "unsupported"),
        (call({"id": "later"}), -32010, "unavailable"),
    ],
)
async def test_call_that_fails_gets_number_and_code(body: Any, code: int, data_code: str) -> None:
    error = (await value(body))["error"]
    assert (error["code"], error["data"]["code"]) == (code, data_code)


async def test_call_that_meets_busy_names_the_dependants() -> None:
    error = (await value(call({"id": "busy"})))["error"]
    names = ["mistify/guests/g1/disk-0", "mistify/guests/g2/disk-0"]
    assert error["data"] == {"code": "busy", "retryable": True, "dependants": names}
    assert error["message"] == "image busy is in use"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', -32700),
        ('[{"jsonrpc": "2.0", "method"', -32700),
        ("[" * 100_000, -32700),
        ("[]", -32600),
        ('{"jsonrpc": "2.0", "method": 1, "params": [], "id": 1}', -32600),
        ('{"jsonrpc": "2.0", "params": [], "id": 1}', -32600),
        ('{"jsonrpc": "2.0", "method": "x", "params": "bar", "id": 1}', -32600),
        ('{"jsonrpc": "2.0", "method": "x", "params": null, "id": 1}', -32600),
        ('{"jsonrpc": "2.0", "method": "x", "id": {}}', -32600),
        ('{"jsonrpc": "2.0", "method": "x", "id": true}', -32600),
    ],
)
async def test_body_that_is_no_call_gets_one_standard_error(body: str, code: int) -> None:
    reply = await value(body)
    assert reply["jsonrpc"] == "2.0"
    assert reply["error"]["code"] == code


@pytest.mark.parametrize(("given_id", "echo"), [('"x"', "x"), ("1", 1), ("{}", None), ("null", None)])
async def test_invalid_request_echoes_an_id_that_can_be_one(given_id: str, echo: Any) -> None:
    assert (await value(f'{{"jsonrpc": "2.0", "method": 1, "id": {given_id}}}'))["id"] == echo


async def test_batch_answers_in_order_and_leaves_out_notifications() -> None:
    notification = {"jsonrpc": "2.0", "method": GET, "params": {"id": "a"}}
    replies = await value([call({"id": "a"}, 1), notification, 5, {"method": GET}, call({"id": "missing"}, "z")])
    assert [reply["id"] for reply in replies] == [1, None, None, "z"]
    assert [reply.get("error", {}).get("code") for reply in replies] == [None, -32600, -32600, -32001]


async def test_batch_of_one_answers_with_an_array() -> None:
    assert await value([call({"id": "a"})]) == [{"jsonrpc": "2.0", "result": {"images": [SHOWN]}, "id": 1}]


async def test_batch_of_notifications_gets_an_empty_body() -> None:
    assert (await answer([{"jsonrpc": "2.0", "method": GET}] * 3)).body == b""


async def test_batch_beyond_the_limit_is_refused_as_one() -> None:
    most = await value([call({"id": "a"}, number) for number in range(jsonrpc.BATCH_MAX_CALLS)])
    assert len(most) == jsonrpc.BATCH_MAX_CALLS
    reply = await value([call({"id": "a"})] * (jsonrpc.BATCH_MAX_CALLS + 1))
    assert reply["error"]["code"] == -32600


# -- errors ----------------------------------------------------------------------------------------------------------------


async def test_unexpected_error_shows_an_incident_id_and_logs_the_chain_once(caplog: pytest.LogCaptureFixture) -> None:
    legacy = (await value({"method": GET, "params": [{"id": "broken"}], "id": 1}))["error"]
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert legacy == f"internal error, incident {record.__dict__['incident']}"
    assert "secret of the house" in (record.exc_text or str(record.exc_info))
    assert "secret" not in legacy


async def test_unexpected_error_in_2_0_has_code_incident_and_no_detail() -> None:
    error = (await value(call({"id": "broken"})))["error"]
    assert error["code"] == -32603
    assert error["data"]["code"] == "internal"
    assert error["message"].endswith(error["data"]["incident"])


def error_classes() -> list[type[MistifyError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MistifyError)]
    return [kind for kind in kinds if kind not in {MistifyError, InternalError}]


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_error_number_of_every_class_is_its_own_range(kind: type[MistifyError]) -> None:
    assert error_number(kind("x")) == -32602 or -32099 <= error_number(kind("x")) <= -32001


@pytest.mark.parametrize("kind", [MistifyError, InternalError])
def test_error_number_of_anything_else_is_internal(kind: type[MistifyError]) -> None:
    assert error_number(kind("x")) == jsonrpc.INTERNAL_ERROR


async def test_cancelled_call_is_cancelled_not_answered() -> None:
    registry, entered = Registry(), asyncio.Event()

    async def wait(request: ImageRequest) -> ImagesAnswer:
        entered.set()
        await asyncio.Event().wait()
        return ImagesAnswer()

    registry.register("S.Wait", wait, request=ImageRequest, answer=ImagesAnswer)
    task = asyncio.create_task(Dispatcher(registry).dispatch(b'{"method":"S.Wait","params":[],"id":1}'))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_observer_is_told_method_and_outcome() -> None:
    seen: list[tuple[str, str]] = []
    dispatcher = Dispatcher(
        sample_registry(), observe=lambda method, outcome, _duration_s: seen.append((method, outcome))
    )
    for image in ("a", "missing", "broken"):
        await dispatcher.dispatch(json.dumps(call({"id": image})).encode())
    assert seen == [(GET, "ok"), (GET, "not_found"), (GET, "internal")]


async def test_alias_answers_as_the_method() -> None:
    assert (await value(call({"id": "a"}, method="ImageStore.ShowImage")))["result"] == {"images": [SHOWN]}


def test_register_of_a_name_twice_is_refused() -> None:
    registry = sample_registry()
    with pytest.raises(InternalError, match="registered twice"):
        registry.register(GET, list, request=ImageRequest, answer=ImagesAnswer)  # type: ignore[arg-type]


def test_agent_methods_are_seventeen_with_two_aliases() -> None:
    assert len({method.name for method in AGENT_METHODS}) == 17
    assert {alias for method in AGENT_METHODS for alias in method.aliases} == {
        "ImageStore.ListSnapshot",
        "ImageStore.DeleteGuestDisks",
    }


# -- anything --------------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
KEYS = st.sampled_from(["jsonrpc", "method", "params", "id", "Method", "PARAMS", "ID", "x"])
VALUES = TREES | st.sampled_from(["2.0", GET, "ImageStore.Nope", [{"id": "a"}], [{"ID": 3}], {"id": "broken"}])
BODIES = st.dictionaries(KEYS, VALUES, max_size=5)


def is_mapped(reply: Reply) -> bool:
    if reply.status == 200:
        return not reply.body or isinstance(json.loads(reply.body), dict | list)
    return reply.status == 400 and bool(reply.body)


@given(body=BODIES | st.lists(BODIES | TREES, max_size=4) | TREES)
def test_dispatch_of_any_json_gives_a_mapped_reply(body: Any) -> None:
    logging.getLogger(dispatch.__name__).disabled = True
    try:
        assert is_mapped(asyncio.run(answer(body)))
    finally:
        logging.getLogger(dispatch.__name__).disabled = False


@given(body=st.binary(max_size=64) | st.text(alphabet='{}[]",:0123456789 eE.+-\\untrfals', max_size=40).map(str.encode))
def test_dispatch_of_any_bytes_gives_a_mapped_reply(body: bytes) -> None:
    assert is_mapped(asyncio.run(answer(body)))
