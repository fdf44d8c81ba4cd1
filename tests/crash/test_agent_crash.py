"""kill -9 of the agent at random instants while ten images are pulled.

What is promised, and checked here:

* after the last restart every image completes by itself (nobody asks again), and its snapshot has the right content;
* nothing else stays in the pool: no incoming dataset, no tombstone, no half-made volume;
* an image whose bytes had arrived and were verified (its incoming dataset carries the mark, or it is published) is never fetched again:
  no request for it reaches the server in any later life of the agent;
* so each image is downloaded to its end exactly once, counted at the server as "the client read the whole body and closed in
  order", except that a kill between the last byte and the mark (a few milliseconds of verification and fsync) costs one more download.
  Each such exception must belong to a life that was killed, and they are few.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent_image.drivers.file import FileDriver
from agent_image.store_images import PROPERTY_IMAGE
from imaging.names import PoolName
from tests.acceptance.daemons import Agent, new_agent
from tests.fakes.agent_world import MIB, disk
from tests.fakes.image_server import FakeImageServer
from tests.waiting import wait_until

KILLS = 50
IMAGES_AT_ONCE = 10
POOL = PoolName.parse("mistify")

LIFE_MAX_S = 1.0
"""Lives last up to this long after the agent serves: the slowest fetch takes about as long, the fastest a fifth of it."""

_PIECES = 16
_PAUSE = threading.Event()


@dataclass
class Story:
    """What was asked for and what was seen over all lives; printed with every failure."""

    seed: int
    digests: dict[str, str] = field(default_factory=dict)
    """Of the content, by image."""
    safe: dict[str, int] = field(default_factory=dict)
    """Images found marked or published after a kill, and how many requests the server had had for them by then."""
    repeats: Counter[str] = field(default_factory=Counter)
    """Complete downloads that a kill took away before the mark, by image."""
    completed: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    @property
    def unsafe(self) -> list[str]:
        """Images that are still to be fetched."""
        return [image_id for image_id in self.digests if image_id not in self.safe]

    def __str__(self) -> str:
        return f"seed {self.seed}\n" + "\n".join(self.lines)


def ask_for_more(agent: Agent, server: FakeImageServer, story: Story) -> None:
    """Ten new images, half of them compressed; nobody asks for them a second time."""
    first = len(story.digests)
    for number in range(first, first + IMAGES_AT_ONCE):
        image_id = f"img{number}"
        body = disk(number, (1 + number % 3) * MIB)
        sent = body if number % 2 else gzip.compress(body, 1)
        server.serve(image_id, sent, piece_bytes=len(sent) // _PIECES + 1, pause_s=0.01 + 0.004 * (number % 10))
        story.digests[image_id] = hashlib.sha256(body).hexdigest()
        agent.call("RequestImage", id=image_id, type="kvm", wait=False)


def live_and_die(agent: Agent, server: FakeImageServer, story: Story, rng: random.Random) -> None:
    """One life: killed while it starts, or some time after it serves. New images if none are left to fetch."""
    while_starting = bool(story.unsafe) and rng.random() < 0.3
    life_s = rng.uniform(0, LIFE_MAX_S)
    agent.start(wait=not while_starting)
    if not story.unsafe:
        ask_for_more(agent, server, story)
    _PAUSE.wait(life_s)
    agent.kill()
    story.lines.append(f"life of {life_s:.3f} s{' from its start' if while_starting else ''}")


def note_death(server: FakeImageServer, state_dir: Path, story: Story) -> None:
    """What a dead agent left, read with the driver itself, which also repairs what the kill left."""
    driver = FileDriver(POOL, state_dir)
    driver.open()
    try:
        infos = driver.list(POOL.root / "images")
        safe = {info.properties[PROPERTY_IMAGE] for info in infos if PROPERTY_IMAGE in info.properties}
    finally:
        driver.close()
    wait_until(lambda: server.idle, "the server to notice that its client died")
    for image_id in story.unsafe:
        path = server.path_of(image_id)
        new = server.completed[path] - story.completed[image_id]
        story.completed[image_id] = server.completed[path]
        assert new <= 1, f"{image_id} was downloaded {new} times in one life; {story}"
        if image_id in safe:
            story.safe[image_id] = server.requests[path]
        else:
            story.repeats[image_id] += new
    story.lines[-1] += f": {len(story.safe)} of {len(story.digests)} safe, {story.repeats.total()} repeats"


def check_counts(server: FakeImageServer, story: Story) -> None:
    """Once to the end each, and never again once safe."""
    for image_id in story.digests:
        path = server.path_of(image_id)
        expected = 1 + story.repeats[image_id]
        assert server.completed[path] == expected, f"{image_id} downloaded {server.completed[path]} times; {story}"
        if image_id in story.safe:
            assert server.requests[path] == story.safe[image_id], f"{image_id} was fetched again; {story}"
    assert story.repeats.total() <= KILLS // 2, f"too many downloads lost between the last byte and the mark; {story}"


def check_pool(state_dir: Path, story: Story) -> None:
    """Every image intact, and nothing else there."""
    driver = FileDriver(POOL, state_dir)
    driver.open()
    try:
        found = sorted(str(info.name) for info in driver.list(POOL.root))
        images = [f"mistify/images/{image_id}" for image_id in story.digests]
        assert found == sorted(["mistify", "mistify/guests", "mistify/images", *images]), story
        for info in driver.list_snapshots(POOL.root):
            with driver.open_snapshot(info.name) as fd:
                content = os.pread(fd, info.volsize_bytes or 0, 0)
            image_id = info.name.dataset.leaf
            assert hashlib.sha256(content).hexdigest() == story.digests[image_id], f"{image_id} is damaged; {story}"
    finally:
        driver.close()


@pytest.mark.slow
def test_agent_killed_at_random_instants_completes_every_image_once(tmp_path: Path) -> None:
    story = Story(secrets.randbits(32))
    rng = random.Random(story.seed)
    state_dir = tmp_path / "state"
    with FakeImageServer() as server:
        agent = new_agent(state_dir, image_service=server.address, fetchers=IMAGES_AT_ONCE)
        for _ in range(KILLS):
            live_and_die(agent, server, story, rng)
            note_death(server, state_dir, story)
        agent.start()
        try:
            wait_until(
                lambda: {one["id"] for one in agent.call("ListImages")["images"]} == set(story.digests),
                f"all images to complete; {story}",
                timeout_s=120,
            )
            assert agent.call("ListImages", pending=True) == agent.call("ListImages")
        finally:
            agent.stop()
        wait_until(lambda: server.idle, "the server to be done")
        check_counts(server, story)
    check_pool(state_dir, story)
