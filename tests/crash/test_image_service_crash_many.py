"""Twenty clients upload, upload in parts, have images fetched and delete them, while the service is killed fifty times."""

from __future__ import annotations

import base64
import collections
import gzip
import random
import threading
from pathlib import Path

import pytest
import requests

from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import (
    FETCHING,
    call,
    download,
    fetch,
    sha256,
    stored_files,
    upload,
)
from tests.fakes.source_server import Source, SourceServer, start_source_server
from tests.waiting import wait_until

KILLS = 50
CLIENTS = 20
WORK_MIN = 12
"""Acknowledgements of a life, before the random instant at which it ends: however slow the machine, every life has done something."""
START_KILLS = 5
"""Every so many lives one ends while it begins."""
KINDS = ("put", "tus", "fetch", "delete")
"""The others in turn wait for one acknowledgement of each kind."""
KIND_MIN = (KILLS - KILLS // START_KILLS) // len(KINDS)
"""Acknowledgements of each kind there must be, then, however slow the machine."""
SEED = random.SystemRandom().randrange(1 << 32)
TUS = {"Tus-Resumable": "1.0.0"}
BODY = "application/offset+octet-stream"


class _Client:
    """Works until told to stop, and remembers what was acknowledged."""

    def __init__(self, service: Daemon, sources: SourceServer, number: int, stop: threading.Event) -> None:
        self._service = service
        self._sources = sources
        self._number = number
        self._chance = random.Random(SEED + number)
        self._stop = stop
        self.there: dict[str, str] = {}
        """Acknowledged images and their digests."""
        self.fetched: dict[str, str] = {}
        """Sources accepted to be fetched, and the digests they have."""
        self.fetches: dict[str, str] = {}
        """Those of its own, and the images they become."""
        self.done = collections.Counter[str]()
        """What was acknowledged, by kind."""
        self.gone: set[str] = set()
        self.sent: set[str] = set()
        self.parts: list[tuple[str, bytes]] = []
        """Uploads in parts that were not acknowledged as whole."""
        self.failures: list[str] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                kinds = [self._put, self._tus, self._fetch, self._fetch_shared, self._delete, self._delete_fetch]
                self._chance.choice(kinds)()
            except requests.RequestException:
                self._stop.wait(0.05)  # it was killed, or is not there yet
            except AssertionError as err:
                self.failures.append(str(err))

    def _content(self, size_max: int = 400_000) -> bytes:
        content = self._chance.randbytes(self._chance.randrange(1, size_max))
        return gzip.compress(content, 1) if self._chance.random() < 0.3 else content

    def _put(self) -> None:
        content = self._content()
        self.sent.add(sha256(content))
        self.there[upload(self._service, content)["id"]] = sha256(content)
        self.done["put"] += 1

    def _tus(self) -> None:
        """Go on with an upload in parts, or begin one."""
        if not self.parts or self._chance.random() < 0.2:
            content = self._content(1_000_000)
            self.sent.add(sha256(content))
            digest = base64.b64encode(sha256(content).encode()).decode()
            headers = TUS | {"Upload-Length": str(len(content)), "Upload-Metadata": f"type a3Zt,digest {digest}"}
            response = call(self._service, "POST", "/uploads", headers=headers)
            assert response.status_code == 201, response.text
            self.parts.append((response.headers["Location"], content))
        path, content = self.parts[0]
        while not self._stop.is_set() and not self._next_part(path, content):
            continue

    def _next_part(self, path: str, content: bytes) -> bool:
        """One part; whether the upload was acknowledged as whole."""
        state = call(self._service, "HEAD", path, headers=TUS)
        assert state.status_code == 200, f"an upload was lost: {path} {state.status_code}"
        offset = int(state.headers["Upload-Offset"])
        if offset < len(content):
            end = offset + self._chance.randrange(1, 400_000)
            headers = TUS | {"Upload-Offset": str(offset), "Content-Type": BODY}
            response = call(self._service, "PATCH", path, data=content[offset:end], headers=headers)
            if response.status_code == 423:  # the part before has not noticed yet that we are gone
                return False
            assert response.status_code == 204, response.text
            offset = int(response.headers["Upload-Offset"])
        if offset < len(content):
            return False
        self.there[path.rsplit("/", 1)[1]] = sha256(content)
        del self.parts[0]
        self.done["tus"] += 1
        return True

    def _fetch(self) -> None:
        content = self._content()
        url = self._sources.add(f"/{self._number}/{len(self.fetched)}/{self._chance.random()}", Source(content))
        self.fetches[url] = self._ask(url, content)

    def _fetch_shared(self) -> None:
        content = b"shared by all %d" % (number := self._chance.randrange(10)) * 20_000
        self._ask(self._sources.add(f"/shared/{number}", Source(content)), content)

    def _ask(self, url: str, content: bytes) -> str:
        self.sent.add(sha256(content))
        image_id: str = fetch(self._service, url)["id"]
        self.fetched[url] = sha256(content)
        self.done["fetch"] += 1
        return image_id

    def _delete_fetch(self) -> None:
        """A fetch, under way or done."""
        if self.fetches:
            url = self._chance.choice(sorted(self.fetches))
            image_id = self.fetches.pop(url)
            del self.fetched[url]  # if the answer is lost, both outcomes are right
            self._remove(image_id)

    def _delete(self) -> None:
        if not self.there:
            return
        image_id = self._chance.choice(sorted(self.there))
        del self.there[image_id]  # if the answer is lost, both outcomes are right
        self._remove(image_id)

    def _remove(self, image_id: str) -> None:
        response = call(self._service, "DELETE", f"/images/{image_id}")
        assert response.status_code == 200, response.text
        self.gone.add(image_id)
        self.done["delete"] += 1


def _unfinished(service: Daemon) -> list[str]:
    return [r["id"] for r in call(service, "GET", "/images").json() if r["status"] in {"pending", "downloading"}]


def _wait_for_work(clients: list[_Client], kind: str, what: str) -> None:
    """So many acknowledgements, one of them of that kind."""

    def done() -> tuple[int, int]:
        return sum(client.done.total() for client in clients), sum(client.done[kind] for client in clients)

    all_before, kind_before = done()

    def enough() -> bool:
        all_now, kind_now = done()
        return all_now - all_before >= WORK_MIN and kind_now > kind_before

    wait_until(enough, f"{kind} in {what}", timeout_s=120)


def _work_and_kill(service: Daemon, sources: SourceServer) -> list[_Client]:
    chance, stop, pause = random.Random(SEED), threading.Event(), threading.Event()
    clients = [_Client(service, sources, number, stop) for number in range(CLIENTS)]
    for client in clients:
        client.thread.start()
    try:
        for number in range(KILLS):
            if number % START_KILLS == START_KILLS - 1:
                pause.wait(chance.uniform(0, 1.5))
            else:
                kind = KINDS[(number - number // START_KILLS) % len(KINDS)]
                _wait_for_work(clients, kind, f"life {number} (seed {SEED})")
                pause.wait(chance.uniform(0, 0.3))
            service.kill()
            service.start(wait=False)
        wait_until(service.is_ready, "the last life", timeout_s=60)
    finally:
        stop.set()
        for client in clients:
            client.thread.join()
    return clients


def _end_parts(service: Daemon, clients: list[_Client]) -> None:
    """What was not acknowledged as whole is given up, or has become an image."""
    for path, content in [part for client in clients for part in client.parts]:
        response = call(service, "DELETE", path, headers=TUS)
        if response.status_code == 404:
            record = call(service, "GET", f"/images/{path.rsplit('/', 1)[1]}").json()
            assert record["digest"] == sha256(content), f"seed {SEED}: {record}"
        else:
            assert response.status_code == 204, f"seed {SEED}: {response.text}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_lose_nothing_that_was_acknowledged_and_leave_nothing_else(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    flags = FETCHING | {"fetch_checkpoint_s": 0.02, "collect_interval_s": 0.2, "fetch_failures_max": 50}
    with start_source_server() as sources, start_image_service(state_dir, **flags) as service:
        clients = _work_and_kill(service, sources)
        assert [failure for client in clients for failure in client.failures] == [], f"seed {SEED}"
        wait_until(lambda: not _unfinished(service), f"every fetch to end (seed {SEED})", timeout_s=120)
        _end_parts(service, clients)
        service.kill()
        service.start()  # which collects garbage
        found = {record["id"]: record for record in call(service, "GET", "/images").json()}
        _check_acknowledged(clients, found)
        for image_id, record in found.items():
            response = download(service, image_id)
            assert response.status_code == 200, f"seed {SEED}: {record}: {response.text}"
            assert sha256(response.content) == record["digest"], f"seed {SEED}: {record}"
        blobs = {record["digest"].removeprefix("sha256:") for record in found.values()}
        assert {Path(name).name for name in stored_files(state_dir)} == blobs, f"seed {SEED}: stray bytes"


def _check_acknowledged(clients: list[_Client], found: dict[str, dict[str, str]]) -> None:
    sources = collections.Counter(record["source"] for record in found.values() if record["source"])
    assert [source for source, count in sources.items() if count > 1] == [], f"seed {SEED}: two records for a source"
    by_source = {record["source"]: record["digest"] for record in found.values()}
    sent = set[str]().union(*(client.sent for client in clients))
    for client in clients:
        lost = {
            image_id for image_id, digest in client.there.items() if found.get(image_id, {}).get("digest") != digest
        }
        assert not lost, f"seed {SEED}: acknowledged images are gone or changed: {lost}"
        assert not client.gone & set(found), f"seed {SEED}: deleted images are back"
        for url, digest in client.fetched.items():
            assert by_source.get(url) == digest, f"seed {SEED}: a fetch was lost: {url}"
    assert {record["digest"] for record in found.values()} <= sent, f"seed {SEED}"
    done = sum((client.done for client in clients), collections.Counter[str]())
    for kind in KINDS:
        assert done[kind] >= KIND_MIN, f"seed {SEED}: hardly anything was done: {done}"
