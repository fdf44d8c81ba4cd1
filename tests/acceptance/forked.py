"""Daemons as forks of a process that has everything imported.

Under emulation a fresh interpreter takes half a minute until a daemon's modules are imported, a fork of one that has them a moment. Where
``MISTIFY_TEST_FORK`` is set (the ZFS lab sets it) daemons start this way; they run the same ``__main__`` with the same arguments.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

IS_WANTED = "MISTIFY_TEST_FORK" in os.environ
PRELOADED = ("agent_image.app", "rpc.daemon", "rpc.options", "uvloop", "tests.acceptance.forked")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Process(Protocol):
    """What tests need of a running process; subprocess.Popen has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...

    def send_signal(self, sig: int) -> None: ...


class ForkedProcess:
    """A daemon that was forked."""

    def __init__(self, module: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._name = module
        self._process = _context.Process(target=_become, args=(module, list(arguments), dict(env), log), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._name, timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


def _become(module: str, arguments: list[str], env: dict[str, str], log: Path) -> None:
    """In the fork: be the program."""
    os.environ.clear()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.argv = [module, *arguments]
    runpy.run_module(f"{module}.__main__", run_name="__main__", alter_sys=True)


def start(command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path) -> Process:
    """Start ``python -m module ...``, its output appended to ``log``."""
    if IS_WANTED:
        return ForkedProcess(command[2], command[3:], env, log)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=dict(env), cwd=cwd)


if "zfs" in os.environ.get("MISTIFY_TEST_DRIVER", ""):  # so that the process that forks has this too
    importlib.import_module("agent_image.drivers.zfs.binding").load()
