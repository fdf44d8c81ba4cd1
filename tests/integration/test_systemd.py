"""The systemd units: accepted by systemd, tightly closed, and kept to by the daemons (notify protocol, memory rules)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from demo.servers.processes import free_port
from tests.acceptance.daemons import clean_environment
from tests.waiting import wait_until

UNITS = ("mistify-agent-image", "mistify-image-service")
MODULES = {"mistify-agent-image": "agent_image", "mistify-image-service": "image_service"}
# What systemd calls "OK" is below 5; ours can bear much more. The agent needs ZFS, hence CAP_SYS_ADMIN.
EXPOSURE_MAX = {"mistify-agent-image": 3.0, "mistify-image-service": 1.5}
LAUNCHER = """
import ctypes, os, sys
PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    print("no PR_SET_MDWE in this kernel", file=sys.stderr)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""
"""Refuses memory that is writable and executable from here on, over exec, as MemoryDenyWriteExecute= does."""


def _unit_with_true(checkout: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the unit whose program exists on every machine: verify looks for it."""
    text = (checkout / f"systemd/{name}.service").read_text()
    copy = tmp_path / f"{name}.service"
    copy.write_text(re.sub(r"/usr/local/bin/[a-z-]+", "/bin/true", text))
    return copy


@pytest.mark.backend("systemd")
@pytest.mark.parametrize("name", UNITS)
def test_unit_verifies_clean(checkout: Path, tmp_path: Path, name: str) -> None:
    copy = _unit_with_true(checkout, tmp_path, name)
    ended = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.backend("systemd")
@pytest.mark.parametrize("name", UNITS)
def test_unit_sandbox_is_tight(
    checkout: Path, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    copy = _unit_with_true(checkout, tmp_path, name)
    command = ["systemd-analyze", "security", "--offline=true", str(copy)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"exposure level for \S+: (\d+\.\d+)", ended.stdout)
    assert found, ended.stdout + ended.stderr
    record_property("exposure", found.group(1))
    assert float(found.group(1)) <= EXPOSURE_MAX[name]


@pytest.mark.parametrize("name", UNITS)
def test_unit_uses_only_flags_the_daemon_has(checkout: Path, name: str) -> None:
    text = (checkout / f"systemd/{name}.service").read_text()
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command is not None
    flags = re.findall(r"--[a-z-]+", command.group(1))
    ended = subprocess.run(
        [sys.executable, "-m", MODULES[name], "--help"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert flags
    assert [flag for flag in flags if flag not in ended.stdout] == []


@contextmanager
def _under_notify(tmp_path: Path, checkout: Path, name: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Run a daemon the way the unit does: notify socket, watchdog, no writable-and-executable memory."""
    address = tmp_path / "notify"
    environment = clean_environment({"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "2000000"})
    environment.pop("WATCHDOG_PID", None)
    flags = ["--port", str(free_port()), "--state-dir", str(tmp_path / "state")]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (tmp_path / "log").open("wb") as log:
        notify.bind(str(address))
        notify.settimeout(0.5)
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, MODULES[name], *flags],
            cwd=checkout,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield process, notify
        finally:
            process.kill()
            process.wait(30)


def _expect(process: subprocess.Popen[bytes], notify: socket.socket, word: str, log: Path) -> None:
    """Receive until a message has ``word``; AssertionError if the daemon ends before."""

    def heard() -> bool:
        with contextlib.suppress(TimeoutError):
            return word in notify.recv(4096).decode().split("\n")
        assert process.poll() is None, f"ended before it said {word}:\n{log.read_text()[-4000:]}"
        return False

    wait_until(heard, f"{word} from the daemon", timeout_s=60)


@pytest.mark.parametrize("name", UNITS)
def test_daemon_tells_systemd_ready_alive_and_stopping(tmp_path: Path, checkout: Path, name: str) -> None:
    log = tmp_path / "log"
    with _under_notify(tmp_path, checkout, name) as (process, notify):
        _expect(process, notify, "READY=1", log)
        _expect(process, notify, "WATCHDOG=1", log)
        _expect(process, notify, "WATCHDOG=1", log)
        os.kill(process.pid, signal.SIGTERM)
        _expect(process, notify, "STOPPING=1", log)
        wait_until(lambda: process.poll() is not None, f"{name} to end after SIGTERM", timeout_s=60)
        assert process.returncode == 0, log.read_text()[-4000:]
