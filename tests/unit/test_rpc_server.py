"""The shared HTTP layer over real sockets; raw ones where a client library would tidy up."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from imaging.errors import BusyError, InternalError, MistifyError, NotFoundError, UnavailableError
from rpc import server as rpc_server
from rpc.metrics import Metrics
from rpc.rest import render_text_error, respond_to_error
from rpc.server import LIFECYCLE, METRICS, ServerSettings, create_app
from tests.unit.rpc_parts import RPC, sample_registry

CALL = {"method": "ImageStore.GetImage", "params": [{"id": "a"}], "id": 1}
JSON = {"Content-Type": "application/json"}


def make_app(**settings: Any) -> web.Application:
    app = create_app(ServerSettings(component="sample", version="1.2", **settings), registry=sample_registry())

    async def fail(request: web.Request) -> web.StreamResponse:
        raise {"missing": NotFoundError("not found"), "down": UnavailableError("down")}.get(
            request.match_info["how"], ValueError("secret")
        )

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise ValueError("in the middle")

    app.router.add_get("/fail/{how}", fail)
    app.router.add_get("/break-off", break_off)
    return app


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    running = TestServer(make_app())
    await running.start_server()
    yield running
    await running.close()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["Accept-Encoding"]) as session:
        yield session


async def raw(server: TestServer, request: bytes, *, until: bytes = b"") -> bytes:
    """Send bytes as they are, read to the end or to some bytes."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.readuntil(until) if until else reader.read(), 30)
    finally:
        writer.close()
        await writer.wait_closed()


def head(request: str, *fields: str) -> bytes:
    lines = [
        f"{request} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Connection: close",
        *fields,
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


# -- RPC -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_rpc_over_post_and_get_answers(server: TestServer, client: aiohttp.ClientSession, method: str) -> None:
    async with client.request(method, server.make_url(RPC), data=json.dumps(CALL), headers=JSON) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json; charset=utf-8"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert (await response.json())["result"]["images"][0]["id"] == "a"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_rpc_with_another_method_is_405_in_known_words(
    server: TestServer, client: aiohttp.ClientSession, method: str
) -> None:
    async with client.request(method, server.make_url(RPC), data=json.dumps(CALL), headers=JSON) as response:
        assert response.status == 405
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert await response.read() == f"rpc: POST method required, received {method}".encode()


async def test_rpc_without_content_type_is_415(server: TestServer, client: aiohttp.ClientSession) -> None:
    async with client.post(server.make_url(RPC), data=b"{}", skip_auto_headers=["Content-Type"]) as response:
        assert (response.status, await response.read()) == (415, b"rpc: unrecognized Content-Type: ")


async def test_rpc_get_with_body_over_a_raw_socket_answers(server: TestServer) -> None:
    body = json.dumps(CALL).encode() + b"trailing \xff"
    answer = await raw(server, head(f"GET {RPC}", f"Content-Length: {len(body)}") + body)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b'"error":null,"id":1}\n')


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\x16\x03\x01 TLS to a plain port\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
    ids=["no host", "two hosts", "tls", "endless header"],
)
async def test_request_that_is_no_http_is_400_and_no_error_of_ours(
    server: TestServer, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    with caplog.at_level(logging.INFO):
        answer = await raw(server, sent)
    assert b" 400 Bad Request\r\n" in answer
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_rpc_with_empty_body_is_eof(server: TestServer) -> None:
    answer = await raw(server, head(f"POST {RPC}"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\nEOF")


async def test_rpc_notification_has_an_empty_body(server: TestServer, client: aiohttp.ClientSession) -> None:
    async with client.post(
        server.make_url(RPC), json=CALL | {"id": None}, headers={"Accept-Encoding": "gzip"}
    ) as response:
        assert (response.status, await response.read()) == (200, b"")
        assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br, GZIP;q=0.5", "gzip"),
        ("deflate, gzip", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("identity", None),
        ("gzip;q=0", None),
        ("gzip; q=0.000", None),
    ],
)
async def test_rpc_answer_is_compressed_as_accepted(
    server: TestServer, client: aiohttp.ClientSession, accept: str, coding: str | None
) -> None:
    async with client.post(server.make_url(RPC), json=CALL, headers={"Accept-Encoding": accept}) as response:
        body = await response.read()
        assert response.headers.get("Content-Encoding") == coding
        assert response.headers.get("Vary") == ("Accept-Encoding" if coding else None)
    plain = gzip.decompress(body) if coding == "gzip" else zlib.decompress(body) if coding else body
    assert json.loads(plain)["id"] == 1


async def test_rpc_large_answer_is_compressed_too(server: TestServer, client: aiohttp.ClientSession) -> None:
    image_id = "x" * (rpc_server.COMPRESS_INLINE_MAX_BYTES + 1)
    call = CALL | {"params": [{"id": image_id}]}
    async with client.post(server.make_url(RPC), json=call, headers={"Accept-Encoding": "gzip"}) as response:
        assert json.loads(gzip.decompress(await response.read()))["result"]["images"][0]["id"] == image_id


async def test_body_beyond_the_limit_is_413_and_at_the_limit_is_read(client: aiohttp.ClientSession) -> None:
    async with TestServer(make_app(body_max_bytes=2000)) as server:
        answers: dict[int, str] = {}
        for size, status in ((2000, 200), (2001, 413)):
            async with client.post(
                server.make_url(RPC), data=json.dumps(CALL).ljust(size).encode(), headers=JSON
            ) as response:
                answers = {response.status: await response.text()}
                assert [*answers] == [status]
        assert json.loads(answers[413]) == {
            "message": "the request body is larger than 2000 bytes",
            "code": "too_large",
            "stack": [],
        }


async def test_chunked_body_that_is_malformed_is_400(server: TestServer, caplog: pytest.LogCaptureFixture) -> None:
    answer = await raw(server, head(f"POST {RPC}", "Transfer-Encoding: chunked") + b"5\r\n{abcd\r\nzz\r\n")
    assert b" 400 Bad Request\r\n" in answer
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_body_that_stalls_is_given_up(
    client: aiohttp.ClientSession, server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "BODY_TIMEOUT_S", 0.05)
    answer = await raw(server, head(f"POST {RPC}", "Content-Length: 10") + b"{", until=b'"stack":[]')
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"did not arrive within" in answer


async def test_discover_over_http_names_every_method(server: TestServer, client: aiohttp.ClientSession) -> None:
    call = {"jsonrpc": "2.0", "method": "rpc.discover", "id": 1}
    async with client.post(server.make_url(RPC), json=call) as response:
        document = (await response.json())["result"]
    assert document["info"] == {"title": "sample", "version": "1.2"}
    assert "ImageStore.GetImage" in {method["name"] for method in document["methods"]}


# -- who may call ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RPC, "/readyz", "/metrics", "/nowhere"])
async def test_foreign_host_is_403_everywhere_but_healthz(
    server: TestServer, client: aiohttp.ClientSession, path: str
) -> None:
    evil = {"Host": "evil.example"}
    async with client.get(server.make_url(path), headers=evil) as response:
        assert response.status == 403
        assert "evil.example" in (await response.json())["message"]
    async with client.get(server.make_url("/healthz"), headers=evil) as response:
        assert (response.status, await response.text()) == (200, "ok\n")


@pytest.mark.parametrize(("version", "statuses"), [("1.0", {200}), ("1.1", {400, 403})])
async def test_missing_host_is_taken_from_http_1_0_only(server: TestServer, version: str, statuses: set[int]) -> None:
    answer = await raw(server, f"GET /readyz HTTP/{version}\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split(b" ", 2)[1]) in statuses


@pytest.mark.parametrize("path", [RPC, "/readyz", "/metrics", "/nowhere"])
async def test_without_token_is_401_everywhere_but_healthz(client: aiohttp.ClientSession, path: str) -> None:
    async with TestServer(make_app(token="s3cret")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            async with client.get(server.make_url(path), headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert "bearer token" in (await response.json())["message"]
        async with client.get(server.make_url("/healthz")) as response:
            assert response.status == 200
        async with client.post(server.make_url(RPC), json=CALL, headers={"Authorization": "Bearer s3cret"}) as response:
            assert response.status == 200


# -- errors and ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [("/fail/missing", 404, "not_found"), ("/nowhere", 404, "not_found"), ("/fail/down", 503, "unavailable")],
)
async def test_error_of_a_handler_is_json_with_three_keys(
    server: TestServer, client: aiohttp.ClientSession, path: str, status: int, code: str
) -> None:
    async with client.get(server.make_url(path)) as response:
        body = await response.json()
        assert (response.status, body["code"], body["stack"]) == (status, code, [])
        assert response.headers.get("Retry-After") == ("5" if status == 503 else None)


async def test_unexpected_error_of_a_handler_shows_an_incident_only(
    server: TestServer, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with client.get(server.make_url("/fail/oddly"), headers={"X-Request-Id": "from-me"}) as response:
        body = await response.json()
    assert response.status == 500
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert body["message"] == f"internal error, incident {record.__dict__['incident']}"


async def test_wrong_method_on_a_plain_route_is_405_and_says_what_is_allowed(
    server: TestServer, client: aiohttp.ClientSession
) -> None:
    async with client.post(server.make_url("/healthz")) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET,HEAD"


async def test_error_after_the_answer_began_breaks_the_connection(server: TestServer) -> None:
    async with aiohttp.ClientSession() as client:
        with pytest.raises(aiohttp.ClientError):
            async with client.get(server.make_url("/break-off")) as response:
                await response.read()


async def test_text_errors_are_a_line_of_text() -> None:
    app = create_app(ServerSettings(component="sample"), render_error=render_text_error)
    async with (
        TestServer(app) as server,
        aiohttp.ClientSession() as client,
        client.get(server.make_url("/x")) as response,
    ):
        assert (response.status, await response.text()) == (404, "not found\n")


@pytest.mark.parametrize("err", [BusyError("in use"), InternalError("secret"), MistifyError("secret")], ids=repr)
def test_respond_to_error_never_tells_secrets_nor_promises_busy_an_end(err: MistifyError) -> None:
    response = respond_to_error(err)
    assert "Retry-After" not in response.headers
    assert "secret" not in (response.text or "")


async def test_request_id_that_is_sane_comes_back(server: TestServer, client: aiohttp.ClientSession) -> None:
    async with client.get(server.make_url("/readyz"), headers={"X-Request-Id": "job-1:a.b_c"}) as response:
        assert response.headers["X-Request-Id"] == "job-1:a.b_c"


@pytest.mark.parametrize("given_id", ["", "a b", "x" * 65, "<script>", "é"])
async def test_request_id_that_is_odd_is_replaced(
    server: TestServer, client: aiohttp.ClientSession, given_id: str
) -> None:
    seen = set()
    for _ in range(2):
        async with client.get(server.make_url("/readyz"), headers={"X-Request-Id": given_id}) as response:
            seen.add(response.headers["X-Request-Id"])
    assert len(seen) == 2
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", one) for one in seen)


# -- health, metrics, access log -------------------------------------------------------------------------------------------


async def test_readyz_names_the_checks_that_fail(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "READY_CHECK_TIMEOUT_S", 0.05)
    app = make_app()

    async def fine() -> None:
        return None

    async def full() -> str:
        return "disk full"

    async def broken() -> str | None:
        raise ValueError("oops")

    async def hanging() -> str | None:
        await asyncio.Event().wait()
        return None

    app[LIFECYCLE].ready_checks.update(fine=fine, disk=full, broken=broken, hanging=hanging)
    async with TestServer(app) as server, client.get(server.make_url("/readyz")) as response:
        reasons = (await response.json())["reasons"]
    assert response.status == 503
    assert reasons["disk"] == "disk full"
    assert set(reasons) == {"disk", "broken", "hanging"}
    assert "oops" in reasons["broken"]


async def test_readyz_while_draining_is_503_and_closes(server: TestServer, client: aiohttp.ClientSession) -> None:
    server.app[LIFECYCLE].draining = True
    async with client.get(server.make_url("/readyz")) as response:
        assert (response.status, response.headers["Connection"]) == (503, "close")
        assert (await response.json())["reasons"] == {"lifecycle": "draining"}


async def test_metrics_count_requests_calls_and_the_build(server: TestServer, client: aiohttp.ClientSession) -> None:
    for path in ("/made-up/1", "/made-up/2"):
        async with client.request("PROPFIND", server.make_url(path)) as response:
            assert response.status == 404
    async with client.post(server.make_url(RPC), json=CALL):
        pass
    async with client.get(server.make_url("/metrics")) as response:
        page = await response.text()
    assert 'mistify_http_requests_total{method="other",route="none",status="404"} 2.0' in page
    assert f'mistify_http_requests_total{{method="POST",route="{RPC}",status="200"}} 1.0' in page
    assert 'mistify_rpc_calls_total{method="ImageStore.GetImage",outcome="ok"} 1.0' in page
    assert 'mistify_build_info{component="sample",version="1.2"} 1.0' in page
    assert "mistify_http_in_flight 1.0" in page
    assert "made-up" not in page


def test_metrics_of_times_are_counted_in_buckets_that_include_the_lower_ones() -> None:
    metrics = Metrics("sample", "1")
    for duration_s in (0.0005, 0.002, 1000.0):
        metrics.count_call("m", "ok", duration_s)
    page = metrics.render()[0].decode()
    for bound, count in (("0.0005", 1), ("0.001", 1), ("0.0025", 2), ("300.0", 2), ("+Inf", 3)):
        assert f'mistify_rpc_call_seconds_bucket{{le="{bound}",method="m"}} {count}.0' in page
    assert 'mistify_rpc_call_seconds_count{method="m"} 3.0' in page


def test_two_applications_in_one_process_count_apart() -> None:
    first, second = make_app(), make_app()
    first[METRICS].count_call("m", "ok", 0.1)
    assert b'method="m"' in first[METRICS].render()[0]
    assert b'method="m"' not in second[METRICS].render()[0]


async def test_access_log_writes_fields_and_samples_beyond_the_limit(
    server: TestServer, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "ACCESS_LINES_MAX_PER_S", 1)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    with caplog.at_level(logging.INFO, "rpc.access"):
        for _ in range(3):
            async with client.get(server.make_url("/healthz")):
                pass
        monkeypatch.setattr(time, "monotonic", lambda: 1001.0)
        async with client.get(server.make_url("/healthz")):
            pass
    lines = [record.__dict__ for record in caplog.records if record.name == "rpc.access"]
    assert [line["suppressed"] for line in lines] == [None, 2]
    assert (lines[0]["http_method"], lines[0]["path"], lines[0]["status"]) == ("GET", "/healthz", 200)
