"""Clients of the two daemons for programs: the same calls, synchronous on requests and asynchronous on aiohttp.

    with AgentClient("http://127.0.0.1:19999") as agent:
        images = agent.get_image(ImageRequest(id="debian-12")).images

    async with AsyncAgentClient("http://127.0.0.1:19999") as agent:
        answer = await agent.get_image(ImageRequest(id="debian-12"))

Errors of the server arrive as the classes of :mod:`imaging.errors` they left as; a server that cannot be reached, does not answer in
time or hangs up is UnavailableError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from imaging.errors import BadDataError, InvalidArgumentError
from rpc import methods
from rpc.failures import error_from_rpc
from rpc.messages import FetchRequest, ImageRecord, Message, from_wire, to_wire
from rpc.methods import AgentMethod
from rpc.transport import AsyncTransport, Body, Download, Endpoint, HttpCall, SyncTransport

RPC_PATH = "/_mistify_RPC_"

_JSON = {"Content-Type": "application/json"}

_PLAIN = {"Accept-Encoding": "identity"}
"""Images and streams come as they are: their bytes are what digests are made of."""

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
M = TypeVar("M", bound=Message)


# -- the agent -------------------------------------------------------------------------------------------------------------


def _remote(method: AgentMethod[Q, A]) -> Endpoint[[Q], A]:
    def build(request: Q, /) -> HttpCall:
        envelope = {"jsonrpc": "2.0", "method": method.name, "params": [to_wire(request)], "id": 1}
        return HttpCall(
            method="POST", path=RPC_PATH, headers=_JSON, body=msgspec.json.encode(envelope), timeout_s=method.timeout_s
        )

    return Endpoint(build, _reader_of_reply(method))


def _remote_list(method: AgentMethod[Q, A]) -> Endpoint[..., A]:
    """A method that makes sense without a request."""
    needy = _remote(method)

    def build(request: Q | None = None, /) -> HttpCall:
        return needy.build(method.request() if request is None else request)

    return Endpoint(build, needy.read)


def _reader_of_reply(method: AgentMethod[Q, A]) -> Callable[[bytes], A]:
    def read(body: bytes) -> A:
        reply = _decode(body, method.name)
        if not isinstance(reply, dict):
            raise BadDataError(f"{method.name}: the reply is not an object")
        if reply.get("error") is not None:
            raise error_from_rpc(reply["error"])
        return _as_message(method.answer, reply.get("result"), method.name)

    return read


def _decode(body: bytes, what: str) -> Any:
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError, msgspec.MsgspecError) as err:
        raise BadDataError(f"{what}: the answer is not JSON") from err


def _as_message(kind: type[M], value: Any, what: str) -> M:
    try:
        return from_wire(kind, value)
    except InvalidArgumentError as err:
        raise BadDataError(f"{what}: the answer is not what it should be: {err.message}") from err


def _download_snapshot(snapshot_id: str) -> HttpCall:
    body = msgspec.json.encode({"id": snapshot_id})
    return HttpCall(method="POST", path="/snapshots/download", headers=_JSON | _PLAIN, body=body, is_transfer=True)


class AgentCalls:
    """What both clients of the agent can do: one method of the agent each."""

    list_images = _remote_list(methods.LIST_IMAGES)
    get_image = _remote(methods.GET_IMAGE)
    request_image = _remote(methods.REQUEST_IMAGE)
    delete_image = _remote(methods.DELETE_IMAGE)
    clone_image = _remote(methods.CLONE_IMAGE)
    list_volumes = _remote_list(methods.LIST_VOLUMES)
    create_volume = _remote(methods.CREATE_VOLUME)
    get_volume = _remote(methods.GET_VOLUME)
    delete_dataset = _remote(methods.DELETE_DATASET)
    list_snapshots = _remote_list(methods.LIST_SNAPSHOTS)
    get_snapshot = _remote(methods.GET_SNAPSHOT)
    create_snapshot = _remote(methods.CREATE_SNAPSHOT)
    delete_snapshot = _remote(methods.DELETE_SNAPSHOT)
    rollback_snapshot = _remote(methods.ROLLBACK_SNAPSHOT)
    verify_disks = _remote(methods.VERIFY_DISKS)
    create_guest_disks = _remote(methods.CREATE_GUEST_DISKS)
    delete_guests_disks = _remote(methods.DELETE_GUESTS_DISKS)
    download_snapshot = Download(_download_snapshot)
    """The snapshot as a send stream, in pieces."""


class AgentClient(AgentCalls, SyncTransport):
    """The agent, for programs that wait."""


class AsyncAgentClient(AgentCalls, AsyncTransport):
    """The agent, for programs with a loop."""


# -- the image service -----------------------------------------------------------------------------------------------------


def _image_path(image_id: str, below: str = "") -> str:
    return f"/images/{quote(image_id, safe='')}{below}"


def _list_images(image_type: str | None = None) -> HttpCall:
    return HttpCall(method="GET", path="/images", query={} if image_type is None else {"type": image_type})


def _get_image(image_id: str) -> HttpCall:
    return HttpCall(method="GET", path=_image_path(image_id))


def _fetch_image(request: FetchRequest) -> HttpCall:
    return HttpCall(method="POST", path="/images", headers=_JSON, body=msgspec.json.encode(to_wire(request)))


def _upload_image(body: Body, *, image_type: str, comment: str = "", digest: str = "") -> HttpCall:
    headers = {"X-Image-Type": image_type, "Content-Type": "application/octet-stream"}
    if comment:
        headers["X-Image-Comment"] = comment
    if digest:
        headers["X-Image-Digest"] = digest
    return HttpCall(method="PUT", path="/images", headers=headers, body=body, is_transfer=True)


def _delete_image(image_id: str) -> HttpCall:
    return HttpCall(method="DELETE", path=_image_path(image_id))


def _download_image(image_id: str, *, offset_bytes: int = 0) -> HttpCall:
    headers = _PLAIN | ({"Range": f"bytes={offset_bytes}-"} if offset_bytes else {})
    path = _image_path(image_id, "/download")
    return HttpCall(method="GET", path=path, headers=headers, is_transfer=True, wants_part=offset_bytes > 0)


def _read_record(body: bytes) -> ImageRecord:
    return _as_message(ImageRecord, _decode(body, "image record"), "image record")


def _read_records(body: bytes) -> list[ImageRecord]:
    values = _decode(body, "image list")
    if not isinstance(values, list):
        raise BadDataError("image list: the answer is not an array")
    return [_as_message(ImageRecord, value, "image list") for value in values]


class ImageServiceCalls:
    """What both clients of the image service can do."""

    list_images = Endpoint(_list_images, _read_records)
    get_image = Endpoint(_get_image, _read_record)
    fetch_image = Endpoint(_fetch_image, _read_record)
    upload_image = Endpoint(_upload_image, _read_record)
    delete_image = Endpoint(_delete_image, _read_record)
    download_image = Download(_download_image)
    """The image's bytes, in pieces."""


class ImageServiceClient(ImageServiceCalls, SyncTransport):
    """The image service, for programs that wait."""


class AsyncImageServiceClient(ImageServiceCalls, AsyncTransport):
    """The image service, for programs with a loop."""
