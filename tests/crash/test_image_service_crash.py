"""SIGKILL the image service, start it again, and look whether it kept its promises."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import (
    FETCHING,
    call,
    download,
    fetch,
    record_of,
    sha256,
    stored_files,
    upload,
    wait_for,
)
from tests.fakes.source_server import Source, start_source_server
from tests.waiting import wait_until

DATA = random.Random(1).randbytes(4 << 20)
SEED = random.SystemRandom().randrange(1 << 32)


@contextmanager
def _service(state_dir: Path, **flags: object) -> Iterator[Daemon]:
    settings = FETCHING | {"fetch_checkpoint_s": 0.02} | flags
    with start_image_service(state_dir, **settings) as daemon:
        yield daemon


def _unfinished(service: Daemon) -> list[str]:
    return [r["id"] for r in call(service, "GET", "/images").json() if r["status"] in {"pending", "downloading"}]


def test_fetch_that_was_killed_goes_on_with_a_range(tmp_path: Path) -> None:
    with start_source_server() as sources, _service(tmp_path / "state") as service:
        source = Source(DATA, hold_after=3 << 20)
        record = fetch(service, sources.add("/killed", source))
        wait_until(lambda: record_of(service, record["id"])["size"] >= 3 << 20, "three MiB to come in")
        service.kill()
        source.go.set()
        service.start()
        assert wait_for(service, record["id"], "complete")["digest"] == sha256(DATA)
        first, offset = source.requests[1]["Range"].removeprefix("bytes=").split("-")[0], 2 << 20
        assert int(first) >= offset, "what had been written was fetched again"
        assert source.requests[1]["If-Range"] == source.tag
        assert download(service, record["id"]).content == DATA


def test_fetch_that_was_parked_by_sigterm_goes_on_at_the_last_byte(tmp_path: Path) -> None:
    with start_source_server() as sources, _service(tmp_path / "state") as service:
        source = Source(DATA, hold_after=1_234_567)
        record = fetch(service, sources.add("/parked", source))
        wait_until(lambda: record_of(service, record["id"])["size"] == 1_234_567, "some bytes to come in")
        assert service.stop() == 0
        source.go.set()
        service.start()
        assert wait_for(service, record["id"], "complete")["digest"] == sha256(DATA)
        assert source.requests[1]["Range"] == "bytes=1234567-"


def test_source_that_changed_while_the_service_was_down_starts_from_zero(tmp_path: Path) -> None:
    with start_source_server() as sources, _service(tmp_path / "state") as service:
        source = Source(DATA, hold_after=1 << 20)
        record = fetch(service, sources.add("/changed", source))
        wait_until(lambda: record_of(service, record["id"])["size"] >= 1 << 20, "some bytes to come in")
        service.kill()
        source.content = DATA[::-1]
        source.go.set()
        service.start()
        assert wait_for(service, record["id"], "complete")["digest"] == sha256(DATA[::-1])


def test_upload_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    with _service(state_dir) as service:
        kept = upload(service, b"kept")
        more = threading.Event()

        def body() -> Iterator[bytes]:
            yield DATA
            more.wait(60)
            yield b"the rest"

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(call, service, "PUT", "/images", data=body(), headers={"X-Image-Type": "kvm"})
            wait_until(lambda: len(stored_files(state_dir)) == 2, "the upload to begin")
            service.kill()
            more.set()
            with pytest.raises(requests.RequestException):
                running.result()
        service.start()
        assert [r["id"] for r in call(service, "GET", "/images").json()] == [kept["id"]]
        assert len(stored_files(state_dir)) == 1


def test_fetches_killed_again_and_again_all_complete_intact(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    contents = [chance.randbytes(chance.randrange(1, 3 << 20)) for _ in range(12)]
    with start_source_server() as sources, _service(tmp_path / "state") as service:
        urls = [sources.add(f"/{n}", Source(content)) for n, content in enumerate(contents)]
        records = [fetch(service, url) for url in urls]
        pause = threading.Event()
        for _ in range(8):
            pause.wait(chance.uniform(0, 0.05))
            service.kill()
            service.start()
        wait_until(lambda: not _unfinished(service), f"every fetch to end (seed {SEED})", timeout_s=120)
        for record, content in zip(records, contents, strict=True):
            found = record_of(service, record["id"])
            outcome = (found["status"], found.get("digest"))
            assert outcome == ("complete", sha256(content)), f"seed {SEED}: {found}"
            assert download(service, record["id"]).content == content, f"seed {SEED}"


class _Client:
    """Uploads and deletes until told to stop, and remembers what was acknowledged."""

    def __init__(self, service: Daemon, seed: int, stop: threading.Event) -> None:
        self._service = service
        self._chance = random.Random(seed)
        self._stop = stop
        self.sent: set[str] = set()
        self.there: set[str] = set()
        self.gone: set[str] = set()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(requests.RequestException):
                self._turn()

    def _turn(self) -> None:
        content = self._chance.randbytes(self._chance.randrange(1, 400_000))
        self.sent.add(sha256(content))
        image_id = upload(self._service, content)["id"]
        if self._chance.random() < 0.5:
            self.there.add(image_id)
            return
        response = call(self._service, "DELETE", f"/images/{image_id}")  # if it is cut off, both outcomes are right
        assert response.status_code == 200, response.text
        self.gone.add(image_id)


def test_acknowledged_uploads_and_deletes_survive_kills_and_nothing_else_does(tmp_path: Path) -> None:
    chance, stop, pause = random.Random(SEED), threading.Event(), threading.Event()
    state_dir = tmp_path / "state"
    with _service(state_dir, collect_interval_s=0.1) as service:
        clients = [_Client(service, SEED + n, stop) for n in range(6)]
        for client in clients:
            client.thread.start()
        for _ in range(10):
            pause.wait(chance.uniform(0.05, 0.4))
            service.kill()
            service.start()
        stop.set()
        for client in clients:
            client.thread.join()
        service.kill()
        service.start()
        found = {r["id"]: r for r in call(service, "GET", "/images").json()}
        for client in clients:
            assert client.there <= set(found), f"seed {SEED}: acknowledged images are gone"
            assert not client.gone & set(found), f"seed {SEED}: deleted images are back"
        sent = set().union(*(client.sent for client in clients))
        for image_id, record in found.items():
            response = download(service, image_id)
            assert response.status_code == 200, f"seed {SEED}: {record}: {response.text}"
            assert sha256(response.content) == record["digest"], f"seed {SEED}: {record}"
            assert record["digest"] in sent
        blobs = {record["digest"].removeprefix("sha256:") for record in found.values()}
        assert {Path(name).name for name in stored_files(state_dir)} == blobs, f"seed {SEED}: stray bytes"
