"""Both daemons as processes on free loopback ports, for tests that speak to them over real sockets.

``start_agent`` and ``start_image_service`` give a running daemon whose ``/readyz`` has said yes, as a context manager that
ends it. What it wrote to its standard streams is in ``daemon.log()`` and is part of every failure message.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from demo.servers.processes import free_port
from tests.acceptance import forked
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]

START_TIMEOUT_S = 60.0
"""A daemon imports, opens its stores and binds within two seconds; the rest is for a machine that is busy."""

STOP_TIMEOUT_S = 30.0 * PATIENCE
"""Daemons promise to drain within 10 s; the rest is for a machine that is busy."""

CALL_TIMEOUT_S = 120.0 * PATIENCE
"""One call of a test; pulls of test images take a second or two."""

_LOG_TAIL_CHARS = 6_000


def write_disk(device: Path | str, data: bytes) -> None:
    """Write to the beginning of a disk, durably: closing it writes nothing while udev has the device open, too."""
    with Path(device).open("r+b") as disk:
        disk.write(data)
        disk.flush()
        os.fsync(disk.fileno())


class RpcFailureError(AssertionError):
    """A method answered with an error; ``text`` is the wire's error string."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a daemon under test: ours without any MISTIFY_* setting, and the checkout importable."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MISTIFY_")}
    env["PYTHONPATH"] = str(ROOT)
    return env | dict(extra or {})


class Daemon:
    """One daemon process that can be stopped, killed and started again on the same port and state."""

    def __init__(
        self, module: str, arguments: Sequence[str], port: int, log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        self.command = [sys.executable, "-m", module, *arguments]
        self.env = clean_environment(env)
        self.process: forked.Process | None = None

    def start(self, *, wait: bool = True) -> Daemon:
        """Start the process and wait until it is ready."""
        self.process = forked.start(self.command, self.env, self.log_path, ROOT)
        if wait:
            wait_until(self.is_ready, f"{self.command[2]} to be ready", timeout_s=START_TIMEOUT_S)
        return self

    def is_ready(self) -> bool:
        """Whether /readyz says yes; AssertionError with the log if the process is gone."""
        assert self.process is not None
        status = self.process.poll()
        assert status is None, f"{self.command} ended with status {status}:\n{self.log()[-_LOG_TAIL_CHARS:]}"
        try:
            return requests.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.command} ignored SIGTERM:\n{self.log()[-_LOG_TAIL_CHARS:]}") from None

    def restart(self) -> Daemon:
        """Stop and start again."""
        self.stop()
        return self.start()

    def log(self) -> str:
        """Everything it wrote so far, over all its lives."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics; 0 if it is not there."""
        text = requests.get(f"{self.url}/metrics", timeout=CALL_TIMEOUT_S).text
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{key}="{val}"' in sample for key, val in labels.items()):
                return float(value)
        return 0.0


class Agent(Daemon):
    """A running agent-image."""

    def raw_call(
        self, method: str, request: Mapping[str, Any] | None = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> dict[str, Any]:
        """The whole JSON-RPC 1.0 answer of one call."""
        name = method if "." in method else f"ImageStore.{method}"
        body = json.dumps({"method": name, "params": [request or {}], "id": 1})
        response = requests.post(
            f"{self.url}/_mistify_RPC_", data=body, headers={"Content-Type": "application/json"}, timeout=timeout_s
        )
        assert response.status_code == 200, f"{method}: {response.status_code} {response.text!r}"
        answer: dict[str, Any] = response.json()
        return answer

    def call(self, method: str, *, timeout_s: float = CALL_TIMEOUT_S, **request: Any) -> dict[str, Any]:
        """The result of one call; RpcFailureError if it answered with an error."""
        answer = self.raw_call(method, request, timeout_s=timeout_s)
        if answer["error"] is not None:
            raise RpcFailureError(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def error(self, method: str, **request: Any) -> str:
        """The error text of a call that must fail."""
        answer = self.raw_call(method, request)
        assert answer["error"] is not None, f"{method} {request} succeeded: {answer['result']}"
        assert answer["result"] is None
        text: str = answer["error"]
        return text

    def download(self, snapshot_id: str, **arguments: Any) -> requests.Response:
        """GET /snapshots/download with a JSON body."""
        return requests.get(
            f"{self.url}/snapshots/download", json={"id": snapshot_id}, timeout=CALL_TIMEOUT_S, **arguments
        )


def _flags(flags: Mapping[str, Any]) -> list[str]:
    """``max_pending=3`` -> ``--max-pending 3``; True is a bare flag, None leaves one out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def new_agent(
    state_dir: Path,
    *,
    image_service: str | None = None,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    **flags: Any,
) -> Agent:
    """An agent that is not started yet. ``image_service`` is HOST:PORT; flags by name (``driver="zfs"``)."""
    port = port or free_port()
    settings: dict[str, Any] = {
        "port": port,
        "state_dir": state_dir,
        "driver": "file",
        "image_service": image_service or "127.0.0.1:9",  # the discard port: refuses at once
        "log_level": "info",
    }
    return Agent("agent_image", _flags(settings | flags), port, state_dir.with_suffix(".log"), env)


@contextmanager
def start_agent(
    state_dir: Path,
    *,
    image_service: str | None = None,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    **flags: Any,
) -> Iterator[Agent]:
    """A ready agent; stopped with SIGTERM at the end."""
    agent = new_agent(state_dir, image_service=image_service, port=port, env=env, **flags)
    with _running(agent):
        yield agent


@contextmanager
def start_image_service(
    state_dir: Path, *, port: int | None = None, env: Mapping[str, str] | None = None, **flags: Any
) -> Iterator[Daemon]:
    """A ready image service; stopped with SIGTERM at the end."""
    port = port or free_port()
    settings: dict[str, Any] = {"port": port, "state_dir": state_dir, "log_level": "info"}
    daemon = Daemon("image_service", _flags(settings | flags), port, state_dir.with_suffix(".log"), env)
    with _running(daemon):
        yield daemon


@contextmanager
def _running(daemon: Daemon) -> Iterator[None]:
    try:
        daemon.start()
        yield
    finally:
        if daemon.process is not None:
            daemon.stop()
