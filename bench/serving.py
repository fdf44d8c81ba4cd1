"""Downloads of one image by many clients against nginx on the same file, and uploads against writing the bytes to the same disk."""

from __future__ import annotations

import functools
import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.disks import MIB, write_disk
from bench.harness import PeakMemory, Report, compare, mb_per_s, stopwatch
from demo.servers.processes import free_port
from tests.acceptance.daemons import Daemon, start_image_service
from tests.waiting import wait_until

SIZE_MIB = 1024
CLIENTS = {1: 3, 8: 3, 64: 1}
"""Clients at once, and rounds of measuring: 64 clients take 64 GiB a round."""
TIMEOUT_S = 1800


def run(report: Report, workdir: Path) -> None:
    """Upload, then download, in turn with the references."""
    disk = write_disk(workdir / "image.raw", SIZE_MIB)
    with start_image_service(workdir / "service", log_level="warning") as service:
        with PeakMemory([service.pid]) as memory:
            _upload(report, service, disk, workdir)
            _download(report, service, disk, workdir)
        report.note(
            f"peak resident memory of the image service meanwhile: {memory.peak_mib[service.pid]:.0f} MiB. An upload is hashed "
            "(sha256 of what is stored, sha512 of what is in it) and looked at while it is written; dd does neither"
        )


def _upload(report: Report, service: Daemon, disk: Path, workdir: Path) -> None:
    def ours() -> float:
        with stopwatch() as elapsed:
            image_id = put(service, disk)
        call = ["curl", "-sSf", "-X", "DELETE", f"{service.url}/images/{image_id}", "-o", os.devnull]
        subprocess.run(call, check=True, timeout=TIMEOUT_S)
        return mb_per_s(SIZE_MIB * MIB, elapsed())

    def reference() -> float:
        target = workdir / "dd.raw"
        with stopwatch() as elapsed:
            copy = ["dd", f"if={disk}", f"of={target}", "bs=1M", "conv=fsync", "status=none"]
            subprocess.run(copy, check=True, timeout=TIMEOUT_S)
        target.unlink()
        return mb_per_s(SIZE_MIB * MIB, elapsed())

    title = f"upload of {SIZE_MIB} MiB until it is durable"
    report.add(compare(title, "MB/s", ours, ("dd conv=fsync", reference)))


def put(service: Daemon, disk: Path) -> str:
    """Upload a file with curl; the image's id."""
    call = ["curl", "-sSf", "-T", str(disk), "-H", "X-Image-Type: kvm", "-H", "Expect:", f"{service.url}/images"]
    answer = subprocess.run(call, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    return answer.partition('"id":"')[2].partition('"')[0]


def _download(report: Report, service: Daemon, disk: Path, workdir: Path) -> None:
    path = f"{service.url}/images/{put(service, disk)}/download"
    with nginx(disk.parent, workdir) as url:
        for clients, rounds in CLIENTS.items():
            ours = functools.partial(_fetch, path, clients, workdir)
            reference = functools.partial(_fetch, f"{url}/{disk.name}", clients, workdir)
            title = f"download of {SIZE_MIB} MiB by {clients} client{'s' if clients > 1 else ''} at once"
            report.add(compare(title, "MB/s in all", ours, ("nginx with sendfile", reference), rounds))


def _fetch(url: str, clients: int, workdir: Path) -> float:
    """Every client takes everything, one connection each; megabytes a second in all."""
    config = workdir / "curl.config"
    config.write_text(f'url = "{url}"\noutput = "{os.devnull}"\n' * clients)
    together = ["--parallel", "--parallel-immediate", "--parallel-max", str(clients)]
    command = ["curl", "-sSf", "--no-progress-meter", *together, "-K", str(config)]
    with stopwatch() as elapsed:
        subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return mb_per_s(SIZE_MIB * MIB * clients, elapsed())


@contextmanager
def nginx(root: Path, workdir: Path) -> Iterator[str]:
    """nginx on a free loopback port with the files of ``root``; MISTIFY_NGINX says where the program is, if not on the path."""
    program = os.environ.get("MISTIFY_NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise SystemExit("nginx is not here (apt-get install nginx-light, or MISTIFY_NGINX=PROGRAM)")
    port, base = free_port(), workdir / "nginx"
    base.mkdir()
    paths = "".join(
        f"{kind}_temp_path {base}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""  # its workers must be able to read the file
    (base / "nginx.conf").write_text(
        f"{user} daemon off; pid {base}/pid; error_log {base}/error.log; worker_processes auto;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on;\n{paths}"
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen([program, "-c", str(base / "nginx.conf"), "-e", str(base / "error.log")])
    try:
        wait_until((base / "pid").exists, "nginx to start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
