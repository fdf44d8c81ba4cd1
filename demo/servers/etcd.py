"""A real etcd cluster of one or three nodes on loopback, from Debian's etcd-server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from demo.servers.processes import ServerProcess, ensure_programs, free_port, wait_until

START_TIMEOUT_S = 90.0
"""A cluster elects its first leader within two seconds; the rest is for a busy machine."""

STATUS_TIMEOUT_S = 2.0
"""A node that is there answers at once."""

HEARTBEAT_MS = 100
"""etcd's default: what users have."""

ELECTION_MS = 1000
"""Likewise."""


class EtcdNode:
    """One member."""

    def __init__(self, name: str, process: ServerProcess, url: str, peer_url: str) -> None:
        self.name = name
        self.process = process
        self.url = url
        self.peer_url = peer_url

    def status(self, pools: urllib3.PoolManager) -> dict[str, Any] | None:
        """Return what the node says of itself, or None if it says nothing in time."""
        try:
            answer = pools.request(
                "POST", f"{self.url}/v3/maintenance/status", body=b"{}", timeout=STATUS_TIMEOUT_S, retries=False
            )
        except urllib3.exceptions.HTTPError:
            return None
        return dict(answer.json()) if answer.status == 200 else None


class EtcdCluster:
    """Nodes that know each other."""

    def __init__(self, nodes: Sequence[EtcdNode], pools: urllib3.PoolManager) -> None:
        self.nodes = list(nodes)
        self._pools = pools

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where its nodes listen for clients."""
        return tuple(node.url for node in self.nodes)

    def leader(self) -> EtcdNode | None:
        """Return the node that the nodes hold for their leader."""
        for node in self.nodes:
            status = node.status(self._pools) if node.process.is_running else None
            if status and status.get("leader", "0") == status["header"]["member_id"]:
                return node
        return None

    def followers(self) -> list[EtcdNode]:
        """Return every node but the leader."""
        leader = wait_until(self.leader, "a leader", timeout_s=START_TIMEOUT_S)
        return [node for node in self.nodes if node is not leader]

    def wait_healthy(self) -> None:
        """Wait until every node answers and knows a leader."""

        def healthy() -> bool:
            statuses = [node.status(self._pools) for node in self.nodes]
            return all(status and status.get("leader", "0") not in {"", "0"} for status in statuses)

        wait_until(healthy, "a healthy etcd cluster", timeout_s=START_TIMEOUT_S)

    def heal(self) -> None:
        """Continue what was paused, start what was killed."""
        for node in self.nodes:
            node.process.resume()
            if not node.process.is_running:
                node.process.start()
        self.wait_healthy()


def _arguments(name: str, directory: Path, client: str, peer: str, initial: str) -> list[str]:
    return [
        "etcd",
        f"--name={name}",
        f"--data-dir={directory / name}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={initial}",
        "--initial-cluster-state=new",
        f"--heartbeat-interval={HEARTBEAT_MS}",
        f"--election-timeout={ELECTION_MS}",
        "--log-level=warn",
    ]


@contextmanager
def etcd_cluster(
    directory: Path,
    *,
    size: int = 3,
    scheme: str = "http",
    more: Sequence[str] = (),
    make_pools: Callable[[], urllib3.PoolManager] = urllib3.PoolManager,
) -> Iterator[EtcdCluster]:
    """A running, healthy cluster; ``scheme`` and ``more`` arguments set up TLS for clients."""
    ensure_programs(etcd="etcd-server")
    names = [f"node{number}" for number in range(size)]
    peers = {name: f"http://127.0.0.1:{free_port()}" for name in names}
    initial = ",".join(f"{name}={peers[name]}" for name in names)
    nodes = []
    for name in names:
        client = f"{scheme}://127.0.0.1:{free_port()}"
        arguments = [*_arguments(name, directory, client, peers[name], initial), *more]
        nodes.append(EtcdNode(name, ServerProcess(arguments, directory / f"{name}.log"), client, peers[name]))
    cluster = EtcdCluster(nodes, make_pools())
    try:
        for node in nodes:
            node.process.start()
        cluster.wait_healthy()
        yield cluster
    finally:
        for node in nodes:
            node.process.kill()
