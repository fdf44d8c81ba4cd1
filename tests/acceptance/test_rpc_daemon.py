"""The life of a daemon, as a process."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpc.notify import STATUS_MAX_CHARS, ServiceManager
from rpc.resources import OPEN_FILES_MAX
from tests.waiting import wait_until

TIMEOUT_S = 60


class Sample:
    """The sample daemon of :mod:`tests.unit.rpc_parts`, run with arguments."""

    def __init__(self, scratch: Path, *args: str, **environ: str) -> None:
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.rpc_parts", *args],
            env={**os.environ, "SCRATCH": str(scratch), **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def url(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("listening on "):
                return line.removeprefix("listening on ").strip()
        raise AssertionError(f"the daemon ended with {self.process.wait(TIMEOUT_S)} before it listened")

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(self.base + path, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return str(response.read().decode())

    def start(self) -> Sample:
        self.base = self.url()
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)

    def fail(self) -> tuple[int, str]:
        _, text = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    running: list[Sample] = []

    def start(*args: str, **environ: str) -> Sample:
        running.append(Sample(tmp_path, *args, **environ))
        return running[-1]

    yield start
    for sample in running:
        sample.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("loop", [[], ["--uvloop"]])
def test_signal_to_an_idle_daemon_parks_and_exits_0(run: Any, tmp_path: Path, number: int, loop: list[str]) -> None:
    sample = run(*loop).start()
    assert sample.get("/healthz") == "ok\n"
    assert sample.stop(number) == 0
    assert (tmp_path / "parked").exists()


@pytest.mark.parametrize("loop", [[], ["--uvloop"]])
def test_signal_while_a_call_runs_lets_it_end_and_takes_no_new_ones(run: Any, tmp_path: Path, loop: list[str]) -> None:
    sample = run(*loop).start()
    answers: list[str] = []
    caller = threading.Thread(target=lambda: answers.append(sample.get("/slow")))
    caller.start()
    wait_until((tmp_path / "started").exists, "the call has begun")
    sample.process.send_signal(signal.SIGTERM)
    host, port = sample.base.removeprefix("http://").split(":")
    wait_until(lambda: not is_open(host, int(port)), "the port is closed")
    (tmp_path / "let-go").touch()
    assert sample.process.wait(TIMEOUT_S) == 0
    caller.join(TIMEOUT_S)
    assert answers == ["done\n"]


def is_open(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S):
            return True
    except OSError:
        return False


def test_signal_with_a_call_that_never_ends_still_parks_and_exits_0(run: Any, tmp_path: Path) -> None:
    sample = run(DRAIN_S="3").start()
    with socket.create_connection(("127.0.0.1", int(sample.base.rpartition(":")[2])), timeout=TIMEOUT_S) as caller:
        caller.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until((tmp_path / "started").exists, "the call has begun")
        sample.process.send_signal(signal.SIGTERM)
        status, text = sample.fail()
    assert status == 0
    assert (tmp_path / "parked").exists()
    assert "with calls in flight" in text
    assert "leaving threads behind" in text


def test_park_hook_that_fails_is_logged_and_the_exit_is_clean(run: Any) -> None:
    sample = run(PARK_FAILS="1").start()
    sample.process.send_signal(signal.SIGTERM)
    status, text = sample.fail()
    assert status == 0
    assert "a park hook failed" in text
    assert "the hook is broken" in text


def test_port_file_holds_the_port_and_goes_with_the_daemon(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "port"
    sample = run("--port-file", str(path)).start()
    wait_until(path.exists, "the port file")
    assert sample.base == f"http://127.0.0.1:{path.read_text().strip()}"
    assert sample.stop() == 0
    assert not path.exists()


def test_port_that_is_taken_is_a_clear_error(run: Any) -> None:
    first = run().start()
    status, text = run("-p", first.base.rpartition(":")[2]).fail()
    assert status == 1
    assert "cannot listen on 127.0.0.1 port" in text
    assert "Traceback" not in text


def test_other_address_without_token_is_a_clear_error(run: Any) -> None:
    status, text = run("--bind", "0.0.0.0").fail()
    assert status == 1
    assert "--token-file" in text
    assert "--insecure" in text
    assert "Traceback" not in text


def test_other_address_with_insecure_serves_and_warns(run: Any) -> None:
    sample = run("--bind", "0.0.0.0", "--insecure").start()
    sample.base = sample.base.replace("0.0.0.0", "127.0.0.1")
    assert '"ready":true' in sample.get("/readyz")
    sample.process.send_signal(signal.SIGTERM)
    assert sample.process.wait(TIMEOUT_S) == 0


def test_token_file_is_asked_for(run: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    sample = run("--token-file", str(tmp_path / "token")).start()
    assert '"ready":true' in sample.get("/readyz", Authorization="Bearer s3cret")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        sample.get("/readyz")


def test_token_file_that_is_missing_is_a_clear_error(run: Any, tmp_path: Path) -> None:
    status, text = run("--token-file", str(tmp_path / "none")).fail()
    assert (status, "Traceback" in text) == (1, False)
    assert "token file" in text
    assert "No such file" in text


def test_host_name_option_is_honoured(run: Any) -> None:
    sample = run("--host-name", "agent.fleet").start()
    assert '"ready":true' in sample.get("/readyz", Host="agent.fleet:1")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        sample.get("/readyz", Host="evil.example")


# -- where values come from ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "environ", "config", "is_info"),
    [
        ([], {}, "", False),
        ([], {}, 'log-level = "info"', True),
        ([], {}, 'log_level = "info"', True),
        ([], {"MISTIFY_LOG_LEVEL": "error"}, 'log-level = "info"', False),
        (["-l", "info"], {"MISTIFY_LOG_LEVEL": "error"}, 'log-level = "error"', True),
        (["-l", "INFO"], {}, "", True),
        ([], {}, '{"log-level": "info"}', True),
    ],
)
def test_value_comes_from_flag_then_environment_then_file(
    run: Any, tmp_path: Path, args: list[str], environ: dict[str, str], *, config: str, is_info: bool
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config)
    sample = run("--config", str(path), *args, **environ).start()
    sample.process.send_signal(signal.SIGTERM)
    status, text = sample.fail()
    assert status == 0
    assert ("INFO rpc.daemon: ended" in text) is is_info


@pytest.mark.parametrize("names", ['"agent.fleet"', '["other", "agent.fleet"]'])
def test_config_file_may_come_from_the_environment(run: Any, tmp_path: Path, names: str) -> None:
    (tmp_path / "c.toml").write_text(f"host-name = {names}\n")
    sample = run(MISTIFY_CONFIG=str(tmp_path / "c.toml")).start()
    assert '"ready":true' in sample.get("/readyz", Host="agent.fleet")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("prot = 1", ["unknown key prot", "port"]),
        ("port = = 1", ["not valid"]),
        ('{"port": }', ["not valid"]),
        ("port = 70000", ["70000"]),
        ('log-level = "loud"', ["loud"]),
        ("port = nan", ["port", "finite"]),
        ("port = [1]", ["port", "one value"]),
    ],
)
def test_config_file_that_is_wrong_is_a_clear_error(run: Any, tmp_path: Path, config: str, words: list[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config)
    status, text = run("-c", str(path)).fail()
    assert status == 2
    assert all(word in text for word in words), text
    assert "Traceback" not in text


def test_config_file_that_is_missing_is_a_clear_error(run: Any, tmp_path: Path) -> None:
    status, text = run("-c", str(tmp_path / "none.toml")).fail()
    assert (status, "cannot read" in text) == (2, True)


# -- the service manager ---------------------------------------------------------------------------------------------------


class Manager:
    """A service manager's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(TIMEOUT_S)

    def read(self) -> list[str]:
        return self._socket.recv(4096).decode().split("\n")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    is_path = request.param == "path"
    opened = Manager(str(tmp_path / "notify") if is_path else f"@mistify-test-{os.getpid()}-{id(request)}")
    yield opened
    opened.close()


def test_daemon_tells_its_manager_ready_watchdog_and_stopping(run: Any, manager: Manager) -> None:
    sample = run(**manager.environ, WATCHDOG_USEC="100000").start()
    seen: list[str] = []

    def has(line: str) -> bool:
        seen.extend(manager.read())
        return line in seen

    wait_until(lambda: has("READY=1"), "READY=1")
    wait_until(lambda: has("WATCHDOG=1"), "WATCHDOG=1")
    assert f"STATUS=listening on {sample.base}" in seen
    assert f"MAINPID={sample.process.pid}" in seen
    sample.process.send_signal(signal.SIGTERM)
    wait_until(lambda: has("STOPPING=1"), "STOPPING=1")
    assert sample.process.wait(TIMEOUT_S) == 0


def test_manager_gets_one_line_of_status(manager: Manager) -> None:
    ServiceManager(manager.environ).status("pulling\nREADY=1 " + "x" * 1000)
    (line,) = manager.read()
    assert line.startswith("STATUS=pulling READY=1 x")
    assert len(line) == len("STATUS=") + STATUS_MAX_CHARS


# -- connections ----------------------------------------------------------------------------------------------------------


def _open_files_max(pid: int | str) -> int:
    """The soft limit of a process."""
    return resource.prlimit(int(pid), resource.RLIMIT_NOFILE)[0]


def test_limit_on_open_files_is_raised_as_far_as_allowed(run: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(OPEN_FILES_MAX, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        sample = run()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert _open_files_max(sample.start().process.pid) == wanted


@pytest.mark.parametrize("uvloop", [True, False])
@pytest.mark.parametrize("said", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc"], ids=["nothing", "half a head"])
def test_connection_without_a_request_is_closed_after_a_while(run: Any, said: bytes, *, uvloop: bool) -> None:
    sample = run(*(["--uvloop"] if uvloop else []), IDLE_TIMEOUT_S="0.5").start()
    host, _, port = sample.base.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as idle:
        idle.sendall(said)
        assert idle.recv(1) == b""


def test_many_idle_connections_leave_room_for_calls(run: Any) -> None:
    sample = run("--uvloop").start()
    host, _, port = sample.base.removeprefix("http://").rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=TIMEOUT_S))
        assert sample.get("/healthz") == "ok\n"


@pytest.mark.parametrize(
    "environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "/nowhere/at/all"}]
)
def test_manager_that_is_not_there_disturbs_nobody(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(environ).ready("fine")
    assert bool(caplog.records) is (environ.get("NOTIFY_SOCKET") == "/nowhere/at/all")


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval_is_half_of_what_is_allowed(environ: dict[str, str], interval_s: float | None) -> None:
    assert ServiceManager({"NOTIFY_SOCKET": "/run/x", **environ}).watchdog_interval_s == interval_s
    assert ServiceManager(environ).watchdog_interval_s is None
