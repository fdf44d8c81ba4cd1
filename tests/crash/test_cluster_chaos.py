"""Two replicas on etcd and S3, twenty clients, and sixty blows at any one process: kill -9 or a pause."""

from __future__ import annotations

import collections
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from demo.servers.etcd import EtcdNode
from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import call, sha256
from tests.cluster.clients import Client, Unanswered, World
from tests.cluster.history import Seen
from tests.cluster.world import Site, pause, resume, shared_stores
from tests.fakes.source_server import start_source_server
from tests.waiting import wait_until

pytestmark = [pytest.mark.backend("etcd", "s3"), pytest.mark.slow, pytest.mark.timeout(1200)]

BLOWS = int(os.environ.get("MISTIFY_BLOWS", "60"))
CLIENTS = 20
SEED = int(os.environ.get("MISTIFY_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
KILLED_S = (0.1, 1.0)
"""How long a killed process stays away."""
PAUSED_S = (0.3, 3.0)
PAUSED_SERVICE_S = (0.5, 7.0)
"""Some of them longer than a lease lives, so that others take over what it still believes to be at."""
BETWEEN_S = (0.1, 1.0)
QUIET_TIMEOUT_S = 180.0
DERIVED_AT_END = 5
FLAGS: dict[str, Any] = {"fetch_failures_max": 100, "collect_interval_s": 5.0, "derivations": 4}


@dataclass(frozen=True)
class Blow:
    """One process that is away for a while."""

    what: str
    down: Callable[[], None]
    up: Callable[[], None]
    away_s: tuple[float, float]


class Chaos:
    """Chooses whom to hit, and sees that they are back before the next blow."""

    def __init__(self, site: Site, replicas: list[Daemon]) -> None:
        self._site = site
        self._replicas = replicas
        self._chance = random.Random(SEED)
        self._wait = threading.Event()
        self.told: list[str] = []
        kinds = [(target, blow) for target in ("node", "leader", "service", "s3") for blow in ("kill", "pause")]
        self._plan = [kinds[number % len(kinds)] for number in range(BLOWS)]
        self._chance.shuffle(self._plan)

    def run(self) -> None:
        """Every blow, one after the other."""
        for target, how in self._plan:
            self._wait.wait(self._chance.uniform(*BETWEEN_S))
            blow = self._blow(target, how)
            self.told.append(blow.what)
            blow.down()
            self._wait.wait(self._chance.uniform(*blow.away_s))
            blow.up()

    def _blow(self, target: str, how: str) -> Blow:
        if target == "service":
            return self._at_service(self._chance.choice(self._replicas), how)
        if target == "s3":
            return self._at_s3(self._chance.choice(["proxy", "object"]), how)
        return self._at_etcd(self._node(target), how)

    def _node(self, target: str) -> EtcdNode:
        etcd = self._site.stores.etcd
        leader = wait_until(etcd.leader, "a leader", timeout_s=60)
        assert leader is not None
        return leader if target == "leader" else self._chance.choice(etcd.nodes)

    def _at_etcd(self, node: EtcdNode, how: str) -> Blow:
        etcd = self._site.stores.etcd
        if how == "kill":
            return Blow(f"kill etcd {node.name}", node.process.kill, etcd.heal, KILLED_S)
        return Blow(f"pause etcd {node.name}", node.process.pause, etcd.heal, PAUSED_S)

    def _at_s3(self, kind: str, how: str) -> Blow:
        server = self._site.stores.s3
        process = server.processes[kind]

        def back() -> None:
            process.resume()
            if not process.is_running:
                process.start()
            server.wait_ready()

        if how == "kill":
            return Blow(f"kill S3 {kind}", process.kill, back, KILLED_S)
        return Blow(f"pause S3 {kind}", process.pause, back, PAUSED_S)

    def _at_service(self, daemon: Daemon, how: str) -> Blow:
        name = f"service {self._replicas.index(daemon)}"
        if how == "kill":
            return Blow(f"kill {name}", daemon.kill, lambda: _ready(daemon.start(wait=False)), KILLED_S)

        def back() -> None:
            resume(daemon)
            _ready(daemon)

        return Blow(f"pause {name}", lambda: pause(daemon), back, PAUSED_SERVICE_S)


def _ready(daemon: Daemon) -> None:
    wait_until(daemon.is_ready, "a service to be ready", timeout_s=90)


def _work(site: Site, replicas: list[Daemon], world: World) -> tuple[list[Client], Chaos]:
    stop = threading.Event()
    clients = [Client(world, number, SEED, stop) for number in range(CLIENTS)]
    chaos = Chaos(site, replicas)
    for client in clients:
        client.thread.start()
    try:
        chaos.run()
    finally:
        stop.set()
        for client in clients:
            client.thread.join()
    return clients, chaos


def _until_answered(what: str, act: Callable[[], bool]) -> None:
    """A quiet cluster answers everything, soon."""

    def done() -> bool:
        try:
            return act()
        except Unanswered:
            return False

    wait_until(done, f"{what} (seed {SEED})", timeout_s=QUIET_TIMEOUT_S, poll_s=0.1)


def _end_uploads(clients: list[Client]) -> None:
    """What was begun in parts can be gone on with, to its end."""
    for client in clients:
        for path, content, begun in list(client.parts):
            _until_answered(f"upload {path} to end", lambda: client.next_part(path, content, begun))  # noqa: B023


def _unfinished(replica: Daemon) -> list[str]:
    return [r["id"] for r in call(replica, "GET", "/images").json() if r["status"] in {"pending", "downloading"}]


def _read_everything(client: Client, world: World) -> None:
    for key, image_id in list(world.known):
        _until_answered(f"a read of {key}", lambda: client.read(key, image_id) in set(Seen))  # noqa: B023


def _derive_again(client: Client, replica: Daemon) -> None:
    """No derivation is stuck: some images are packed now."""
    world, there = client.world, {record["id"] for record in call(replica, "GET", "/images").json()}
    for key, image_id in [pair for pair in world.known if pair[1] in there][-DERIVED_AT_END:]:
        _until_answered(f"{key} to be packed", lambda: client.derive(key, image_id))  # noqa: B023


def _check_records(replica: Daemon, world: World) -> None:
    """One record a source, each complete and intact, and nothing that nobody sent."""
    records = call(replica, "GET", "/images").json()
    sources = collections.Counter(record["source"] for record in records if record["source"])
    assert [source for source, count in sources.items() if count > 1] == [], "two records for a source"
    keys = {image_id: key for key, image_id in world.known}
    digests = set(world.contents.values())
    for record in records:
        assert record["status"] == "complete", record
        wanted = world.contents[keys[record["id"]]] if record["id"] in keys else record["digest"]
        answer = requests.get(f"{replica.url}/images/{record['id']}/download", timeout=120)
        assert answer.status_code == 200, f"{record}: {answer.text}"
        assert sha256(answer.content) == record["digest"] == wanted, record
        assert record["digest"] in digests or not record["source"], record


@pytest.mark.slow
def test_sixty_blows_lose_nothing_acknowledged_and_leave_nothing_stuck(tmp_path: Path) -> None:
    with shared_stores(tmp_path) as stores, start_source_server() as sources:
        site = Site(stores, tmp_path)
        with site.exits:
            replicas = [site.replica(name, **FLAGS) for name in ("a", "b")]
            world = World(replicas, sources)
            clients, chaos = _work(site, replicas, world)
            told = f"seed {SEED}: {chaos.told}; {world.counts}"
            failures = [failure for client in clients for failure in client.failures]
            assert not failures, f"{told}: {failures[:5]}"
            assert not world.stuck, f"{told}: {world.stuck[:5]}"
            _end_uploads(clients)
            for replica in replicas:
                wait_until(lambda: not _unfinished(replica), f"fetches to end; {told}", timeout_s=QUIET_TIMEOUT_S)  # noqa: B023
            _read_everything(clients[0], world)
            impossible = world.history.impossible()
            assert not impossible, f"{told}: {dict(list(impossible.items())[:2])}"
            _derive_again(clients[0], replicas[0])
            for replica in replicas:
                _check_records(replica, world)
            assert {"uploaded", "create", "read", "delete", "derived"} <= set(world.counts), told
            assert world.counts["uploaded"] > BLOWS // 3, told
