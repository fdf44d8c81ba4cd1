"""Importing an image of a catalogue: the image service fetches it itself, with the digest the catalogue vouches for.

Files of a directory, which the service can't fetch, are uploaded. Either way the service verifies every byte before anybody sees the image.
Afterwards the image is labelled, so that the service's own catalogue calls it what the other one did.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import requests

from image_service.lifecycle import ImageType
from imaging.errors import BadDataError, MistifyError, NotFoundError, NotPermittedError, UnavailableError
from imaging.files import os_errors
from imaging.simplestreams.paths import join_url
from imaging.simplestreams.sources import FileSource, HttpSource
from imaging.simplestreams.tree import StreamItem

CALL_TIMEOUT_S = 60.0
POLL_S = 0.5
UPLOAD_STALL_TIMEOUT_S = 600.0
"""A server that syncs a large upload to a slow disk before it answers."""

_KINDS: dict[int, type[MistifyError]] = {
    400: BadDataError,
    403: NotPermittedError,
    404: NotFoundError,
    422: BadDataError,
}


class ServiceClient:
    """The few calls of an image service an import needs."""

    def __init__(self, url: str, token: str = "") -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, *, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
        """One request and its answer."""
        try:
            answer = self._session.request(method, f"{self._url}{path}", timeout=timeout_s, **arguments)
            value = answer.json()
        except (requests.RequestException, ValueError) as err:
            raise UnavailableError(f"the image service at {self._url} does not answer") from err
        if not isinstance(value, dict):
            raise BadDataError(f"the image service at {self._url} answered with something else")
        if answer.status_code >= 400:
            kind = _KINDS.get(answer.status_code, UnavailableError)
            raise kind(f"the image service refused: {value.get('message', answer.status_code)}")
        return value


def _fetch(client: ServiceClient, url: str, item: StreamItem, image_type: ImageType, comment: str) -> str:
    body = {
        "source": url,
        "type": image_type.value,
        "comment": comment,
        "digest": f"sha256:{item.attributes['sha256']}",
    }
    return str(client.call("POST", "/images", json=body)["id"])


def _upload(client: ServiceClient, source: FileSource, item: StreamItem, image_type: ImageType, comment: str) -> str:
    headers = {
        "X-Image-Type": image_type.value,
        "X-Image-Digest": f"sha256:{item.attributes['sha256']}",
        "X-Image-Comment": comment.encode("utf-8").decode("latin-1"),
    }
    file = source.directory / item.path
    with os_errors(f"cannot read {file}"), file.open("rb") as data:
        answer = client.call("PUT", "/images", data=data, headers=headers, timeout_s=UPLOAD_STALL_TIMEOUT_S)
    return str(answer["id"])


def labels_of(item: StreamItem) -> dict[str, Any]:
    """How the image is called in its catalogue."""
    given = item.attributes
    names = ("os", "release", "release_title", "version", "arch", "variant", "support_eol")
    labels: dict[str, Any] = {name: given[name].replace(":", "-") for name in names if given.get(name)}
    return labels | ({"aliases": item.aliases} if item.aliases else {})


def import_image(
    client: ServiceClient,
    source: HttpSource | FileSource,
    item: StreamItem,
    image_type: ImageType,
    *,
    timeout_s: float,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Bring an image into the service; its record once it is complete. The service's own errors, UnavailableError after ``timeout_s``."""
    comment = f"{source.description}: {item.product} {item.version}"
    if isinstance(source, HttpSource):
        image_id = _fetch(client, join_url(source.base, item.path), item, image_type, comment)
    else:
        image_id = _upload(client, source, item, image_type, comment)
    record = _wait(client, image_id, timeout_s, progress)
    client.call("PUT", f"/catalog/images/{image_id}", json=labels_of(item))
    return record


def _wait(
    client: ServiceClient, image_id: str, timeout_s: float, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        record = client.call("GET", f"/images/{image_id}")
        progress(record)
        if record["status"] == "complete":
            return record
        if record["status"] == "error":
            raise BadDataError(f"image {image_id} was not imported: {record.get('error', 'no reason given')}")
        if time.monotonic() > deadline:
            raise UnavailableError(f"image {image_id} is not here after {timeout_s:g} s; the service goes on")
        threading.Event().wait(POLL_S)
