"""Both daemons as processes, with their embedded drivers: what an operator would start on two machines, here on one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import requests

from demo.errors import DemoError
from demo.qemu import dies_with_parent

READY_TIMEOUT_S = 60.0  # each is ready in about a second; the rest is for a busy machine
STOP_TIMEOUT_S = 20.0  # they promise to drain within 10 s
POLL_S = 0.05
LOG_TAIL_CHARS = 3000
_SOURCES = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Daemon:
    """One running daemon."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path | None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def image_service(state: Path, port: int, log: Path | None = None) -> Iterator[Daemon]:
    """Run an image service on ``port`` with its embedded stores below ``state``; without ``log`` it writes to our own stderr."""
    with _running("image_service", ["--port", str(port), "--state-dir", str(state)], port, log) as daemon:
        yield daemon


@contextmanager
def agent(state: Path, port: int, service_port: int, log: Path | None = None) -> Iterator[Daemon]:
    """Run an agent on ``port`` with the file driver below ``state``, pulling from the image service on ``service_port``."""
    flags = ["--port", str(port), "--state-dir", str(state), "--driver", "file"]
    with _running("agent_image", [*flags, "--image-service", f"127.0.0.1:{service_port}"], port, log) as daemon:
        yield daemon


def free_port() -> int:
    """Return a loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_alive(*running: Daemon) -> None:
    """DemoError if one of the daemons has ended."""
    for daemon in running:
        if daemon.process.poll() is not None:
            raise DemoError(f"{daemon.name} ended with status {daemon.process.returncode}{_tail(daemon)}")


@contextmanager
def _running(module: str, flags: Sequence[str], port: int, log: Path | None) -> Iterator[Daemon]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MISTIFY_")}
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log else None
        process = subprocess.Popen(  # noqa: S603 - our own program
            dies_with_parent([sys.executable, "-m", module, *flags]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=_SOURCES,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the demo, which then stops the daemons in order
        )
        daemon = Daemon(module, port, process, log)
        stack.callback(_stop, daemon)
        _wait_ready(daemon)
        yield daemon


def _wait_ready(daemon: Daemon) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    pause = Event()
    while time.monotonic() < deadline:
        check_alive(daemon)
        with contextlib.suppress(requests.RequestException):  # not listening yet
            if requests.get(f"{daemon.url}/readyz", timeout=READY_TIMEOUT_S).ok:
                return
        pause.wait(POLL_S)
    raise DemoError(f"{daemon.name} was not ready in {READY_TIMEOUT_S:.0f} s{_tail(daemon)}")


def _stop(daemon: Daemon) -> None:
    if daemon.process.poll() is None:
        daemon.process.send_signal(signal.SIGTERM)
    try:
        daemon.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired as err:
        daemon.process.kill()
        daemon.process.wait(STOP_TIMEOUT_S)
        raise DemoError(f"{daemon.name} did not end {STOP_TIMEOUT_S:.0f} s after SIGTERM{_tail(daemon)}") from err


def _tail(daemon: Daemon) -> str:
    return f"; its log ends:\n{daemon.log.read_text(errors='replace')[-LOG_TAIL_CHARS:]}" if daemon.log else ""
