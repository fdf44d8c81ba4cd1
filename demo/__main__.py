"""``make demo``. Status 0 only if every step happened; nothing stays behind but the caches in ``.cache/``."""

from __future__ import annotations

import os
import sys

from demo.performance import perform
from demo.story import tell


def main() -> int:
    """Tell the story with the image of ``IMAGE`` and the pattern of ``GREETING``, if given."""
    image, greeting = os.environ.get("IMAGE"), os.environ.get("GREETING")
    return perform("make demo", lambda narrator, directory: tell(narrator, directory, image, greeting))


if __name__ == "__main__":
    sys.exit(main())
