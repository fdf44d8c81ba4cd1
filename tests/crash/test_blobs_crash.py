"""The local blob store under SIGKILL: what was committed is there and intact, what was checkpointed is resumed, nothing is left over."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

from imaging.blobs.local import LocalBlobStore
from imaging.digests import Digest

KILLS = 15
EVENTS_MAX = 40

# Ingests number by number (resuming the one a kill interrupted), tells every checkpoint and commit after it returned.
WRITER = """
import os, random, sys
from imaging.blobs.local import LocalBlobStore
from imaging.digests import Digest

def content(number):
    chance = random.Random(number)
    return chance.randbytes(chance.choice([0, 1, 70_000, 400_000, 1_500_000]))

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

store = LocalBlobStore(sys.argv[1], reserve_free_bytes=0)
number = int(sys.argv[2])
while True:
    data = content(number)
    store.lease(f"lease {number}", ttl_s=3600)
    with store.ingest(f"ref {number}", lease=f"lease {number}") as writer:
        tell("resumed", number, writer.offset_bytes)
        for start in range(writer.offset_bytes, len(data), 50_000):
            writer.write(data[start:start + 50_000])
            if start // 50_000 % 4 == 1:
                tell("durable", number, writer.checkpoint())
        writer.commit(digest=Digest.of(data), size_bytes=len(data))
    tell("committed", number, len(data))
    store.release(f"lease {number}")
    number += 1
"""


def _content(number: int) -> bytes:
    chance = random.Random(number)
    return chance.randbytes(chance.choice([0, 1, 70_000, 400_000, 1_500_000]))


def _write_until_killed(root: Path, number: int, events: int) -> list[tuple[str, int, int]]:
    command = [sys.executable, "-c", WRITER, str(root), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(events)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        assert writer.wait(timeout=60) == -signal.SIGKILL
    words = [line.split() for line in lines if line.endswith(b"\n")]
    return [(event.decode(), int(number), int(size)) for event, number, size in words]


def _check(root: Path, committed: set[int], durable: dict[int, int], context: str) -> int:
    """Open the store and compare it with what was told; the number to go on with."""
    with LocalBlobStore(root, reserve_free_bytes=0) as store:
        digests = {Digest.of(_content(number)) for number in committed}
        stored = {info.digest for info in store.list()}
        following = max(committed, default=0) + 1
        assert digests <= stored <= digests | {Digest.of(_content(following))}, context
        for digest in stored:
            store.verify(digest)
        for info in store.ingests():
            assert info.ref == f"ref {following}", context
            with store.ingest(info.ref) as writer:
                assert durable.get(following, 0) <= writer.offset_bytes == info.offset_bytes, context
        sizes = [info.size_bytes for info in store.list()] + [info.offset_bytes for info in store.ingests()]
        assert store.used_bytes == sum(sizes), context
    leftovers = [path for path in root.rglob("*") if path.name.startswith(".tmp-")]
    assert leftovers == [], context
    return following


def test_kill_at_random_instants_blobs_are_whole_and_ingests_resume(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    root, number = tmp_path / "store", 1
    committed: set[int] = set()
    durable: dict[int, int] = {}
    for kill in range(KILLS):
        context = f"seed {seed}, kill {kill}"
        for event, about, size in _write_until_killed(root, number, chance.randint(1, EVENTS_MAX)):
            if event == "resumed":
                assert durable.get(about, 0) <= size, context
            elif event == "durable":
                durable[about] = size
            else:
                committed.add(about)
        number = _check(root, committed, durable, context)
    assert len(committed) > KILLS
