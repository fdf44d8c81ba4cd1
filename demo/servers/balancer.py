"""haproxy in front of replicas: it asks each whether it is ready, and sends requests to those that are, in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from demo.servers.processes import ServerProcess, ensure_programs, free_port, wait_until

START_TIMEOUT_S = 30.0
"""It starts in a blink; the rest is for a busy machine."""

_CONFIGURATION = """
global
    maxconn 2000
defaults
    mode http
    timeout connect 2s
    timeout check 2s
    # Longer than the longest wait a client may ask the service for (120 s).
    timeout client 150s
    timeout server 150s
    # A replica that does not take the connection has seen nothing of the request: the next one is asked.
    retries 3
    option redispatch 1
frontend images
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance roundrobin
    option httpchk GET /readyz
    default-server check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


@dataclass(slots=True)
class Balancer:
    """The running balancer."""

    process: ServerProcess
    port: int

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        """Wait until a request gets through to a replica."""
        with urllib3.PoolManager(retries=False) as pools:

            def ready() -> bool:
                try:
                    return pools.request("GET", f"{self.url}/readyz", timeout=5.0).status == 200
                except urllib3.exceptions.HTTPError:
                    return False

            wait_until(ready, "the load balancer", timeout_s=START_TIMEOUT_S)


@contextmanager
def balancer(directory: Path, ports: Sequence[int]) -> Iterator[Balancer]:
    """Balance between replicas on these loopback ports."""
    ensure_programs(haproxy="haproxy")
    port = free_port()
    servers = "\n".join(f"    server replica{number} 127.0.0.1:{each}" for number, each in enumerate(ports, 1))
    configuration = directory / "haproxy.cfg"
    configuration.write_text(_CONFIGURATION.format(port=port, servers=servers))
    process = ServerProcess(["haproxy", "-db", "-f", str(configuration)], directory / "balancer.log")
    running = Balancer(process, port)
    try:
        process.start()
        running.wait_ready()
        yield running
    finally:
        process.kill()
