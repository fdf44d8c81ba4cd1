"""GetImage over the wire: calls per second and latency, against a bare aiohttp handler."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import daemons
from bench.disks import write_disk
from bench.harness import ROUNDS as TURNS
from bench.harness import Figure, Report, Row
from bench.load import LoadResult

SECONDS = 4.0
PATH = "/_mistify_RPC_"


def run(report: Report, workdir: Path) -> None:
    """Measure with 1 and 32 connections, our agent and the bare handler in turn."""
    with daemons.running(workdir) as stack, _bare_server() as bare_port:
        record = stack.upload(write_disk(workdir / "rpc.raw", 4))
        stack.pull(record.id)
        body = json.dumps({"method": "ImageStore.GetImage", "params": [{"id": record.id}], "id": 1})
        for connections in (1, 32):
            _compare(report, connections, stack.agent.port, bare_port, body)


def _compare(report: Report, connections: int, port: int, bare_port: int, body: str) -> None:
    ours: list[LoadResult] = []
    bare: list[LoadResult] = []
    for turn in range(TURNS + 1):
        pair = _load(port, body, connections), _load(bare_port, body, connections)
        if turn:
            ours.append(pair[0])
            bare.append(pair[1])
    for title, unit, pick in (
        ("calls", "calls/s", lambda r: r.calls_per_s),
        ("p50", "ms", lambda r: r.p50_ms),
        ("p99", "ms", lambda r: r.p99_ms),
    ):
        name = f"GetImage, {connections} connection{'s' if connections > 1 else ''}, {title}"
        report.add(
            Row(name, Figure("ours", unit, [*map(pick, ours)]), Figure("bare aiohttp", unit, [*map(pick, bare)]))
        )


def get_image_load(port: int, image_id: str) -> LoadResult:
    """GetImage on one connection for SECONDS."""
    body = json.dumps({"method": "ImageStore.GetImage", "params": [{"id": image_id}], "id": 1})
    return _load(port, body, 1)


def _load(port: int, body: str, connections: int) -> LoadResult:
    command = [sys.executable, "-m", "bench.load", str(port), PATH, body, str(connections), str(SECONDS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120)
    return LoadResult(*json.loads(done.stdout))


@contextmanager
def _bare_server() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-m", "bench.bare_server"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()
