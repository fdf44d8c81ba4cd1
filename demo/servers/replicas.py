"""Image services that share their stores: records in etcd, images in S3, nothing that matters in their own directories."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from demo.errors import DemoError
from demo.servers.etcd import EtcdCluster, etcd_cluster
from demo.servers.processes import ROOT, ServerProcess, free_port, wait_until
from demo.servers.s3 import BUCKET, make_bucket
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, SwiftServer, swift_server

START_TIMEOUT_S = 90.0
"""A service is ready within two seconds; the rest is for a busy machine."""

READY_TIMEOUT_S = 5.0
"""One question whether it is ready."""

PREFIX = "/mistify"


@dataclass(slots=True)
class Replica:
    """One of the services."""

    name: str
    process: ServerProcess
    port: int
    state: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def is_ready(self) -> bool:
        """Whether it says that it is; DemoError if it has ended."""
        if not self.process.is_running:
            raise DemoError(f"{self.name} ended: {self.process.log()}")
        with urllib3.PoolManager(retries=False) as pools:
            try:
                return pools.request("GET", f"{self.url}/readyz", timeout=READY_TIMEOUT_S).status == 200
            except urllib3.exceptions.HTTPError:
                return False

    def wait_ready(self) -> None:
        """Wait until it is."""
        wait_until(self.is_ready, f"{self.name} to be ready", timeout_s=START_TIMEOUT_S)

    def wipe(self) -> None:
        """Remove what it keeps on its own disk."""
        shutil.rmtree(self.state, ignore_errors=True)


@dataclass(slots=True)
class Cluster:
    """Three nodes of etcd, an S3 server, and services on both."""

    etcd: EtcdCluster
    s3: SwiftServer
    replicas: Sequence[Replica]


def store_flags(
    etcd: EtcdCluster, s3: SwiftServer, *, prefix: str = PREFIX, images: Mapping[str, object] | None = None
) -> list[str]:
    """Return the options of a service on these stores; ``images`` has more keys of its image store."""
    records = {"machines": list(etcd.endpoints), "prefix": prefix}
    bucket = {"bucket": BUCKET, "endpoint": s3.endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    return [
        *("--metadata-store-type", "etcd", "--metadata-store-config", json.dumps(records)),
        *("--image-store-type", "s3", "--image-store-config", json.dumps(bucket | dict(images or {}))),
    ]


def new_replica(directory: Path, name: str, flags: Sequence[str]) -> Replica:
    """Return a service that is not started yet."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MISTIFY_")}
    port, state = free_port(), directory / name
    command = [sys.executable, "-m", "image_service", "--port", str(port), "--state-dir", str(state), *flags]
    process = ServerProcess(command, directory / f"{name}.log", environment | {"PYTHONPATH": str(ROOT)}, ROOT)
    return Replica(name, process, port, state)


@contextmanager
def replicas(directory: Path, flags: Sequence[str], *, count: int = 2) -> Iterator[Sequence[Replica]]:
    """Services that are ready; killed at the end if nobody stopped them."""
    running = [new_replica(directory, f"service{number}", flags) for number in range(1, count + 1)]
    try:
        for replica in running:
            replica.process.start()
        for replica in running:
            replica.wait_ready()
        yield running
    finally:
        for replica in running:
            replica.process.kill()


@contextmanager
def cluster(
    directory: Path, flags: Sequence[str] = (), *, count: int = 2, images: Mapping[str, object] | None = None
) -> Iterator[Cluster]:
    """Everything but a balancer, running and ready."""
    with ExitStack() as servers:
        for name in ("etcd", "swift"):
            (directory / name).mkdir()
        etcd = servers.enter_context(etcd_cluster(directory / "etcd"))
        s3 = servers.enter_context(swift_server(directory / "swift"))
        make_bucket(s3, BUCKET)
        all_flags = [*store_flags(etcd, s3, images=images), *flags]
        yield Cluster(etcd, s3, servers.enter_context(replicas(directory, all_flags, count=count)))
