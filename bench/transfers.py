"""Pull and download of a 1 GiB image against the plain tools for it, and the memory both daemons take meanwhile."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from bench import daemons
from bench.disks import MIB, gzip_disk, write_disk
from bench.harness import ROUNDS, Figure, PeakMemory, Report, Row, compare, mb_per_s, stopwatch
from bench.rpc_calls import get_image_load
from rpc.messages import ImageRequest, VolumeRequest

SIZE_MIB = 1024
PIECE_BYTES = 1 << 20


def run(report: Report, workdir: Path) -> None:
    """Upload, pull, clone and download, in turn with the references."""
    raw = write_disk(workdir / "image.raw", SIZE_MIB)
    packed = gzip_disk(raw)
    with daemons.running(workdir) as stack:
        with PeakMemory([stack.service.pid, stack.agent.pid]) as memory:
            _pull(report, stack, packed, workdir)
            _download(report, stack, raw)
        service, agent = memory.peak_mib.values()
        report.note(
            f"peak resident memory over uploads, pulls, clones and downloads of {SIZE_MIB} MiB: "
            f"image-service {service:.0f} MiB, agent-image {agent:.0f} MiB (limit: 150 MiB each)"
        )


def _pull(report: Report, stack: daemons.Stack, packed: Path, workdir: Path) -> None:
    record = stack.upload(packed)
    url = f"{stack.service.url}/images/{record.id}/download"
    turns = iter(range(1000))

    def ours() -> float:
        name = f"pull-{next(turns)}"
        with stopwatch() as elapsed:
            stack.rpc.request_image(ImageRequest(id=name, source=url))
        stack.rpc.delete_image(ImageRequest(id=name))
        return mb_per_s(SIZE_MIB * MIB, elapsed())

    def reference() -> float:
        target = workdir / "reference.raw"
        with stopwatch() as elapsed:
            script = 'curl -sSf "$0" | gzip -d > "$1" && sync "$1"'
            subprocess.run(["bash", "-o", "pipefail", "-c", script, url, str(target)], check=True, timeout=600)
        target.unlink()
        return mb_per_s(SIZE_MIB * MIB, elapsed())

    title = f"pull of a {SIZE_MIB} MiB gzip image: download, unpack, verify, publish"
    report.add(compare(title, "MB/s", ours, ("curl, gzip -d, sync", reference)))


def _download(report: Report, stack: daemons.Stack, raw: Path) -> None:
    record = stack.upload(raw)
    stack.pull(record.id)
    clone = stack.rpc.clone_image(ImageRequest(id=record.id, dest="mistify/bench")).volumes[0]
    snapshot_id = (
        f"images/{record.id}@{stack.rpc.get_image(ImageRequest(id=record.id)).images[0].snapshot.split('@')[1]}"
    )

    def ours() -> float:
        size = 0
        with stopwatch() as elapsed, stack.rpc.download_snapshot(snapshot_id) as pieces:
            for piece in pieces:
                size += len(piece)
        return mb_per_s(size, elapsed())

    _latency_meanwhile(report, stack, snapshot_id, record.id)
    with _cat_server(raw) as port:
        reference = functools.partial(_read_all, port)
        report.add(compare("snapshot download", "MB/s", ours, ("cat file over a socket", reference)))
    stack.rpc.delete_dataset(VolumeRequest(id=clone.id.partition("/")[2]))


def _latency_meanwhile(report: Report, stack: daemons.Stack, snapshot_id: str, image_id: str) -> None:
    """GetImage on one connection while a download runs flat out, and while nothing else does."""
    url = f"{stack.agent.url}/snapshots/download?id={quote(snapshot_id)}"
    script = 'while curl -sSf -o /dev/null "$0"; do :; done'
    row = Row("GetImage p99 while a snapshot is downloaded", Figure("ours", "ms"), Figure("no download", "ms"))
    for _ in range(ROUNDS):
        row.reference.values.append(get_image_load(stack.agent.port, image_id).p99_ms)
        with subprocess.Popen(["bash", "-c", script, url], process_group=0) as downloads:
            try:
                row.ours.values.append(get_image_load(stack.agent.port, image_id).p99_ms)
            finally:
                os.killpg(downloads.pid, signal.SIGTERM)
    report.add(row)


@contextmanager
def _cat_server(path: Path) -> Iterator[int]:
    """For every connection, ``cat file`` into the socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    subprocess.run(["cat", str(path)], stdout=peer.fileno(), check=False, timeout=600)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _read_all(port: int) -> float:
    size = 0
    buffer = bytearray(PIECE_BYTES)
    with stopwatch() as elapsed, socket.create_connection(("127.0.0.1", port)) as peer:
        while count := peer.recv_into(buffer):
            size += count
    return mb_per_s(size, elapsed())
