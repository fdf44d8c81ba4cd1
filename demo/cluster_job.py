"""An image's way through a cluster while something is killed: upload in parts, pull, clone, compare, delete.

Every call is made again if it failed as calls do when something behind them is being replaced. What an operator's script would do, too.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

import requests

from demo import disks
from demo.errors import DemoError
from imaging.errors import BusyError, NotFoundError, UnavailableError
from rpc.client import AgentClient, ImageServiceClient
from rpc.messages import Disk, Guest, GuestRequest, ImageRequest

PART_BYTES = 3 << 20
"""Small, so that a disk of some megabytes has several parts."""

CALL_TIMEOUT_S = 20.0
"""One call: longer than every wait for a lease or an election behind it."""

GIVE_UP_S = 120.0
"""How long one call is made again and again: everything killed here is back long before."""

PAUSE_S = 0.3
"""Between two tries."""

_TUS = {"Tus-Resumable": "1.0.0"}
_TRY_AGAIN = frozenset({404, 409, 423, 429, 500, 502, 503, 504})
"""404 and 409 are answers about an upload whose replica has just gone, or another still holds."""

T = TypeVar("T")


@dataclass
class Job:
    """One image's way. ``run`` it in a thread."""

    name: str
    disk: Path
    service_url: str
    agent_url: str
    sent_bytes: int = 0
    tries_again: int = 0
    image_id: str = ""

    def __post_init__(self) -> None:
        self.is_half_sent = Event()
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business on loopback

    def run(self) -> None:
        """Go all the way; DemoError if something is not as it should be."""
        self.image_id = self._upload()
        with AgentClient(self.agent_url) as agent, ImageServiceClient(self.service_url) as service:
            self._again(lambda: agent.request_image(ImageRequest(id=self.image_id)))
            guest = Guest(id=self.name, disks=[Disk(image=self.image_id)])
            [disk] = agent.create_guest_disks(GuestRequest(guest=guest)).guest.disks
            if disks.sha256_of(Path(disk.source)) != disks.sha256_of(self.disk):
                raise DemoError(f"the disk of {self.name} is not what was uploaded")
            agent.delete_guests_disks(GuestRequest(guest=Guest(id=self.name)))
            agent.delete_image(ImageRequest(id=self.image_id))
            self._again(lambda: _ensure_deleted(service, self.image_id))
        self._session.close()

    def _upload(self) -> str:
        """Send the disk in parts, each where the service says that it goes on; the image's id."""
        size = self.disk.stat().st_size
        kind = f"type {base64.b64encode(b'kvm').decode()}"
        begun = self._again(
            lambda: self._call("POST", "/uploads", {"Upload-Length": str(size), "Upload-Metadata": kind})
        )
        path = begun.headers["Location"]
        with self.disk.open("rb") as file:
            while self.sent_bytes < size:
                self.sent_bytes = self._again(lambda: int(self._call("HEAD", path, {}).headers["Upload-Offset"]))
                if self.sent_bytes < size:
                    file.seek(self.sent_bytes)
                    self._send(path, file.read(PART_BYTES))
                if self.sent_bytes >= size // 3:
                    self.is_half_sent.set()
        return path.rpartition("/")[2]

    def _send(self, path: str, part: bytes) -> None:
        """Send one part; if that fails, the service is asked anew where it is."""
        headers = {"Upload-Offset": str(self.sent_bytes), "Content-Type": "application/offset+octet-stream"}
        try:
            self._call("PATCH", path, headers, part)
        except UnavailableError:
            self._pause()

    def _call(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> requests.Response:
        url = self.service_url + path
        try:
            answer = self._session.request(method, url, headers={**_TUS, **headers}, data=body, timeout=CALL_TIMEOUT_S)
        except requests.RequestException as err:
            raise UnavailableError(f"{method} {path} got no answer") from err
        if answer.status_code in _TRY_AGAIN:
            raise UnavailableError(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        if not answer.ok:
            raise DemoError(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer

    def _again(self, call: Callable[[], T]) -> T:
        """Call until it succeeds; DemoError after the bound."""
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            try:
                return call()
            except (UnavailableError, BusyError) as err:
                if time.monotonic() > deadline:
                    raise DemoError(f"{self.name}: {err} for {GIVE_UP_S:.0f} s") from err
                self._pause()

    def _pause(self) -> None:
        self.tries_again += 1
        Event().wait(PAUSE_S)


def _ensure_deleted(service: ImageServiceClient, image_id: str) -> None:
    """Delete an image; one whose deletion was done but not answered is gone, too."""
    try:
        service.delete_image(image_id)
    except NotFoundError:
        return
