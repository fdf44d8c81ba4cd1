"""The content store: finding among 100,000 images, and importing 1 GiB beside what sha512sum needs for the same file."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import ROUNDS, Figure, Report, Row
from image_service.imagestore.infos import AciInfo
from image_service.imagestore.store import ImageStore

INFOS = 100_000
NAMES = 100
LOOKS = 200
IMAGE_BYTES = 1 << 30
FIND_LIMIT_US = 5000.0


def run(report: Report, workdir: Path) -> None:
    _find(report, workdir / "find")
    _import(report, workdir)


# -- finding ---------------------------------------------------------------------------------------------------------------


def _fill(store: ImageStore) -> None:
    """Half of the images have one name, the others share the rest; labels are few or many of a kind."""
    with store.index.change() as cursor:
        for number in range(INFOS):
            name = "example.com/busy" if number % 2 else f"example.com/app-{number % NAMES}"
            labels = {"version": f"1.{number}", "os": "linux", "arch": "amd64" if number % 3 else "s390x"}
            info = AciInfo(_key(number), name, number, number, latest=number % 1000 == 7, size_bytes=1)
            store.infos._replace(cursor, info, labels)


def _key(number: int) -> str:
    return f"sha512-{random.Random(number).getrandbits(256):064x}"


def _find(report: Report, directory: Path) -> None:
    with ImageStore(directory) as store:
        _fill(store)
        looks: dict[str, Callable[[int], object]] = {
            "a whole key": lambda n: store.resolve_key(_key(n)),
            "a prefix of 12 digits": lambda n: store.resolve_key(_key(n)[:19]),
            "a name": lambda _: store.get_aci("example.com/busy", {}),
            "a name (of 50,000) and version": lambda n: store.get_aci("example.com/busy", {"version": f"1.{n | 1}"}),
            "a name (of 50,000), os and arch": lambda _: store.get_aci(
                "example.com/busy", {"os": "linux", "arch": "s390x"}
            ),
            "all labels": lambda n: store.get_aci(
                "example.com/busy",
                {"version": f"1.{n | 1}", "os": "linux", "arch": "amd64" if (n | 1) % 3 else "s390x"},
            ),
        }
        for what, look in looks.items():
            report.add(
                Row(f"find by {what} among {INFOS:,}", _time(look), Figure("limit", "µs", [FIND_LIMIT_US] * ROUNDS))
            )


def _time(look: Callable[[int], object]) -> Figure:
    """The median of each round."""
    figure = Figure("ours", "µs")
    for number in range(ROUNDS):
        chance, times = random.Random(number), []
        for _ in range(LOOKS):
            wanted = chance.randrange(INFOS)
            begin = time.perf_counter()
            look(wanted)
            times.append((time.perf_counter() - begin) * 1e6)
        figure.values.append(statistics.median(times))
    return figure


# -- importing -------------------------------------------------------------------------------------------------------------


def _make_image(path: Path) -> None:
    manifest = json.dumps({"acKind": "ImageManifest", "acVersion": "0.8.11", "name": "example.com/large"}).encode()
    piece = os.urandom(1 << 20)
    with tarfile.open(path, "w") as archive:
        for name, data in (("manifest", manifest), ("rootfs/data", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("rootfs/large")
        info.size = IMAGE_BYTES
        archive.addfile(info, _Repeated(piece, IMAGE_BYTES))  # type: ignore[arg-type]


class _Repeated:
    """One random piece again and again, each time a little different."""

    def __init__(self, piece: bytes, size: int) -> None:
        self._piece, self._left = piece, size

    def read(self, size: int) -> bytes:
        size = min(size, self._left, len(self._piece))
        self._left -= size
        return self._left.to_bytes(8, "big") + self._piece[8:size] if size >= 8 else self._piece[:size]


def _import(report: Report, workdir: Path) -> None:
    image = workdir / "large.aci"
    _make_image(image)
    program = shutil.which("sha512sum")
    assert program is not None
    megabytes = image.stat().st_size / 1e6
    ours, reference = Figure("import", "MB/s"), Figure("sha512sum", "MB/s")
    for number in range(ROUNDS + 1):  # the first turn of both only warms the cache
        with ImageStore(workdir / f"store{number}") as store:
            begin = time.perf_counter()
            told = subprocess.run([program, image], capture_output=True, check=True, timeout=600).stdout[:64]
            middle = time.perf_counter()
            with image.open("rb", buffering=0) as source:
                key = store.write_aci(source)
            end = time.perf_counter()
        assert key == f"sha512-{told.decode()}"
        shutil.rmtree(workdir / f"store{number}")
        if number:
            reference.values.append(megabytes / (middle - begin))
            ours.values.append(megabytes / (end - middle))
    report.add(Row("import of a 1 GiB ACI, durable", ours, reference))
    report.note("The image is a plain archive in the page cache; the import writes it, syncs it and records it.")
