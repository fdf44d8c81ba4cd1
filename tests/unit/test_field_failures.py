"""The page on failures in the field names tests that exist, for every failure."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = "docs/contribute/field-failures.md"


def test_page_names_tests_for_every_failure(checkout: Path) -> None:
    rows = re.findall(r"^\| (F\d+) \|.*$", (checkout / PAGE).read_text(), re.MULTILINE)
    assert rows == [f"F{number}" for number in range(1, 25)]


def test_page_names_tests_that_are_there(checkout: Path) -> None:
    for line in (checkout / PAGE).read_text().splitlines():
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named or not line.startswith("| F"), f"no test: {line[:60]}"
        for path, test in named:
            assert re.search(rf"def {test}\b", (checkout / path).read_text()), f"{path} has no {test}"
