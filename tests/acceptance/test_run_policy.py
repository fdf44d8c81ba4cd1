"""The run policy of tests/conftest.py, shown on a small run of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

def test_runs():
    assert True
"""
SKIPS = """
@pytest.mark.skip(reason="did not feel like it")
def test_skips():
    assert True
"""
XFAILS = """
@pytest.mark.xfail
def test_expected_failure():
    assert False
"""
NEEDS = """
@pytest.mark.backend("s3")
def test_needs_s3():
    assert True
"""
UNKNOWN = """
@pytest.mark.backend("punch-cards")
def test_needs_cards():
    assert True
"""
MODULE = """
pytest.skip("not today", allow_module_level=True)
"""


def _run(tmp_path: Path, checkout: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text((checkout / "tests/conftest.py").read_text())
    (tmp_path / "test_cases.py").write_text(CASES + source)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    backend(name): x\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path)}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "1 passed"),
        (SKIPS, "did not feel like it"),
        (XFAILS, "test_expected_failure: expected failure"),
        (MODULE, "not today"),
        (NEEDS, "s3 is not here (apt-get install swift-proxy"),
    ],
    ids=["all-run", "skip", "xfail", "module-skip", "missing-backend"],
)
def test_run_anything_left_out_unasked_is_red(
    tmp_path: Path, checkout: Path, source: str, expected: str, workers: str
) -> None:
    ended = _run(tmp_path, checkout, source, "-n", workers)
    assert expected in ended.stdout
    assert ended.returncode == (1 if source else 0), ended.stdout


def test_run_backend_left_out_by_name_is_green_and_says_so(tmp_path: Path, checkout: Path) -> None:
    ended = _run(tmp_path, checkout, NEEDS, "--without", "s3", "-rs")
    assert ended.returncode == 0
    assert "left out by name: s3" in ended.stdout
    assert "1 passed, 1 skipped" in ended.stdout


def test_run_unknown_backend_is_a_usage_error(tmp_path: Path, checkout: Path) -> None:
    ended = _run(tmp_path, checkout, UNKNOWN)
    assert ended.returncode == 4
    assert "punch-cards" in ended.stderr
