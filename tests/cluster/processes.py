"""Server processes of a cluster under test: started on free loopback ports, logged to files, ended by their own pid."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.acceptance.daemons import free_port

__all__ = ["ServerProcess", "ensure_programs", "free_port"]

ROOT = Path(__file__).resolve().parents[2]

STOP_TIMEOUT_S = 30.0
LOG_TAIL_CHARS = 4_000


def ensure_programs(**packages: str) -> None:
    """Install the Debian packages of programs that are missing (``program=package``, underscores for dashes)."""
    pairs = {program.replace("_", "-"): package for program, package in packages.items()}
    if all(shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for program in pairs):
        return
    command = [str(ROOT / "scripts" / "ensure-packages"), *(f"{program}={pairs[program]}" for program in pairs)]
    subprocess.run(command, check=True, timeout=900)


class ServerProcess:
    """One server that can be killed, paused, continued and started again with the same arguments."""

    def __init__(self, arguments: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None) -> None:
        self._arguments = list(arguments)
        self._log_path = log_path
        self._env = os.environ | dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert not self.is_running
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=self._log_path.parent,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(timeout=STOP_TIMEOUT_S)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def log(self) -> str:
        """The end of what it wrote, for failure messages."""
        return self._log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:] if self._log_path.exists() else ""
