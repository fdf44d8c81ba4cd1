"""agent-wire section 1: HTTP, JSON-RPC 1.0 as old clients speak it, 2.0 beside it."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from typing import Any

import pytest
import requests

from tests.acceptance.daemons import Agent

JSON = {"Content-Type": "application/json"}
LIST = {"method": "ImageStore.ListImages", "params": [{}], "id": 1}


def post(agent: Agent, body: Any, method: str = "POST", **headers: str) -> requests.Response:
    data = body if isinstance(body, bytes | str) else json.dumps(body)
    return requests.request(
        method, f"{agent.url}/_mistify_RPC_", data=data, headers=JSON | headers, timeout=30, stream=False
    )


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_call_by_post_or_get_gives_result(agent: Agent, method: str) -> None:
    response = post(agent, LIST, method)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.text == '{"result":{"images":[]},"error":null,"id":1}\n'


@pytest.mark.parametrize("kind", ["APPLICATION/JSON", "application/json; charset=latin-1", "Application/Json;x"])
def test_content_type_in_any_case_with_anything_after_is_accepted(agent: Agent, kind: str) -> None:
    response = requests.post(
        f"{agent.url}/_mistify_RPC_", data=json.dumps(LIST), headers={"Content-Type": kind}, timeout=30
    )
    assert response.status_code == 200


@pytest.mark.parametrize("call_id", [7, "x", 1.5, [1, {"a": None}], {"k": "v"}, True, 12345678901234567890])
def test_id_of_any_type_is_echoed(agent: Agent, call_id: Any) -> None:
    assert post(agent, LIST | {"id": call_id}).json() == {"result": {"images": []}, "error": None, "id": call_id}


@pytest.mark.parametrize("call", [{**LIST, "id": None}, {"method": "ImageStore.ListImages", "params": [{}]}])
def test_notification_gets_an_empty_body(agent: Agent, call: dict[str, Any]) -> None:
    response = post(agent, call)
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("params", [[], [None], [{}], [{}, "further", 1], [{"unknown": [1]}], [{"ID": None}]])
def test_params_in_every_accepted_form_mean_defaults(agent: Agent, params: list[Any]) -> None:
    assert post(agent, LIST | {"params": params}).json()["result"] == {"images": []}


def test_bytes_after_the_first_value_are_ignored(agent: Agent) -> None:
    assert post(agent, json.dumps(LIST) + "garbage {").json()["id"] == 1


def test_keys_match_without_regard_to_case(agent: Agent) -> None:
    answer = post(agent, {"METHOD": "ImageStore.GetImage", "Params": [{"Id": "nope"}], "iD": 5}).json()
    assert answer == {"result": None, "error": "not found", "id": 5}


def test_error_of_a_method_is_status_200_with_a_string(agent: Agent) -> None:
    response = post(agent, {"method": "ImageStore.GetVolume", "params": [{}], "id": "e"})
    assert response.status_code == 200
    assert response.text == '{"result":null,"error":"need an id","id":"e"}\n'


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_http_methods_are_405(agent: Agent, method: str) -> None:
    response = post(agent, LIST, method)
    assert response.status_code == 405
    assert response.text == f"rpc: POST method required, received {method}"
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_other_content_type_is_415(agent: Agent) -> None:
    response = requests.post(
        f"{agent.url}/_mistify_RPC_", data=json.dumps(LIST), headers={"Content-Type": "text/plain"}, timeout=30
    )
    assert (response.status_code, response.text) == (415, "rpc: unrecognized Content-Type: text/plain")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (b"", "EOF"),
        (LIST | {"method": "ListImages"}, 'rpc: service/method request ill-formed: "ListImages"'),
        (LIST | {"method": "a.b.c"}, 'rpc: service/method request ill-formed: "a.b.c"'),
        (LIST | {"method": "Other.ListImages"}, 'rpc: can\'t find service "Other.ListImages"'),
        (LIST | {"method": "imagestore.ListImages"}, 'rpc: can\'t find service "imagestore.ListImages"'),
        (LIST | {"method": "ImageStore.listImages"}, 'rpc: can\'t find method "ImageStore.listImages"'),
        ({"method": "ImageStore.ListImages", "id": 1}, "rpc: method request ill-formed: missing params field"),
    ],
)
def test_malformed_call_is_400_in_known_words(agent: Agent, call: Any, text: str) -> None:
    response = post(agent, call)
    assert (response.status_code, response.text) == (400, text)
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("body", [b"{", b"nonsense", b'{"method": 5, "params": [], "id": 1}', b"\xff\xfe"])
def test_broken_json_is_400_in_words(agent: Agent, body: bytes) -> None:
    response = post(agent, body)
    assert response.status_code == 400
    assert response.text


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_answer_is_compressed_on_request(agent: Agent, coding: str) -> None:
    response = requests.post(
        f"{agent.url}/_mistify_RPC_",
        data=json.dumps(LIST),
        headers=JSON | {"Accept-Encoding": coding},
        timeout=30,
        stream=True,
    )
    raw = response.raw.read(decode_content=False)
    assert response.headers["Content-Encoding"] == coding
    assert "Accept-Encoding" in response.headers["Vary"]
    plain = gzip.decompress(raw) if coding == "gzip" else zlib.decompress(raw)
    assert json.loads(plain)["result"] == {"images": []}


def test_json_rpc_2_object_gives_structured_answer_and_error(agent: Agent) -> None:
    good = post(agent, {"jsonrpc": "2.0", "method": "ImageStore.ListImages", "params": {}, "id": 1}).json()
    assert good == {"jsonrpc": "2.0", "result": {"images": []}, "id": 1}
    bad = post(agent, {"jsonrpc": "2.0", "method": "ImageStore.GetImage", "params": {"id": "x"}, "id": 2}).json()
    assert bad["error"]["message"] == "not found"
    assert isinstance(bad["error"]["code"], int)
    assert bad["error"]["data"]["code"] == "not_found"


def test_json_rpc_2_batch_answers_each_call(agent: Agent) -> None:
    calls: list[Any] = [{"jsonrpc": "2.0", "method": "ImageStore.ListImages", "params": [], "id": n} for n in (1, 2)]
    answers = post(agent, [*calls, {"jsonrpc": "2.0", "method": "nope", "id": 3}]).json()
    assert sorted(answer["id"] for answer in answers) == [1, 2, 3]
    assert sum("error" in answer for answer in answers) == 1


def test_rpc_discover_describes_all_17_methods_and_both_aliases(agent: Agent) -> None:
    answer = post(agent, {"jsonrpc": "2.0", "method": "rpc.discover", "id": 1}).json()["result"]
    names = {method["name"] for method in answer["methods"]} - {"rpc.discover"}
    assert {name for name in names if name.startswith("ImageStore.")} == names
    assert len(names) == 19
    assert {"ImageStore.ListSnapshot", "ImageStore.DeleteGuestDisks"} <= names


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
def test_operators_pages_are_there(agent: Agent, path: str) -> None:
    assert requests.get(agent.url + path, timeout=30).status_code == 200


def test_debug_pages_of_the_original_are_not(agent: Agent) -> None:
    assert requests.get(agent.url + "/debug/pprof/", timeout=30).status_code == 404


def test_body_above_the_limit_is_413(agent: Agent) -> None:
    response = post(agent, LIST | {"params": [{"id": "x" * (2 << 20)}]})
    assert response.status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
def test_other_host_header_is_refused(agent: Agent, host: str) -> None:
    assert post(agent, LIST, Host=host).status_code == 403
    assert post(agent, LIST, Host=f"localhost:{agent.port}").status_code == 200


def test_keep_alive_connection_serves_many_calls(agent: Agent) -> None:
    body = json.dumps(LIST).encode()
    head = f"POST /_mistify_RPC_ HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", agent.port), timeout=30) as client:
        for _ in range(3):
            client.sendall(head.encode() + body)
            received = b""
            while not received.endswith(b'"id":1}\n'):
                piece = client.recv(65536)
                assert piece, f"connection closed after {received!r}"
                received += piece
            assert received.startswith(b"HTTP/1.1 200 ")
