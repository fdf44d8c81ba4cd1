"""The policy of every test run: nothing is left out silently.

A test that needs a real backend says so with ``@pytest.mark.backend("qemu")``. If the backend is not on this machine, the test
*fails* and says how to get it, unless the run was told to leave it out by name: ``pytest --without qemu`` (may be repeated). Any
other skip turns the run red at its end, because a test that did not run has shown nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

# No test asserts on speed: on a busy machine the first example of any test may take a second.
hypothesis.settings.register_profile(
    "house", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("house")

_ASKED_FOR = "left out by name: "


class Backend(NamedTuple):
    """A real thing that tests run against."""

    is_there: Callable[[], bool]
    how_to_get: str


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


BACKENDS = {
    "qemu": Backend(_program("qemu-system-x86_64"), "apt-get install qemu-system-x86"),
    "systemd": Backend(_program("systemd-analyze"), "apt-get install systemd"),
    "apt": Backend(_program("apt-get"), "needs a Debian machine"),
    "zfs": Backend(lambda: "MISTIFY_LAB_POOL" in os.environ, "run them with make test-zfs, which has a pool for them"),
    "etcd": Backend(_program("etcd"), "apt-get install etcd-server"),
    "s3": Backend(
        _program("swift-proxy-server"),
        "apt-get install swift-proxy swift-account swift-container swift-object memcached",
    ),
    "haproxy": Backend(_program("haproxy"), "apt-get install haproxy"),
    "etcdctl": Backend(_program("etcdctl"), "apt-get install etcd-client"),
    "browser": Backend(_program("chromium"), "apt-get install chromium"),
}

_unasked_skips: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        choices=sorted(BACKENDS),
        help=f"leave out the tests that need this backend (one of {', '.join(sorted(BACKENDS))}); may be repeated",
    )


def _needed(item: pytest.Item) -> list[str]:
    return [str(name) for mark in item.iter_markers("backend") for name in mark.args]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = config.getoption("--without")
    for item in items:
        unknown = [name for name in _needed(item) if name not in BACKENDS]
        if unknown:
            raise pytest.UsageError(f"{item.nodeid} needs unknown backends: {unknown}; tests/conftest.py lists them")
        for name in _needed(item):
            if name in left_out:
                item.add_marker(pytest.mark.skip(reason=f"{_ASKED_FOR}{name}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    left_out = item.config.getoption("--without")
    for name in _needed(item):
        backend = BACKENDS[name]
        if name not in left_out and not backend.is_there():
            pytest.fail(f"{name} is not here ({backend.how_to_get}); --without {name} leaves it out", pytrace=False)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Remember a skip nobody asked for. An expected failure counts as one: it shows nothing either."""
    if not report.skipped:
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else "expected failure"
    if _ASKED_FOR not in reason:
        _unasked_skips.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if (
        _unasked_skips
        and not is_worker
        and session.exitstatus
        in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        )
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _unasked_skips:
        return
    terminalreporter.section("tests that did not run, unasked: the run is red", red=True)
    for line in _unasked_skips:
        terminalreporter.line(line, red=True)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Return the root of the source tree."""
    return Path(__file__).resolve().parent.parent
