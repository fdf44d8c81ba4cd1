"""A catalogue as large as the largest public ones is mirrored in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simplestreams.large import PRODUCTS, VERSIONS, write_large_tree
from tests.simplestreams.trees import check_whole

MEMORY_MAX_MIB = 256
"""Python and its modules take 55; the catalogue of 4 MB as tables about 20. An item or a file kept per item would show."""

RUN_TIMEOUT_S = 1000


def _run(source: Path, target: Path) -> Any:
    command = [sys.executable, "-m", "tests.simplestreams.large", str(source), str(target)]
    done = subprocess.run(
        command, capture_output=True, check=True, timeout=RUN_TIMEOUT_S, cwd=Path(__file__).resolve().parents[2]
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(2 * RUN_TIMEOUT_S)
def test_mirror_of_20000_items_takes_bounded_memory_and_is_whole(tmp_path: Path) -> None:
    source, target = write_large_tree(tmp_path / "source"), tmp_path / "mirror"
    report = _run(source, target)
    assert (report["versions"], report["files"], report["failed"]) == (PRODUCTS * VERSIONS, 20_000, [])
    assert report["peak_mib"] < MEMORY_MAX_MIB
    assert len(check_whole(target)) == PRODUCTS
    again = _run(source, target)
    assert (again["brought"], again["published"], again["removed"]) == (0, False, 0)
