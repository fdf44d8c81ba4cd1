"""Dead links in the documentation: ``python -m tests.links`` prints each and exits 1 if there are any.

Relative links must lead to a file of the source tree, and an anchor to a heading of that file (spelt the way GitHub makes anchors). Links
to the world are not followed: a check must not fail because somebody else's server is down.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[[^\]\n]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def pages(root: Path) -> list[Path]:
    """Every documentation page of the tree."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def dead_links(page: Path) -> Iterator[str]:
    """Yield a sentence for each link of ``page`` that leads nowhere."""
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text()))):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not file.exists():
            yield f"{page}: no such file: {target}"
        elif parts.fragment and file.suffix == ".md" and parts.fragment not in anchors(file):
            yield f"{page}: no such heading: {target}"


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings; a repeated heading gets ``-1``, ``-2``, ..."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text())):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (unique := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(unique)
    return frozenset(found)


def main() -> int:
    """Print the dead links below the current directory."""
    checked = pages(Path())
    dead = [line for page in checked for line in dead_links(page)]
    sys.stdout.write("\n".join(dead or [f"{len(checked)} pages, no dead links"]) + "\n")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
