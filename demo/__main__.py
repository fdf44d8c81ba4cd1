"""``make demo``. Status 0 only if every step happened; nothing stays behind but the caches in ``.cache/``."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from demo.errors import DemoError
from demo.narrator import Narrator
from demo.story import tell
from imaging.errors import MistifyError

INTERRUPTED = 130
LOG_LINES = 30


def main() -> int:
    """Tell the story with the image of ``IMAGE`` and the pattern of ``GREETING``, if given."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    narrator = Narrator()
    try:
        with tempfile.TemporaryDirectory(prefix="mistify-demo-") as directory:
            try:
                tell(narrator, Path(directory), os.environ.get("IMAGE"), os.environ.get("GREETING"))
            except (DemoError, MistifyError) as err:
                _explain(f"step {narrator.steps} failed: {err}", Path(directory))
                return 1
    except KeyboardInterrupt:
        print("\nmake demo: interrupted; everything is cleaned up", file=sys.stderr)
        return INTERRUPTED
    narrator.end()
    return 0


def _explain(what: str, directory: Path) -> None:
    """Say what failed, and what the daemons logged before their logs are removed."""
    print(f"\nmake demo: {what}", file=sys.stderr)
    for log in sorted(directory.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        if lines:
            print("\n".join([f"  {log.name} ends:", *(f"    {line}" for line in lines)]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
