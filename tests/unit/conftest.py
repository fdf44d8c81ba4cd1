"""Unit tests show what the code does, not that the disk keeps it: their files are in memory, where a sync costs nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")

FREE_MIN_BYTES = 2 << 30
"""Containers often give it 64 MiB, and some tests look at how much room there is."""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory of the test's own, in memory where there is enough of it; gone afterwards."""
    usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= FREE_MIN_BYTES
    with tempfile.TemporaryDirectory(
        prefix="mistify-unit-", dir=MEMORY if usable else None, ignore_cleanup_errors=True
    ) as made:
        yield Path(made)
