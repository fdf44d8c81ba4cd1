"""The mirror as a program: killed in the middle of a file or at any step, and run by its own clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.simplestreams.trees import check_whole, content, product, put, served, write_tree
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT_S = 120
PART_BYTES = 1 << 20
KILLS = 3
LATER = "Thu, 02 May 2024 00:00:00 +0000"
COMMAND = [sys.executable, "-c", "from image_service.cli import main; main()", "catalog"]


def _environment(directory: Path) -> dict[str, str]:
    return os.environ | {"MISTIFY_CATALOGS_DIR": str(directory)}


def _run(directory: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=_environment(directory),
        check=True,
        timeout=RUN_TIMEOUT_S,
        capture_output=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout)


@contextmanager
def _running(directory: Path, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*COMMAND, *arguments], env=_environment(directory), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(RUN_TIMEOUT_S)


def test_mirror_killed_in_the_middle_of_a_file_goes_on_with_the_byte_it_had_reached(tmp_path: Path) -> None:
    base, target, catalogs = tmp_path / "source", tmp_path / "mirror", tmp_path / "catalogs"
    products = {"p": product(base, "jammy", "amd64", ["20240101"])}
    [items] = [version["items"] for version in products["p"]["versions"].values()]
    path = items["disk1.img"]["path"]
    size = (KILLS + 1) * PART_BYTES + 12345
    items["disk1.img"] |= put(base, path, content(path, size))
    write_tree(base, products)
    part = target / f"{path}.part"
    with served(base) as server:
        _run(catalogs, "add", "site", server.url, "--json")
        server.hold_after[path] = PART_BYTES
        reached = [0]
        for _ in range(KILLS):
            with _running(catalogs, "mirror", "site", str(target), log=tmp_path / "log") as process:
                wait_until(
                    lambda: part.exists() and part.stat().st_size > reached[-1], "more of the file", timeout_s=120
                )
                process.send_signal(signal.SIGKILL)
                process.wait(RUN_TIMEOUT_S)
            reached.append(part.stat().st_size)
            assert not (target / "streams").exists(), "nothing is promised yet"
        del server.hold_after[path]
        report = _run(catalogs, "mirror", "site", str(target), "--json")
        asked = [wanted for name, wanted in server.requests if name == path]
    assert asked == ["", *(f"bytes={offset}-" for offset in reached[1:])]
    assert (report["failed"], report["received_bytes"]) == ([], size - reached[-1])
    check_whole(target)


_KILLED = """
import os, sys
from pathlib import Path
from image_service.catalog_mirror import Mirror, MirrorOptions
from imaging.simplestreams.sources import FileSource
from imaging.simplestreams.transfer import items_of
from imaging.simplestreams.tree import TreeReader
source, left = FileSource(Path(sys.argv[1])), [int(sys.argv[3])]
def step(word):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
Mirror(TreeReader(source), items_of(source), Path(sys.argv[2]), MirrorOptions(keep_s=0), step=step).run()
"""


def _mirror_until(base: Path, target: Path, steps: int) -> int:
    command = [sys.executable, "-c", _KILLED, str(base), str(target), str(steps)]
    return subprocess.run(command, check=False, timeout=RUN_TIMEOUT_S, cwd=ROOT).returncode


@pytest.mark.slow
def test_mirror_killed_at_any_step_keeps_every_promise_and_the_next_run_ends_it(tmp_path: Path) -> None:
    base, old = tmp_path / "source", tmp_path / "old"
    write_tree(base, {"p": product(base, "jammy", "amd64", ["20240101", "20240201"])})
    assert _mirror_until(base, old, 1000) == 0
    write_tree(base, {"p": product(base, "jammy", "amd64", ["20240201", "20240301"])}, updated=LATER)
    seen = []
    for steps in range(100):
        target = tmp_path / f"at-{steps}"
        shutil.copytree(old, target, symlinks=True)
        status = _mirror_until(base, target, steps)
        assert status in {0, 9}
        seen.append(sorted(check_whole(target)["p"]["versions"]))
        assert _mirror_until(base, target, 1000) == 0
        assert sorted(check_whole(target)["p"]["versions"]) == ["20240201", "20240301"]
        left = sorted(path.parent.name for path in target.rglob("*.img*"))
        assert left == ["20240201", "20240301"], f"after {steps} steps: what left is removed, and nothing else"
        if status == 0:
            break
    switch = seen.index(["20240201", "20240301"])
    assert 0 < switch < len(seen) - 1
    assert seen[:switch] == [["20240101", "20240201"]] * switch
    assert seen[switch:] == [["20240201", "20240301"]] * (len(seen) - switch)


def test_mirror_on_a_timer_follows_its_source_and_survives_its_failures(tmp_path: Path) -> None:
    base, target, catalogs, log = (tmp_path / name for name in ("source", "mirror", "catalogs", "log"))
    write_tree(base, {"p": product(base, "jammy", "amd64", ["20240101"])})

    def has(*versions: str) -> bool:
        return (target / "streams").exists() and set(check_whole(target)["p"]["versions"]) == set(versions)

    with served(base) as server:
        _run(catalogs, "add", "site", server.url, "--json")
        with _running(catalogs, "mirror", "site", str(target), "--every", "1s", log=log) as process:
            wait_until(lambda: has("20240101"), "the first run", timeout_s=120)
            server.refuse["streams/v1/index.json"] = 404
            wait_until(lambda: "failed: " in log.read_text(), "a run that fails", timeout_s=120)
            write_tree(base, {"p": product(base, "jammy", "amd64", ["20240101", "20240201"])}, updated=LATER)
            server.refuse.clear()
            wait_until(lambda: has("20240101", "20240201"), "a run that brings what is new", timeout_s=120)
            assert process.poll() is None, "it goes on"
