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


def main() -> int:
    """Tell the story with the image of ``IMAGE`` and the pattern of ``GREETING``, if given."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    narrator = Narrator()
    try:
        with tempfile.TemporaryDirectory(prefix="mistify-demo-") as directory:
            tell(narrator, Path(directory), os.environ.get("IMAGE"), os.environ.get("GREETING"))
    except (DemoError, MistifyError) as err:
        print(f"\nmake demo: step {narrator.steps} failed: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake demo: interrupted; everything is cleaned up", file=sys.stderr)
        return INTERRUPTED
    narrator.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
