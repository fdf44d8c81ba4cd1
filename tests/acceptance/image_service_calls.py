"""Calls on a running image service, as tests make them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import requests

from tests.acceptance.daemons import CALL_TIMEOUT_S, Daemon
from tests.waiting import wait_until

FETCHING: dict[str, Any] = {"allow_source_net": "127.0.0.0/8", "fetch_backoff_s": 0.05}
"""Flags of a service that may fetch from the tests' own sources and does not keep them waiting."""

NINE_FIELDS = [
    "id",
    "source",
    "type",
    "comment",
    "status",
    "size",
    "expected_size",
    "download_start",
    "download_end",
]

ZERO_TIME = "0001-01-01T00:00:00Z"


def sha256(data: bytes) -> str:
    """The digest as the wire writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def call(daemon: Daemon, method: str, path: str, **arguments: Any) -> requests.Response:
    """One request; redirects are not followed."""
    return requests.request(
        method, daemon.url + path, timeout=CALL_TIMEOUT_S, **({"allow_redirects": False} | arguments)
    )


def upload(daemon: Daemon, data: Any, *, image_type: str = "kvm", **headers: str) -> dict[str, Any]:
    """PUT an image; its record."""
    response = call(daemon, "PUT", "/images", data=data, headers={"X-Image-Type": image_type} | headers)
    assert response.status_code == 200, response.text
    record: dict[str, Any] = response.json()
    return record


def post(daemon: Daemon, source: str, *, image_type: str = "kvm", **more: Any) -> requests.Response:
    """POST a source."""
    return call(daemon, "POST", "/images", json={"source": source, "type": image_type} | more)


def fetch(daemon: Daemon, source: str, *, image_type: str = "kvm", **more: Any) -> dict[str, Any]:
    """POST a source that must be accepted; its record."""
    response = post(daemon, source, image_type=image_type, **more)
    assert response.status_code == 202, response.text
    record: dict[str, Any] = response.json()
    return record


def record_of(daemon: Daemon, image_id: str) -> dict[str, Any]:
    """GET an image that must be there."""
    response = call(daemon, "GET", f"/images/{image_id}")
    assert response.status_code == 200, response.text
    record: dict[str, Any] = response.json()
    return record


def wait_for(daemon: Daemon, image_id: str, *statuses: str) -> dict[str, Any]:
    """The record once it has one of these statuses; fails at once if it has ended as something else."""

    def look() -> dict[str, Any] | None:
        record = record_of(daemon, image_id)
        if record["status"] in statuses:
            return record
        assert record["status"] not in {"complete", "error"}, f"{record}\n{daemon.log()[-4000:]}"
        return None

    return wait_until(look, f"image {image_id} to be {' or '.join(statuses)}", timeout_s=60) or {}


def download(daemon: Daemon, image_id: str, **headers: str) -> requests.Response:
    """GET the image's bytes."""
    return call(daemon, "GET", f"/images/{image_id}/download", headers=headers)


def stored_files(state_dir: Path) -> list[str]:
    """Every blob and ingest under a state directory."""
    images = state_dir / "images"
    found = [*images.glob("blobs/sha256/*/*"), *images.glob("ingest/*")]
    return sorted(str(path.relative_to(images)) for path in found)
