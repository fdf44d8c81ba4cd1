"""The real pool of the ZFS lab, for tests: run them with tests/lab/test-zfs."""

from __future__ import annotations

import os
import subprocess

import pytest

from imaging.names import DatasetName, PoolName

PROGRAM_TIMEOUT_S = 120


def lab_pool() -> PoolName:
    """The pool the lab made for us; without a lab the test fails and says where there is one."""
    text = os.environ.get("MISTIFY_LAB_POOL")
    if text is None:
        pytest.fail("there is no pool to test on; run tests/lab/test-zfs (or leave out: --without zfs)", pytrace=False)
    return PoolName.parse(text)


def run(*command: object, check: bool = True) -> str:
    """Run a program as an administrator would; what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=False)
    if check:
        assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def there(root: DatasetName | PoolName) -> list[str]:
    """Everything below ``root`` as ZFS itself lists it, hidden datasets included."""
    return run("zfs", "list", "-H", "-r", "-t", "all", "-o", "name", root).splitlines()
