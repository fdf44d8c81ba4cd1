"""The container images of a running image service, as the commands over a store show them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import requests
import urllib3

from imaging.aci import parse_app_string
from imaging.digests import Digest, MultiHasher
from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError, UnavailableError
from imaging.files import os_errors, write_all
from imaging.names import ImageId

TIMEOUT_S = (10.0, 60.0)
"""To connect, and to wait for the next byte."""

PIECE_BYTES = 1 << 20


class ServiceImages:
    """One service, by its address."""

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidArgumentError(f"not an http or https URL: {url[:300]!r}")
        self._url = url.rstrip("/")

    @contextmanager
    def _call(self, method: str, path: str, query: Mapping[str, Any] | None = None) -> Iterator[requests.Response]:
        try:
            with requests.request(
                method,
                self._url + path,
                params=query,
                headers={"Accept-Encoding": "identity"},
                timeout=TIMEOUT_S,
                stream=True,
            ) as answer:
                _check(answer)
                yield answer
        except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
            raise UnavailableError(f"cannot ask the image service at {self._url[:300]}") from err

    def list(self, **query: Any) -> list[dict[str, Any]]:
        """Records of container images, by id."""
        with self._call("GET", "/images", {"type": "container"} | query) as answer:
            records: list[dict[str, Any]] = answer.json()
            return records

    def get(self, reference: str) -> dict[str, Any]:
        """The record of an id or of the youngest image with a name and labels; NotFoundError."""
        if found := self._find_id(reference):
            return found
        app = parse_app_string(reference)
        labels = [f"{name}={value}" for name, value in app.labels.items()]
        records = self.list(name=app.name, label=labels, status="complete")
        if not records:
            raise NotFoundError(f"no image {reference[:300]}")
        return max(records, key=lambda record: str(record.get("download_end", "")))

    def _find_id(self, reference: str) -> dict[str, Any] | None:
        try:
            image_id = ImageId.parse(reference)
            with self._call("GET", f"/images/{quote(image_id.text)}") as answer:
                record: dict[str, Any] = answer.json()
                return record
        except (InvalidArgumentError, NotFoundError):
            return None

    def delete(self, reference: str) -> None:
        """Remove an image."""
        with self._call("DELETE", f"/images/{quote(self.get(reference)['id'])}"):
            return

    def export(self, reference: str, fd: int) -> None:
        """Write an image's bytes to a file, verified."""
        record = self.get(reference)
        hasher = MultiHasher()
        with self._call("GET", f"/images/{quote(record['id'])}/download") as answer:
            while piece := answer.raw.read(PIECE_BYTES, decode_content=False):
                with os_errors("cannot write the image"):
                    write_all(fd, piece, hasher.size_bytes)
                hasher.update(piece)
        if not hasher.digest().matches(Digest.parse(record["digest"])):
            raise BadDataError(f"the downloaded image is damaged: {record['id']}")
        with os_errors("cannot write the image"):
            os.ftruncate(fd, hasher.size_bytes)


def _check(answer: requests.Response) -> None:
    if answer.status_code < requests.codes.bad_request:
        return
    try:
        message = str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = f"bad HTTP status code: {answer.status_code}"
    kinds: dict[int, type[MistifyError]] = {400: InvalidArgumentError, 404: NotFoundError}
    raise kinds.get(answer.status_code, UnavailableError)(message)
