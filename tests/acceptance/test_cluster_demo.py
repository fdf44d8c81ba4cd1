"""``make cluster-demo`` as a process: the main job through the balancer, one process of each kind killed, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.backend("qemu", "apt", "etcd", "s3", "haproxy"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
TIMEOUT_S = 540
STEPS = [
    "Start etcd",
    "Start an S3 server",
    "Start two image services",
    "Start a load balancer",
    "Start the agent",
    "Upload the image",
    "The agent pulls it",
    "Verify the guest's disks",
    "Create the guest's disks",
    "Write a random word onto the disk",
    "Snapshot the disk",
    "Damage the disk",
    "Roll back",
    "Download the snapshot as a stream",
    "Make a disk from the stream and compare",
    "Boot the guest",
    "Delete everything",
    "Kill etcd's NODE during a job",
    "Kill service1 during a job",
    "Kill the S3 server's object server during a job",
    "Kill the load balancer during a job",
    "Stop everything",
]


def _start(checkout: Path, temporary: Path) -> subprocess.Popen[str]:
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "demo.cluster"]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, out, err


def _assert_nothing_left(temporary: Path, out: str) -> None:
    assert list(temporary.iterdir()) == []
    ports = {int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", out)}
    assert len(ports) >= 3, out
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} still answers"


def test_cluster_demo_goes_on_when_one_of_each_kind_is_killed_and_leaves_nothing(
    checkout: Path, tmp_path: Path
) -> None:
    status, out, err = _finish(_start(checkout, tmp_path / "t"))
    assert status == 0, out + err
    titles = [re.sub(r"node\d", "NODE", title) for title in re.findall(r"^ +\d+\.  (.*)$", out, re.MULTILINE)]
    assert titles == ["Make a bootable disk", *STEPS]
    assert len(re.findall(r"the same byte for byte, deleted", out)) == 4
    _assert_nothing_left(tmp_path / "t", out)


def test_cluster_demo_interrupted_cleans_up(checkout: Path, tmp_path: Path) -> None:
    process = _start(checkout, tmp_path / "t")
    assert process.stdout is not None
    seen = ""
    while "Upload the image" not in seen:
        line = process.stdout.readline()
        assert line, f"the demo ended early: {seen}"
        seen += line
    process.send_signal(signal.SIGINT)
    status, out, err = _finish(process)
    assert status == 130, seen + out + err
    _assert_nothing_left(tmp_path / "t", seen)
