"""Both daemons as processes, with their embedded drivers: what an operator would start on two machines, here on one."""

from __future__ import annotations

import contextlib
import os
import signal
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
_SOURCES = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Daemon:
    """One running daemon."""

    name: str
    process: subprocess.Popen[bytes]
    port_file: Path
    log: Path | None

    @property
    def port(self) -> int:
        """The port it wrote down once it was open; 0 until then."""
        try:
            return int(self.port_file.read_text() or 0)
        except FileNotFoundError:
            return 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def image_service(state: Path, port: int = 0, log: Path | None = None) -> Iterator[Daemon]:
    """Run an image service with its embedded stores below ``state``; port 0 takes a free one.

    Without ``log`` it writes to our own stderr.
    """
    with _running("image_service", state, [], port, log) as daemon:
        yield daemon


@contextmanager
def agent(state: Path, service_port: int, port: int = 0, log: Path | None = None) -> Iterator[Daemon]:
    """Run an agent with the file driver below ``state`` that pulls from the image service on ``service_port``; port 0 takes a free one."""
    flags = ["--driver", "file", "--image-service", f"127.0.0.1:{service_port}"]
    with _running("agent_image", state, flags, port, log) as daemon:
        yield daemon


def check_alive(*running: Daemon) -> None:
    """DemoError if one of the daemons has ended."""
    for daemon in running:
        if daemon.process.poll() is not None:
            raise DemoError(f"{daemon.name} ended with status {daemon.process.returncode}")


@contextmanager
def _running(module: str, state: Path, flags: Sequence[str], port: int, log: Path | None) -> Iterator[Daemon]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MISTIFY_")}
    state.mkdir(parents=True, exist_ok=True)
    port_file = state.parent / f"{state.name}.port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, "--port", str(port), "--port-file", str(port_file)]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log else None
        process = subprocess.Popen(  # noqa: S603 - our own program
            dies_with_parent([*command, "--state-dir", str(state), *flags]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=_SOURCES,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the demo, which then stops the daemons in order
        )
        daemon = Daemon(module, process, port_file, log)
        stack.callback(_stop, daemon)
        _wait_ready(daemon)
        yield daemon


def _wait_ready(daemon: Daemon) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    pause = Event()
    with requests.Session() as session:
        session.trust_env = False  # a proxy has no business on loopback
        while time.monotonic() < deadline:
            check_alive(daemon)
            with contextlib.suppress(requests.RequestException):  # not listening yet
                if daemon.port and session.get(f"{daemon.url}/readyz", timeout=READY_TIMEOUT_S).ok:
                    return
            pause.wait(POLL_S)
    raise DemoError(f"{daemon.name} was not ready in {READY_TIMEOUT_S:.0f} s")


def _stop(daemon: Daemon) -> None:
    if daemon.process.poll() is None:
        daemon.process.send_signal(signal.SIGTERM)
    try:
        daemon.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired as err:
        daemon.process.kill()
        daemon.process.wait(STOP_TIMEOUT_S)
        raise DemoError(f"{daemon.name} did not end {STOP_TIMEOUT_S:.0f} s after SIGTERM") from err
    if daemon.process.returncode != 0:
        raise DemoError(f"{daemon.name} ended with status {daemon.process.returncode}")
