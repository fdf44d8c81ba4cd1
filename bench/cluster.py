"""10,000 records in a cluster of three etcd nodes, beside etcdctl on the same cluster; downloads through two replicas and through one."""

from __future__ import annotations

import functools
import os
import random
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from bench.disks import MIB, write_disk
from bench.harness import ROUNDS, Figure, Report, Row, compare, mb_per_s, stopwatch
from demo.servers.balancer import balancer
from demo.servers.processes import ensure_programs, path_with_sbin
from demo.servers.replicas import PREFIX, Cluster, cluster
from image_service.lifecycle import Image, ImageType, new_fetch, set_downloading, set_finished
from image_service.metadata import MetadataStore, record_key, source_key
from image_service.shared_stores import open_etcd
from imaging.digests import Digest
from rpc.client import ImageServiceClient

RECORDS = 10_000
WRITERS = 8
LOOKS = 60
PAGE = 100
IMAGE_MIB = 128
CLIENTS = 8
TIMEOUT_S = 600


def run(report: Report, workdir: Path) -> None:
    """Fill etcd, measure it, then serve an image."""
    ensure_programs(etcdctl="etcd-client", curl="curl")
    with cluster(workdir, ["--log-level", "warning"]) as running:
        endpoints = list(running.etcd.endpoints)
        records = MetadataStore.over(open_etcd({"machines": endpoints, "prefix": f"{PREFIX}-bench"}))
        try:
            images = _fill(records)
            _records(report, records, images, _Etcdctl(endpoints, f"{PREFIX}-bench/"))
        finally:
            records.shutdown()
        _downloads(report, running, workdir)


# -- records ---------------------------------------------------------------------------------------------------------------


def _image(number: int) -> Image:
    """A complete image as a fetch leaves it."""
    now = datetime.now(UTC)
    pending = new_fetch(str(uuid.UUID(int=number)), f"https://images.example.org/{number}.raw", ImageType.KVM)
    return set_finished(set_downloading(pending, 1, now=now), Digest.of(b"%d" % number), 1, now=now)


def _fill(records: MetadataStore) -> Sequence[Image]:
    images = [_image(number) for number in range(RECORDS)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(records.put, images))
    return images


class _Etcdctl:
    """One command a call, over gRPC; its start is part of it."""

    def __init__(self, endpoints: Sequence[str], prefix: str) -> None:
        self._command = ["etcdctl", f"--endpoints={','.join(endpoints)}"]
        self._environment = os.environ | {"ETCDCTL_API": "3", "PATH": path_with_sbin()}
        self._prefix = prefix

    def __call__(self, *arguments: str, data: bytes | None = None) -> bytes:
        command = [*self._command, *arguments]
        ended = subprocess.run(
            command, input=data, capture_output=True, check=True, timeout=TIMEOUT_S, env=self._environment
        )
        return ended.stdout

    def get(self, key: str) -> bytes:
        """One entry; it must be there."""
        found = self("get", self._prefix + key, "--print-value-only")
        assert found, key
        return found

    def get_range(self, key: str, end: str, limit: int) -> bytes:
        """Entries from a key on."""
        return self("get", self._prefix + key, self._prefix + end, f"--limit={limit}")

    def put(self, key: str, value: bytes) -> None:
        """Replace one entry."""
        self("put", self._prefix + key, data=value)


def _records(report: Report, records: MetadataStore, images: Sequence[Image], etcdctl: _Etcdctl) -> None:
    def page(image: Image) -> object:
        return len(records.engine.list(record_key(""), after=record_key(image.id), limit=PAGE))

    def their_page(image: Image) -> object:
        return etcdctl.get_range(record_key(image.id), record_key("\x7f"), PAGE)

    def their_source(image: Image) -> object:
        image_id = etcdctl.get(source_key(image.source)).decode().strip()
        return etcdctl.get(record_key(image_id))

    pairs: dict[str, tuple[Callable[[Image], object], Callable[[Image], object]]] = {
        f"list a page of {PAGE}": (page, their_page),
        "get a record": (lambda i: records.get_by_id(i.id), lambda i: etcdctl.get(record_key(i.id))),
        "find a record by its source (two reads)": (lambda i: records.get_by_source(i.source), their_source),
        "change a record (a read, then a transaction)": (
            lambda i: records.update(i.id, lambda old: old),
            lambda i: etcdctl.put(record_key(i.id), etcdctl.get(record_key(i.id)).strip()),
        ),
    }
    for what, (ours, theirs) in pairs.items():
        row = Row(f"{what}, of {RECORDS:,}", Figure("ours", "ms"), Figure("etcdctl", "ms"))
        for number in range(ROUNDS):
            chosen = random.Random(number).choices(images, k=LOOKS)
            row.ours.values.append(_median_ms(ours, chosen))
            row.reference.values.append(_median_ms(theirs, chosen))
        report.add(row)
    start = _median_ms(lambda _: etcdctl("version"), images[:LOOKS])
    report.note(
        f"medians of {LOOKS} calls, one after the other, {ROUNDS} rounds in turn. Of every call of etcdctl {start:.0f} ms are its own "
        "start (`etcdctl version`, median); ours keeps its connections, and speaks JSON"
    )


def _median_ms(look: Callable[[Image], object], images: Sequence[Image]) -> float:
    times = []
    for image in images:
        begin = time.perf_counter()
        look(image)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


# -- downloads -------------------------------------------------------------------------------------------------------------


def _downloads(report: Report, running: Cluster, workdir: Path) -> None:
    disk = write_disk(workdir / "image.raw", IMAGE_MIB)
    one, two = workdir / "one", workdir / "two"
    one.mkdir()
    two.mkdir()
    ports = [replica.port for replica in running.replicas]
    with ImageServiceClient(running.replicas[0].url) as service, disk.open("rb") as file:
        image_id = service.upload_image(file, image_type="kvm").id
    with balancer(one, ports[:1]) as single, balancer(two, ports) as both:
        ours = functools.partial(_fetch, f"{both.url}/images/{image_id}/download", workdir)
        reference = functools.partial(_fetch, f"{single.url}/images/{image_id}/download", workdir)
        title = f"download of {IMAGE_MIB} MiB by {CLIENTS} clients at once through haproxy, two replicas"
        report.add(compare(title, "MB/s in all", ours, ("one replica", reference)))
    report.note(
        f"clients, haproxy, replicas, Swift and etcd share the {os.cpu_count()} CPUs: a second replica adds what the "
        "first can't use of them"
    )


def _fetch(url: str, workdir: Path) -> float:
    config = workdir / "curl.config"
    config.write_text(f'url = "{url}"\noutput = "{os.devnull}"\n' * CLIENTS)
    command = ["curl", "-sSf", "--parallel", "--parallel-immediate", "--parallel-max", str(CLIENTS), "-K", str(config)]
    with stopwatch() as elapsed:
        subprocess.run(command, check=True, timeout=TIMEOUT_S, capture_output=True)  # its progress is of no interest
    return mb_per_s(IMAGE_MIB * MIB * CLIENTS, elapsed())
