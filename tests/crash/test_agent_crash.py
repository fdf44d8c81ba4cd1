"""kill -9 of the agent at random instants while ten images are pulled.

What is promised, and checked here:

* after the last restart every image completes by itself (nobody asks again), and its snapshot has the right content;
* nothing else stays: no incoming dataset, no tombstone, no half-made volume, nothing of what was kept of downloads;
* each image is downloaded to its end once, counted at the server: a byte that had reached the agent's disk is never asked for again.
  Every request of a later life starts exactly where the file of the dead one ends (or at 0, where the server gives no ETag to ask
  for the rest with), and once all bytes of an image were there no request for it comes at all, whether it was verified by then or not.

A process that is killed after it took the last bytes from the socket and before it wrote them to its file has lost these: to the
server that looks like a complete download. That window is microseconds, the loss at most one piece; it is counted and bounded.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import secrets
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent_image.app import SPOOL_NAME
from agent_image.drivers.file import FileDriver
from agent_image.fetch_pipe import PIECE_BYTES
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

LOST_TAILS_MAX = 5
"""Of some hundred downloads; see above. Typically none."""

_PIECES = 16
_PAUSE = threading.Event()


@dataclass
class Pull:
    """One image: what was asked for, and what is known of its downloads so far."""

    digest: str
    """Of the content."""
    sent_bytes: int
    with_etag: bool
    kept_bytes: int = 0
    """Found on the agent's disk after the last kill."""
    is_safe: bool = False
    """Found marked or published after a kill."""
    lost_tails: int = 0
    """Downloads that ended for the server, but whose last piece died with the agent."""
    answers: int = 0
    """How many of the server's answers are accounted for."""

    @property
    def next_start(self) -> int | None:
        """Where the next life has to begin to download; None if it must not."""
        if self.is_safe or self.kept_bytes == self.sent_bytes:
            return None
        return self.kept_bytes if self.with_etag else 0


@dataclass
class Story:
    """What was asked for and what was seen over all lives; printed with every failure."""

    seed: int
    pulls: dict[str, Pull] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing left to fetch."""
        return all(pull.is_safe for pull in self.pulls.values())

    def count(self, is_meant: Callable[[Pull], bool]) -> int:
        """How many images are so."""
        return sum(map(is_meant, self.pulls.values()))

    def __str__(self) -> str:
        return f"seed {self.seed}\n" + "\n".join(self.lines)


def ask_for_more(agent: Agent, server: FakeImageServer, story: Story) -> None:
    """Ten new images, half of them compressed, two thirds with an ETag; nobody asks for them a second time."""
    first = len(story.pulls)
    for number in range(first, first + IMAGES_AT_ONCE):
        image_id = f"img{number}"
        body = disk(number, (1 + number % 3) * MIB)
        sent = body if number % 2 else gzip.compress(body, 1)
        pull = Pull(hashlib.sha256(body).hexdigest(), len(sent), with_etag=number % 3 != 0)
        pause_s = 0.01 + 0.004 * (number % 10)
        server.serve(image_id, sent, piece_bytes=len(sent) // _PIECES + 1, pause_s=pause_s, with_etag=pull.with_etag)
        story.pulls[image_id] = pull
        agent.call("RequestImage", id=image_id, type="kvm", wait=False)


def live_and_die(agent: Agent, server: FakeImageServer, story: Story, rng: random.Random) -> None:
    """One life: killed while it starts, or some time after it serves. New images if none are left to fetch."""
    while_starting = not story.is_quiet and rng.random() < 0.3
    life_s = rng.uniform(0, LIFE_MAX_S)
    agent.start(wait=not while_starting)
    if story.is_quiet:
        ask_for_more(agent, server, story)
    _PAUSE.wait(life_s)
    agent.kill()
    story.lines.append(f"life of {life_s:.3f} s{' from its start' if while_starting else ''}")


def kept_bytes(state_dir: Path, image_id: str) -> int:
    """How much of an image's body a dead agent left for the next one."""
    part = state_dir / SPOOL_NAME / f"{image_id}.part"
    return part.stat().st_size if part.with_suffix(".json").exists() and part.exists() else 0


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
    for image_id, pull in story.pulls.items():
        note_answers(server, image_id, pull, story, last_kept_bytes=kept_bytes(state_dir, image_id), safe=safe)
    whole = story.count(lambda pull: pull.next_start is None)
    tails = sum(pull.lost_tails for pull in story.pulls.values())
    story.lines[-1] += f": {whole} of {len(story.pulls)} downloaded, {tails} lost tails"


def note_answers(
    server: FakeImageServer, image_id: str, pull: Pull, story: Story, *, last_kept_bytes: int, safe: Collection[str]
) -> None:
    """Hold what the last life asked for against what the one before had left; then note what it left itself."""
    new = server.answered[server.path_of(image_id)][pull.answers :]
    assert [one.start for one in new] in ([], [pull.next_start]), f"{image_id}: {pull} was followed by {new}; {story}"
    pull.answers += len(new)
    pull.kept_bytes, pull.is_safe = last_kept_bytes, image_id in safe
    if new and new[0].completed and pull.next_start is not None:
        pull.lost_tails += 1
        lost = pull.sent_bytes - pull.kept_bytes
        assert lost <= PIECE_BYTES, f"{lost} bytes of {image_id} arrived and were not kept; {story}"


def check_counts(server: FakeImageServer, story: Story) -> None:
    """Once to the end each."""
    for image_id, pull in story.pulls.items():
        completed = sum(one.completed for one in server.answered[server.path_of(image_id)])
        assert completed == 1 + pull.lost_tails, f"{image_id} was downloaded {completed} times: {pull}; {story}"
    assert sum(pull.lost_tails for pull in story.pulls.values()) <= LOST_TAILS_MAX, story


def check_pool(state_dir: Path, story: Story) -> None:
    """Every image intact, and nothing else there."""
    driver = FileDriver(POOL, state_dir)
    driver.open()
    try:
        found = sorted(str(info.name) for info in driver.list(POOL.root))
        images = [f"mistify/images/{image_id}" for image_id in story.pulls]
        assert found == sorted(["mistify", "mistify/guests", "mistify/images", *images]), story
        for info in driver.list_snapshots(POOL.root):
            with driver.open_snapshot(info.name) as fd:
                content = os.pread(fd, info.volsize_bytes or 0, 0)
            image_id = info.name.dataset.leaf
            assert hashlib.sha256(content).hexdigest() == story.pulls[image_id].digest, (
                f"{image_id} is damaged; {story}"
            )
    finally:
        driver.close()
    assert list((state_dir / SPOOL_NAME).iterdir()) == [], story


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
                lambda: {one["id"] for one in agent.call("ListImages")["images"]} == set(story.pulls),
                f"all images to complete; {story}",
                timeout_s=120,
            )
            assert agent.call("ListImages", pending=True) == agent.call("ListImages")
        finally:
            agent.stop()
        note_death(server, state_dir, story)
        assert story.is_quiet, story
        check_counts(server, story)
    check_pool(state_dir, story)
