"""Both kinds of both clients against real servers."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from imaging import errors
from imaging.errors import (
    BadDataError,
    BusyError,
    InternalError,
    InvalidArgumentError,
    MistifyError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UnsupportedError,
    WrongKindError,
)
from rpc import transport
from rpc.client import (
    AgentCalls,
    AgentClient,
    AsyncAgentClient,
    AsyncImageServiceClient,
    ImageServiceCalls,
    ImageServiceClient,
)
from rpc.dispatch import error_data, error_number
from rpc.failures import error_from_rpc, error_from_status
from rpc.messages import (
    FetchRequest,
    Guest,
    GuestRequest,
    ImageRecord,
    ImageRequest,
    SnapshotRequest,
    VolumeRequest,
    to_wire,
)
from rpc.methods import AGENT_METHODS
from rpc.rest import CODE_HEADER, render_text_error, respond_to_error
from rpc.server import ServerSettings, create_app
from rpc.transport import Download, Endpoint, HttpCall
from tests.unit.rpc_parts import RPC, sample_registry

Serve = Callable[[web.Application], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves applications from a loop on another thread, so that waiting clients can wait."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers: list[TestServer] = []

    def start(app: web.Application) -> str:
        server = TestServer(app)
        asyncio.run_coroutine_threadsafe(server.start_server(), loop).result(30)
        servers.append(server)
        return str(server.make_url("/"))

    yield start
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


def agent_app(token: str | None = None) -> web.Application:
    app = create_app(ServerSettings(component="sample", token=token), registry=sample_registry())

    async def download(request: web.Request) -> web.StreamResponse:
        wanted = (await request.json())["id"]
        if wanted == "none":
            raise NotFoundError("not found")
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"stream of " + wanted.encode())
        if wanted == "short":
            raise ValueError("the source broke")
        return response

    app.router.add_route("*", "/snapshots/download", download)
    return app


def service_app() -> web.Application:
    """The wire of the image service, with one record in memory."""
    app = create_app(ServerSettings(component="service"))
    stored: dict[str, Any] = {
        "record": {"id": "i1", "type": "kvm", "status": "complete", "size": 5, "expected_size": 5},
        "bytes": b"hello",
    }

    async def get_all(request: web.Request) -> web.Response:
        return web.json_response([stored["record"]] if request.query.get("type", "kvm") == "kvm" else [])

    async def get_one(request: web.Request) -> web.Response:
        if request.match_info["id"] != "i1":
            raise NotFoundError("not found")
        return web.json_response(stored["record"])

    async def fetch(request: web.Request) -> web.Response:
        return web.json_response(await request.json() | {"id": "i2", "status": "pending"}, status=202)

    async def upload(request: web.Request) -> web.Response:
        data = await request.content.read()
        record = {
            "id": "i3",
            "type": request.headers["X-Image-Type"],
            "comment": request.headers.get("X-Image-Comment", ""),
            "digest": request.headers.get("X-Image-Digest", ""),
            "size": len(data),
        }
        return web.json_response(record)

    async def download(request: web.Request) -> web.Response:
        start = request.http_range.start
        if start is None or request.match_info["id"] == "no-range":
            return web.Response(body=stored["bytes"])
        return web.Response(status=206, body=stored["bytes"][start:])

    app.router.add_get("/images", get_all)
    app.router.add_post("/images", fetch)
    app.router.add_put("/images", upload)
    app.router.add_get("/images/{id}", get_one)
    app.router.add_delete("/images/{id}", get_one)
    app.router.add_get("/images/{id}/download", download)
    return app


def answer_app(status: int, body: bytes) -> web.Application:
    async def say(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", say)
    return app


class Caller:
    """Calls the waiting or the looping client alike."""

    def __init__(self, url: str, *, flavour: str, is_service: bool = False, **options: Any) -> None:
        self._kinds = (ImageServiceClient, AsyncImageServiceClient) if is_service else (AgentClient, AsyncAgentClient)
        self._url, self._is_async, self._options = url, flavour == "async", options

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not self._is_async:
            with self._kinds[0](self._url, **self._options) as client:
                return getattr(client, name)(*args, **kwargs)
        return asyncio.run(self._call(name, args, kwargs))

    async def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        async with self._kinds[1](self._url, **self._options) as client:
            return await getattr(client, name)(*args, **kwargs)

    def read(self, name: str, *args: Any, **kwargs: Any) -> bytes:
        if self._is_async:
            return asyncio.run(self._read(name, args, kwargs))
        with self._kinds[0](self._url, **self._options) as client, getattr(client, name)(*args, **kwargs) as pieces:
            return b"".join(pieces)

    async def _read(self, name: str, args: Any, kwargs: Any) -> bytes:
        async with (
            self._kinds[1](self._url, **self._options) as client,
            getattr(client, name)(*args, **kwargs) as pieces,
        ):
            return b"".join([piece async for piece in pieces])


@pytest.fixture(params=["sync", "async"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- the agent -------------------------------------------------------------------------------------------------------------


def test_agent_calls_give_typed_answers(serve: Serve, flavour: str) -> None:
    call = Caller(serve(agent_app()), flavour=flavour)
    assert call("get_image", ImageRequest(id="a")).images[0].size_mib == 4
    assert call("list_images").images == []
    assert call("create_volume", VolumeRequest(id="v", size_mib=3)).volumes[0].id == "mistify/v"


def test_agent_call_keeps_what_others_own_in_a_guest(serve: Serve, flavour: str) -> None:
    guest = Guest(id="g", extra={"owner": {"x": [1]}})
    answer = Caller(serve(agent_app()), flavour=flavour)("create_guest_disks", GuestRequest(guest=guest))
    assert answer.guest.extra == {"owner": {"x": [1]}}
    assert [disk.size_mib for disk in answer.guest.disks] == [1]


@pytest.mark.parametrize(
    ("image", "kind", "words"),
    [
        ("missing", NotFoundError, "not found"),
        ("later", UnavailableError, "queue is full"),
        ("broken", InternalError, "incident"),
    ],
)
def test_agent_error_comes_back_as_its_class(
    serve: Serve, flavour: str, image: str, kind: type[MistifyError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        Caller(serve(agent_app()), flavour=flavour)("get_image", ImageRequest(id=image))
    assert type(caught.value) is kind


def test_agent_busy_error_brings_its_dependants(serve: Serve, flavour: str) -> None:
    with pytest.raises(BusyError) as caught:
        Caller(serve(agent_app()), flavour=flavour)("get_image", ImageRequest(id="busy"))
    assert caught.value.dependants == ("mistify/guests/g1/disk-0", "mistify/guests/g2/disk-0")


def test_agent_method_the_server_lacks_is_unsupported(serve: Serve, flavour: str) -> None:
    with pytest.raises(UnsupportedError):
        Caller(serve(agent_app()), flavour=flavour)("get_snapshot", SnapshotRequest(id="x"))


def test_agent_token_is_shown(serve: Serve, flavour: str) -> None:
    url = serve(agent_app(token="s3cret"))
    assert Caller(url, flavour=flavour, token="s3cret")("list_images").images == []
    for token in (None, "wrong"):
        with pytest.raises(NotPermittedError, match="bearer token"):
            Caller(url, flavour=flavour, token=token)("list_images")


def test_snapshot_download_gives_the_bytes(serve: Serve, flavour: str) -> None:
    assert Caller(serve(agent_app()), flavour=flavour).read("download_snapshot", "f@s1") == b"stream of f@s1"


def test_snapshot_download_of_unknown_is_not_found(serve: Serve, flavour: str) -> None:
    with pytest.raises(NotFoundError, match="not found"):
        Caller(serve(agent_app()), flavour=flavour).read("download_snapshot", "none")


def test_code_in_the_header_survives_a_body_of_any_shape(serve: Serve, flavour: str) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return respond_to_error(WrongKindError("not a snapshot"), render_text_error)

    app = web.Application()
    app.router.add_post("/snapshots/download", refuse)
    with pytest.raises(WrongKindError, match="not a snapshot"):
        Caller(serve(app), flavour=flavour).read("download_snapshot", "f")


def test_snapshot_download_that_breaks_is_an_error_not_an_end(serve: Serve, flavour: str) -> None:
    with pytest.raises(UnavailableError, match="connection failed"):
        Caller(serve(agent_app()), flavour=flavour).read("download_snapshot", "short")


# -- servers that misbehave ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"<html>", BadDataError),
        (200, b"[" * 100_000, BadDataError),
        (200, b"[]", BadDataError),
        (200, b'{"result": 5, "id": 1}', BadDataError),
        (200, b'{"result": {"images": 5}, "id": 1}', BadDataError),
        (200, b'{"result": null, "error": "not found", "id": 1}', NotFoundError),
        (200, b'{"result": null, "error": "odd", "id": 1}', InternalError),
        (200, b'{"result": null, "error": 5, "id": 1}', InternalError),
        (
            200,
            b'{"result": null, "error": {"code": -1, "message": "m", "data": {"code": "newer", "retryable": true}}}',
            UnavailableError,
        ),
        (200, b'{"result": null, "error": {"code": -1, "message": "m", "data": [1]}}', InternalError),
        (400, b"rpc: can't find method", InvalidArgumentError),
        (502, b"<html>bad gateway", UnavailableError),
        (418, b"", InternalError),
    ],
)
def test_agent_answer_that_is_odd_is_a_mapped_error(
    serve: Serve, flavour: str, status: int, body: bytes, kind: type[MistifyError]
) -> None:
    with pytest.raises(kind) as caught:
        Caller(serve(answer_app(status, body)), flavour=flavour)("list_images")
    assert type(caught.value) is kind


def test_answer_beyond_the_limit_is_refused(serve: Serve, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ANSWER_MAX_BYTES", 1000)
    with pytest.raises(BadDataError, match="larger than 1000 bytes"):
        Caller(serve(answer_app(200, b" " * 1001)), flavour=flavour)("list_images")


def test_server_that_is_not_there_is_unavailable(flavour: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        with pytest.raises(UnavailableError, match="connection failed"):
            Caller(f"http://127.0.0.1:{taken.getsockname()[1]}", flavour=flavour)("list_images")


def test_server_that_never_answers_is_unavailable(flavour: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UnavailableError, match="no answer in time"):
        Caller(f"http://127.0.0.1:{silent.getsockname()[1]}", flavour=flavour, timeout_s=0.1)("list_images")


# -- the image service -----------------------------------------------------------------------------------------------------


def test_service_calls_give_typed_records(serve: Serve, flavour: str) -> None:
    call = Caller(serve(service_app()), flavour=flavour, is_service=True)
    record = ImageRecord(id="i1", type="kvm", status="complete", size_bytes=5, expected_size_bytes=5)
    assert call("list_images") == [record]
    assert call("list_images", "container") == []
    assert call("get_image", "i1") == record
    assert call("delete_image", "i1") == record
    assert call("fetch_image", FetchRequest(source="http://x/y", type="kvm")).status == "pending"
    with pytest.raises(NotFoundError):
        call("get_image", "../i1")


@pytest.mark.parametrize("shape", ["bytes", "file", "iterator"])
def test_service_upload_takes_any_shape_of_bytes(serve: Serve, flavour: str, shape: str) -> None:
    body: Any = {"bytes": b"abcde", "file": io.BytesIO(b"abcde"), "iterator": iter([b"ab", b"cde"])}[shape]
    caller = Caller(serve(service_app()), flavour=flavour, is_service=True)
    record = caller("upload_image", body, image_type="kvm", comment="c", digest="sha256:x")
    assert (record.type, record.comment, record.digest, record.size_bytes) == ("kvm", "c", "sha256:x", 5)


def test_service_upload_from_an_async_iterator(serve: Serve) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"cde"

    caller = Caller(serve(service_app()), flavour="async", is_service=True)
    assert caller("upload_image", pieces(), image_type="kvm").size_bytes == 5


def test_service_download_gives_the_bytes_from_an_offset(serve: Serve, flavour: str) -> None:
    caller = Caller(serve(service_app()), flavour=flavour, is_service=True)
    assert caller.read("download_image", "i1") == b"hello"
    assert caller.read("download_image", "i1", offset_bytes=2) == b"llo"
    with pytest.raises(UnsupportedError, match="part"):
        caller.read("download_image", "no-range", offset_bytes=2)


# -- tables ----------------------------------------------------------------------------------------------------------------


def test_agent_calls_cover_every_method_of_the_agent() -> None:
    sent = set()
    for endpoint in vars(AgentCalls).values():
        if isinstance(endpoint, Endpoint):
            sent |= {method_in(endpoint.build(request())) for request in requests_of(endpoint)}
    assert sent == {method.name for method in AGENT_METHODS}


def method_in(call: HttpCall) -> str:
    assert isinstance(call.body, bytes)
    return str(json.loads(call.body)["method"])


def requests_of(endpoint: Endpoint[Any, Any]) -> list[Any]:
    name = next(name for name, one in vars(AgentCalls).items() if one is endpoint)
    wanted = name.replace("_", "")
    return [method.request for method in AGENT_METHODS if method.name.partition(".")[2].lower() == wanted]


@pytest.mark.parametrize("calls", [AgentCalls, ImageServiceCalls])
def test_clients_of_both_kinds_have_the_same_calls(calls: type) -> None:
    names = {name for name, one in vars(calls).items() if isinstance(one, Endpoint | Download)}
    kinds = (AgentClient, AsyncAgentClient) if calls is AgentCalls else (ImageServiceClient, AsyncImageServiceClient)
    assert names
    assert all(hasattr(kind, name) for kind in kinds for name in names)


def all_errors() -> list[type[MistifyError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MistifyError)]
    return [kind for kind in kinds if kind is not MistifyError]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_error_of_every_class_survives_rpc_and_http(kind: type[MistifyError]) -> None:
    err = kind("what failed")
    data = {"code": error_data(err).code, "retryable": err.retryable}
    assert type(error_from_rpc({"code": error_number(err), "message": err.message, "data": data})) is kind
    body = respond_to_error(err).body
    assert isinstance(body, bytes)
    assert type(error_from_status(err.http_status, body)) is kind
    assert (
        type(
            error_from_status(
                err.http_status, b"any shape", respond_to_error(err, render_text_error).headers[CODE_HEADER]
            )
        )
        is kind
    )


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_error_status_alone_gives_a_class_of_the_same_status(kind: type[MistifyError]) -> None:
    assert error_from_status(kind.http_status, b"").http_status == kind.http_status


def test_request_to_wire_of_a_rpc_path_is_the_servers() -> None:
    call = AgentCalls.get_image.build(ImageRequest(id="a"))
    assert call.path == RPC
    assert isinstance(call.body, bytes)
    assert json.loads(call.body)["params"] == [
        json.loads(json.dumps({"id": "a", "type": "", "dest": "", "source": ""}))
    ]
    assert to_wire(ImageRequest(id="a")) == ImageRequest(id="a")
