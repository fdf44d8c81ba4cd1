"""``make demo`` as a process: it tells the whole story, refuses clearly, and leaves nothing behind however it ends."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from demo import guest
from tests.waiting import wait_until

pytestmark = [pytest.mark.backend("qemu"), pytest.mark.backend("apt"), pytest.mark.slow]
DEMO_TIMEOUT_S = 280
STEPS = (
    "Start both daemons",
    "Upload the image",
    "The agent pulls it",
    "Verify the guest's disks",
    "Create the guest's disks",
    "Snapshot the disk",
    "Damage the disk",
    "Roll back",
    "Download the snapshot as a stream",
    "Make a disk from the stream and compare",
    "Boot the guest",
    "Delete everything",
    "Stop both daemons",
)


def _start(checkout: Path, temporary: Path, **settings: str) -> subprocess.Popen[str]:
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", **settings}
    command = [sys.executable, "-m", "demo"]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=DEMO_TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, out, err


def _ports(out: str) -> list[int]:
    return [int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", out)]


def _assert_nothing_left(temporary: Path, out: str) -> None:
    assert list(temporary.iterdir()) == []
    for port in _ports(out):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still answers"


def test_demo_tells_the_whole_story_and_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    status, out, err = _finish(_start(checkout, tmp_path / "t"))
    assert status == 0, out + err
    titles = re.findall(r"^ +\d+\.  (.*)$", out, re.MULTILINE)
    assert titles == ["Make a bootable disk", *STEPS[:5], "Write a random word onto the disk", *STEPS[5:]]
    word = re.search(r"'(word-[0-9a-f]{12})' in sector", out)
    assert word is not None
    assert f"{guest.GREETING} [{word.group(1)}]" in out
    assert len(_ports(out)) == 2
    _assert_nothing_left(tmp_path / "t", out)


def test_demo_given_image_compressed_is_shown_instead(checkout: Path, tmp_path: Path) -> None:
    image = tmp_path / "mine.raw.gz"
    with guest.ensure_image(checkout / ".cache").open("rb") as raw, gzip.open(image, "wb", compresslevel=1) as packed:
        shutil.copyfileobj(raw, packed)
    status, out, err = _finish(
        _start(checkout, tmp_path / "t", IMAGE=str(image), GREETING="an image nobody has written to")
    )
    assert status == 0, out + err
    assert re.findall(r"^ +\d+\.  (.*)$", out, re.MULTILINE) == ["Take the image you gave", *STEPS]
    _assert_nothing_left(tmp_path / "t", out)


def test_demo_given_image_that_is_not_there_is_refused_in_one_line(checkout: Path, tmp_path: Path) -> None:
    status, _, err = _finish(_start(checkout, tmp_path / "t", IMAGE="/nowhere/x.raw"))
    assert status == 1
    assert err.strip() == "make demo: step 1 failed: IMAGE=/nowhere/x.raw: no such file"
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_demo_interrupted_cleans_up(checkout: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = _start(checkout, tmp_path / "t")
    assert process.stdout is not None
    seen = ""
    while "Upload the image" not in seen:
        line = process.stdout.readline()
        assert line, f"the demo ended early: {seen}"
        seen += line
    process.send_signal(number)
    status, out, err = _finish(process)
    assert status == 130, seen + out + err
    assert len(_ports(seen)) == 2
    wait_until(lambda: process.poll() is not None, "the demo to be gone")
    _assert_nothing_left(tmp_path / "t", seen)
