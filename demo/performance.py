"""Running a story from a shell: a temporary directory, signals that clean up, an exit status, and logs shown if something failed."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from demo.errors import DemoError
from demo.narrator import Narrator
from imaging.errors import MistifyError

INTERRUPTED = 130
LOG_LINES = 30


def perform(name: str, tell: Callable[[Narrator, Path], None]) -> int:
    """Tell a story in a directory that is removed afterwards; the exit status: 0 only if every step happened."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    narrator = Narrator()
    try:
        with tempfile.TemporaryDirectory(prefix="mistify-demo-") as directory:
            try:
                tell(narrator, Path(directory))
            except (DemoError, MistifyError) as err:
                _explain(f"{name}: step {narrator.steps} failed: {err}", Path(directory))
                return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; everything is cleaned up", file=sys.stderr)
        return INTERRUPTED
    narrator.end()
    return 0


def _explain(what: str, directory: Path) -> None:
    """Say what failed, and what the daemons logged before their logs are removed."""
    print(f"\n{what}", file=sys.stderr)
    for log in sorted(directory.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        if lines:
            print("\n".join([f"  {log.name} ends:", *(f"    {line}" for line in lines)]), file=sys.stderr)
