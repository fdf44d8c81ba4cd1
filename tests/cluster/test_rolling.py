"""A rolling upgrade as docs/operate/cluster.md says: one replica after the other, while clients work through the balancer."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from demo.servers.balancer import Balancer, balancer
from tests.acceptance.daemons import Daemon
from tests.cluster.world import Site
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("etcd", "s3", "haproxy")

CLIENTS = 4
BEFORE_AND_AFTER = 8
"""Images brought before the first replica goes, between two, and after the last is back."""
TRY_AGAIN = {502, 503, 504}


class _Work:
    """Clients that upload and read back, and try again what a proxy says may be tried again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.acknowledged: dict[str, bytes] = {}

    def run(self, number: int) -> None:
        chance = random.Random(number)
        while not self._stop.is_set():
            content = chance.randbytes(20_000)
            image_id = self._call("PUT", "/images", content).json()["id"]
            self.acknowledged[image_id] = content
            assert self._call("GET", f"/images/{image_id}/download").content == content

    def _call(self, method: str, path: str, content: bytes | None = None) -> requests.Response:
        answers: list[requests.Response] = []

        def answered() -> bool:
            try:
                answer = requests.request(
                    method, self._url + path, data=content, headers={"X-Image-Type": "kvm"}, timeout=60
                )
            except requests.ConnectionError:
                return False
            answers.append(answer)
            return answer.status_code not in TRY_AGAIN

        wait_until(answered, f"{method} {path}", timeout_s=60)
        assert answers[-1].status_code == 200, answers[-1].text
        return answers[-1]

    def go_on(self) -> None:
        """Wait until more was acknowledged."""
        wanted = len(self.acknowledged) + BEFORE_AND_AFTER
        wait_until(lambda: len(self.acknowledged) >= wanted, "clients to get on", timeout_s=120)

    def end(self) -> None:
        self._stop.set()


def _upgrade(replicas: list[Daemon], front: Balancer, work: _Work) -> None:
    work.go_on()
    for daemon in replicas:
        assert daemon.stop() == 0
        work.go_on()  # on the other one
        daemon.start()
        front.wait_ready()
        work.go_on()


def test_replicas_restarted_one_after_the_other_serve_all_the_time(site: Site, tmp_path: Path) -> None:
    replicas = [site.replica("one"), site.replica("two")]
    with balancer(tmp_path, [daemon.port for daemon in replicas]) as front:
        work = _Work(front.url)
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(work.run, number) for number in range(CLIENTS)]
            try:
                _upgrade(replicas, front, work)
            finally:
                work.end()
        for client in clients:
            client.result()
        for image_id, content in work.acknowledged.items():
            for daemon in replicas:
                assert requests.get(f"{daemon.url}/images/{image_id}/download", timeout=60).content == content
