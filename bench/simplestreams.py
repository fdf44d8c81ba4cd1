"""Catalogues: looking up one image in a large products file, and mirroring 20,000 items, beside the least anybody could do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.harness import Report, compare, stopwatch
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.model import ImageMetadata
from imaging.simplestreams.reader import get_latest_image_id_metadata
from imaging.simplestreams.signing import Signer, Verifier
from tests.simplestreams.catalogues import item, key, product, products
from tests.simplestreams.large import write_large_tree

DOCUMENT_BYTES = 20_000_000
WANTED = ImageConstraint("us-east-1", "", ["98.04"], ["amd64"])


def run(report: Report, workdir: Path) -> None:
    """Measure with a document of 20 MB and a tree of 2,000 products."""
    data = _document()
    report.note(f"The document has {len(data) / 1e6:.1f} MB and {data.count(b'root_store'):,} items.")
    report.add(
        compare(
            "one image of a 20 MB products file",
            "ms",
            lambda: _lookup_ms(data),
            ("json.loads", lambda: _parse_ms(data)),
        )
    )
    _signed(report, data)
    _mirrored(report, workdir)


def _document() -> bytes:
    made: dict[str, Any] = {}
    size = 0
    while size < DOCUMENT_BYTES:
        number = len(made)
        items = {f"i{n}": item(f"ami-{number:05}{n:03}", f"region-{n}") for n in range(40)}
        versions = {f"v202401{day:02}": items for day in range(1, 6)}
        made[f"com.ubuntu.cloud:server:{number}:amd64"] = product(str(number), "amd64", **versions)
        size += len(json.dumps(made[f"com.ubuntu.cloud:server:{number}:amd64"], indent=1))
    made["com.ubuntu.cloud:server:98.04:amd64"] = product("98.04", "amd64", v20240101={"i": item("wanted")})
    return json.dumps(products(made), indent=1).encode()


def _lookup_ms(data: bytes) -> float:
    with stopwatch() as elapsed:
        found: list[ImageMetadata] = get_latest_image_id_metadata(data, WANTED)
    assert [image.id for image in found] == ["wanted"]
    return elapsed() * 1e3


def _parse_ms(data: bytes) -> float:
    with stopwatch() as elapsed:
        json.loads(data)
    return elapsed() * 1e3


def _signed(report: Report, data: bytes) -> None:
    """The whole way of a signed document, beside gpgv alone."""
    pair = key("bench")
    with Signer(pair.private) as signer:
        document = signer.clearsign(data)
    verifier = Verifier(pair.public)

    def ours() -> float:
        with stopwatch() as elapsed:
            get_latest_image_id_metadata(verifier.verify_clearsigned(document).text, WANTED)
        return elapsed() * 1e3

    def reference() -> float:
        with stopwatch() as elapsed:
            verifier.verify_clearsigned(document)
        return elapsed() * 1e3

    report.add(compare("the same, clearsigned: verify and look up", "ms", ours, ("gpgv alone", reference)))


def _mirrored(report: Report, workdir: Path) -> None:
    source = write_large_tree(workdir / "source")
    peaks: list[float] = []

    def ours() -> float:
        target = workdir / "mirror"
        with stopwatch() as elapsed:
            command = [sys.executable, "-m", "tests.simplestreams.large", str(source), str(target)]
            done = subprocess.run(command, capture_output=True, check=True)
        peaks.append(json.loads(done.stdout)["peak_mib"])
        shutil.rmtree(target)
        return elapsed()

    def reference() -> float:
        target = workdir / "copy"
        with stopwatch() as elapsed:
            subprocess.run(["rsync", "-a", "--fsync", f"{source}/", str(target)], check=True)
        shutil.rmtree(target)
        return elapsed()

    title = "mirror 2,000 products, 20,000 items, each verified and durable"
    if shutil.which("rsync") is None:
        raise SystemExit("the reference is rsync: apt-get install rsync")
    report.add(compare(title, "s", ours, ("rsync -a --fsync", reference), rounds=1))
    report.note(f"The mirror's resident memory peaked at {max(peaks):.0f} MiB.")
