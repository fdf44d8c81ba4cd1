"""What the reader of ``make demo`` sees: numbered steps, one sentence why, what came of it, and how long it took."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_WIDTH = 110
_INDENT = "      "


class Narrator:
    """Prints the steps of a story as they happen."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._begun = time.monotonic()
        self.steps = 0

    @contextmanager
    def step(self, title: str, why: str) -> Iterator[Callable[[str], None]]:
        """Run one step: the block's facts are printed as it tells them, its time when it ends."""
        self.steps += 1
        begun = time.monotonic()
        self._print(f"\n{self.steps:3}.  {title}")
        self._print(textwrap.fill(why, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT))
        yield lambda fact: self._print(f"{_INDENT}-> {fact}")
        self._print(f"{_INDENT}   {time.monotonic() - begun:.2f} s")

    def end(self) -> None:
        """Print that everything happened."""
        self._print(f"\nAll {self.steps} steps happened, in {time.monotonic() - self._begun:.1f} s.")

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def mib(size_bytes: int) -> str:
    """Show a size."""
    return f"{size_bytes / (1 << 20):.1f} MiB"


def short(digest: str) -> str:
    """Show enough of a digest to compare it by eye."""
    kind, _, value = digest.rpartition(":")
    return f"{kind or 'sha256'}:{value[:16]}…"
