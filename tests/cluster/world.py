"""A real etcd cluster and a real S3 server, and image services on them that can be killed, paused and started again."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from demo.servers.etcd import EtcdCluster, etcd_cluster
from demo.servers.processes import free_port
from demo.servers.s3 import BUCKET, make_bucket, s3_settings
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, SwiftServer, swift_server
from image_service.metadata import MetadataStore
from image_service.shared_stores import open_etcd
from imaging.blobs.s3_bucket import S3Bucket
from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import FETCHING
from tests.waiting import wait_until

PART_BYTES = 5 << 20
"""The least S3 takes: what a test sends is then some parts."""

WAIT_S = 120.0
"""For whatever is waited for here."""

T = TypeVar("T")

TTL_S = 4.0
"""Short, so that nobody waits for long; longer than what a busy machine's scheduler does to a thread."""


@dataclass
class Stores:
    """The servers replicas share."""

    etcd: EtcdCluster
    s3: SwiftServer


@contextmanager
def shared_stores(directory: Path) -> Iterator[Stores]:
    """Three etcd nodes and one S3 server."""
    (directory / "etcd").mkdir()
    (directory / "swift").mkdir()
    with etcd_cluster(directory / "etcd") as etcd, swift_server(directory / "swift") as s3:
        wait_until(lambda: _made(s3), "a bucket to be made", timeout_s=60)
        yield Stores(etcd, s3)


def _made(s3: SwiftServer) -> bool:
    """Swift says that it is ready a moment before its storage servers are."""
    try:
        make_bucket(s3, BUCKET)
    except (BotoCoreError, ClientError):
        return False
    return True


@dataclass
class Site:
    """One installation: a prefix of its own in etcd and in the bucket, and any number of replicas."""

    stores: Stores
    directory: Path
    prefix: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    exits: ExitStack = field(default_factory=ExitStack)

    @property
    def records_table(self) -> dict[str, Any]:
        """``metadataStoreConfig``."""
        return {"machines": list(self.stores.etcd.endpoints), "prefix": f"/{self.prefix}"}

    def images_table(self, **more: Any) -> dict[str, Any]:
        """``imageStoreConfig``."""
        return {
            "bucket": BUCKET,
            "endpoint": self.stores.s3.endpoint,
            "access_key": ACCESS_KEY,
            "secret_key": SECRET_KEY,
            "prefix": f"{self.prefix}/",
            "part_size_bytes": PART_BYTES,
            **more,
        }

    def replica(self, name: str, *, images: dict[str, Any] | None = None, **flags: Any) -> Daemon:
        """A running service; ended with the site."""
        port = free_port()
        settings: dict[str, Any] = FETCHING | {
            "lease_ttl_s": TTL_S,
            "fetch_checkpoint_s": 0.2,
            "metadata_store_type": "etcd",
            "metadata_store_config": json.dumps(self.records_table),
            "image_store_type": "s3",
            "image_store_config": json.dumps(self.images_table(**(images or {}))),
        }
        settings |= {"port": port, "state_dir": self.directory / name, "log_level": "info"} | flags
        words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        daemon = Daemon("image_service", words, port, self.directory / f"{name}.log")
        self.exits.callback(_end, daemon)
        return daemon.start()

    def bucket(self) -> S3Bucket:
        """The bucket as this site sees it."""
        bucket = S3Bucket(s3_settings(self.stores.s3, prefix=f"{self.prefix}/"))
        self.exits.callback(bucket.close)
        return bucket

    def records(self) -> MetadataStore:
        """The records, read by the test itself."""
        records = MetadataStore.over(open_etcd(self.records_table))
        self.exits.callback(records.shutdown)
        return records


def wait(condition: Callable[[], T], what: str) -> T:
    """As ``wait_until``, for as long as nine servers on a busy machine may take for something."""
    return wait_until(condition, what, timeout_s=WAIT_S)


def pause(daemon: Daemon) -> None:
    """SIGSTOP."""
    os.kill(daemon.pid, signal.SIGSTOP)


def resume(daemon: Daemon) -> None:
    """SIGCONT."""
    os.kill(daemon.pid, signal.SIGCONT)


def _end(daemon: Daemon) -> None:
    if daemon.process is not None and daemon.process.poll() is None:
        resume(daemon)
        daemon.kill()
