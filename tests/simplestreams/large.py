"""A large catalogue: 2,000 products with 10 items each, and the memory it takes to mirror it.

``python -m tests.simplestreams.large SOURCE TARGET`` mirrors and prints its report with the peak of resident memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from image_service.catalog_mirror import Mirror
from imaging.simplestreams.sources import FileSource
from imaging.simplestreams.transfer import items_of
from imaging.simplestreams.tree import TreeReader
from tests.simplestreams.trees import write_tree

PRODUCTS = 2_000
VERSIONS = 5
ITEM_BYTES = 64


def write_large_tree(base: Path, products: int = PRODUCTS) -> Path:
    """Two items in each of five versions of every product."""
    made: dict[str, Any] = {}
    for number in range(products):
        directory = base / "images" / f"{number:04}"
        directory.mkdir(parents=True)
        versions: dict[str, Any] = {}
        for day in range(1, VERSIONS + 1):
            items = {}
            for ftype in ("disk1.img", "manifest"):
                path = f"images/{number:04}/{day}.{ftype}"
                data = hashlib.sha512(path.encode()).digest()
                (base / path).write_bytes(data)
                items[ftype] = {
                    "ftype": ftype,
                    "path": path,
                    "size": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            versions[f"2024010{day}"] = {"items": items}
        made[f"os:release-{number:04}:amd64"] = {
            "os": "os",
            "arch": "amd64",
            "aliases": f"a{number}",
            "versions": versions,
        }
    return write_tree(base, made)


def main() -> None:
    source = FileSource(Path(sys.argv[1]))
    report = Mirror(TreeReader(source), items_of(source), Path(sys.argv[2])).run()
    # Not ru_maxrss: a process inherits that of the one it was forked from.
    peak_mib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    sys.stdout.write(json.dumps(msgspec.to_builtins(report) | {"peak_mib": peak_mib}) + "\n")


if __name__ == "__main__":
    main()
