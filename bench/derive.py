"""Increments: what a hypervisor pulls of a new version of a 2 GiB image of which 1 % of the blocks changed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import requests

from bench import daemons
from bench.disks import MIB, write_disk
from bench.harness import PeakMemory, Report, mb_per_s, stopwatch

SIZE_MIB = 2048
BLOCK_BYTES = 16 << 10
CHANGED_SHARE = 0.01
SHARE_MAX = 0.02
"""Of the full stream's bytes."""
NAME = "bench"
TIMEOUT_S = 1800.0


def run(report: Report, workdir: Path) -> None:
    """Pull a version, change it, pull the next; then the next again on a pool that has no older one."""
    disk = write_disk(workdir / "version.raw", SIZE_MIB)
    os.truncate(disk, SIZE_MIB * MIB)
    with daemons.running(workdir) as stack:
        with PeakMemory([stack.service.pid, stack.agent.pid]) as memory:
            old = _upload(stack, disk)
            full_bytes, full_s = _pull(stack, old)
            _change(disk)
            new = _upload(stack, disk)
            increment_bytes, increment_s = _pull(stack, new)
            _full_of_new(report, stack, new, increment_bytes)
            _rest(report, stack, new, old)
        report.note(
            f"first pull of {SIZE_MIB} MiB, its derivation included: {full_bytes / 1e6:,.1f} MB, {full_s:.1f} s"
        )
        report.note(f"pull of the next version, likewise: {increment_bytes / 1e6:,.1f} MB, {increment_s:.1f} s")
        service, agent = memory.peak_mib.values()
        report.note(f"peak resident memory: image-service {service:.0f} MiB, agent-image {agent:.0f} MiB")


def _full_of_new(report: Report, stack: daemons.Stack, new: str, increment_bytes: int) -> None:
    head = requests.head(_url(stack, new, "download", format="zvol"), timeout=TIMEOUT_S)
    while head.status_code == 503:
        head = requests.head(_url(stack, new, "download", format="zvol"), timeout=TIMEOUT_S)
    size_bytes = int(head.headers["Content-Length"])
    share = increment_bytes / size_bytes
    report.note(
        f"increment of a {SIZE_MIB} MiB image with {CHANGED_SHARE:.0%} of its blocks changed: {increment_bytes / 1e6:,.1f} MB "
        f"pulled, {share:.2%} of the full stream of {size_bytes / 1e6:,.1f} MB (limit: {SHARE_MAX:.0%})"
    )
    if share > SHARE_MAX:
        raise SystemExit(f"the increment is {share:.2%} of the full stream, more than {SHARE_MAX:.0%}")


def _rest(report: Report, stack: daemons.Stack, new: str, old: str) -> None:
    """How long a form takes that is known already, and one that is not."""
    query = {"format": "zvol", "from": old, "compression": "none"}
    with stopwatch() as first:
        while requests.head(_url(stack, new, "chunks", **query), timeout=TIMEOUT_S).status_code == 503:
            pass
    with stopwatch() as again:
        requests.head(_url(stack, new, "chunks", **query), timeout=TIMEOUT_S).raise_for_status()
    speed = mb_per_s(2 * SIZE_MIB * MIB, first())
    report.note(
        f"deriving an increment: {first():.1f} s ({speed:,.0f} MB/s of both disks); asking again: {again() * 1e3:.1f} ms"
    )


def _url(stack: daemons.Stack, image_id: str, what: str, **query: str) -> str:
    words = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{stack.service.url}/images/{image_id}/{what}?{words}"


def _upload(stack: daemons.Stack, disk: Path) -> str:
    headers = {"X-Image-Type": "kvm", "X-Image-Name": NAME}
    with disk.open("rb") as file:
        answer = requests.put(f"{stack.service.url}/images", data=file, headers=headers, timeout=TIMEOUT_S)
    answer.raise_for_status()
    image_id: str = answer.json()["id"]
    return image_id


def _pull(stack: daemons.Stack, image_id: str) -> tuple[int, float]:
    """Bytes and seconds."""
    before = stack.agent.metric("mistify_fetched_bytes_total")
    with stopwatch() as elapsed:
        stack.agent.call("RequestImage", id=image_id, type="kvm", timeout_s=TIMEOUT_S)
    return int(stack.agent.metric("mistify_fetched_bytes_total") - before), elapsed()


def _change(disk: Path) -> None:
    """Other data of the same kind in blocks all over the disk: what stands elsewhere on it."""
    rng = random.Random(2)
    blocks = SIZE_MIB * MIB // BLOCK_BYTES
    with disk.open("r+b") as file:
        for number in rng.sample(range(blocks), round(blocks * CHANGED_SHARE)):
            data = os.pread(file.fileno(), BLOCK_BYTES, rng.randrange((blocks - 1) * BLOCK_BYTES))
            os.pwrite(file.fileno(), data, number * BLOCK_BYTES)
