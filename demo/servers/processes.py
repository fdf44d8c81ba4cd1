"""Server processes on free loopback ports: logged to files, ended by their own pid, killed when their parent dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import TypeVar

from demo.errors import DemoError
from demo.qemu import dies_with_parent

ROOT = Path(__file__).resolve().parents[2]

STOP_TIMEOUT_S = 30.0
"""How long a server may take to end when it is told to."""

INSTALL_TIMEOUT_S = 900
"""Package lists and some megabytes over a slow mirror."""

LOG_TAIL_CHARS = 4_000
"""Of a log in a message."""

PATIENCE = float(os.environ.get("MISTIFY_PATIENCE", "1"))
"""By how much waiting is longer than said, on a machine that emulates another."""

_PORTS = range(20_100, 32_000)
"""Below Linux's ephemeral range (32768-60999), so that no outgoing connection takes a port we are about to use."""

_POLL_S = 0.02
_random = random.SystemRandom()
T = TypeVar("T")


def free_port() -> int:
    """Return a loopback port nobody listens on."""
    for _ in range(200):
        port = _random.choice(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise DemoError("no free loopback port")


def wait_until(condition: Callable[[], T], what: str, *, timeout_s: float) -> T:
    """Call ``condition`` until it gives something true and return that; DemoError names ``what`` after the bound."""
    timeout_s *= PATIENCE
    deadline, pause = time.monotonic() + timeout_s, Event()
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise DemoError(f"waited {timeout_s:.0f} s in vain for {what}")
        pause.wait(_POLL_S)


def path_with_sbin() -> str:
    """Return where programs are looked for: Debian's servers are often not on a user's path."""
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def ensure_programs(**packages: str) -> None:
    """Install the Debian packages of programs that are missing (``program=package``, underscores for dashes)."""
    pairs = {program.replace("_", "-"): package for program, package in packages.items()}
    if all(shutil.which(program, path=path_with_sbin()) for program in pairs):
        return
    command = [str(ROOT / "scripts" / "ensure-packages"), *(f"{program}={pairs[program]}" for program in pairs)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)  # noqa: S603
    if ended.returncode:
        raise DemoError(f"packages could not be installed: {ended.stderr.strip()[-LOG_TAIL_CHARS:]}")


class ServerProcess:
    """One server that can be killed, paused, continued and started again with the same arguments.

    It dies with the thread that started it, at the latest.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log_path: Path,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.log_path = log_path
        self._arguments = list(arguments)
        self._env = os.environ | {"PATH": path_with_sbin()} if env is None else dict(env)
        self._directory = directory or log_path.parent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise DemoError(f"{self._arguments[0]} was not started")
        return self._process.pid

    def start(self) -> None:
        """Start it; its output goes to the log."""
        if self.is_running:
            raise DemoError(f"{self._arguments[0]} is running already")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - arguments of our own making
                dies_with_parent(self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=self._directory,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(timeout=STOP_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM, as a service manager sends it; the exit status."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            return 0 if self._process is None else self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as err:
            self.kill()
            raise DemoError(f"{self._arguments[0]} did not end {STOP_TIMEOUT_S:.0f} s after SIGTERM") from err

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def log(self) -> str:
        """Return the end of what it wrote, for failure messages."""
        return self.log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:] if self.log_path.exists() else ""
