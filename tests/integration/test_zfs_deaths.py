"""kill -9 of the agent while it receives, clones and destroys on a real pool.

Each death comes at a random instant of one operation, the operations in turn. Afterwards ZFS itself may show only whole things and hidden
ones; the next life must remove the hidden ones, and the same request again must lead to what was asked for, with the right bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import requests

from imaging.names import PoolName
from tests.acceptance.daemons import Agent, new_agent
from tests.codec import samples
from tests.fakes.agent_world import MIB, disk
from tests.fakes.image_server import FakeImageServer
from tests.integration.zfs_pool import made_pool, sparse_file, there
from tests.waiting import PATIENCE

pytestmark = pytest.mark.backend("zfs")

DEATHS = int(os.environ.get("MISTIFY_DEATHS", "50"))
ALL_TIMEOUT_S = 120 + 90 * DEATHS
"""Under emulation on a busy machine each life takes several seconds."""
POOL_BYTES = 2 << 30
STREAM = "plain-full-s1"
DIGEST_OF_STREAM = samples.manifest()[STREAM]["result"]["sha256"]
FIRST_GUESS_S = 0.1 * PATIENCE
"""How long an operation takes, before the first one was measured."""
SEEN = re.compile(r"[^/]+(/images|/guests)?\Z|[^/]+/(images|clones)/[a-z0-9]+(@[\w.:-]+)?\Z|[^/]+/clones\Z")
"""What anybody may ever see of this pool."""
HIDDEN = re.compile(r"[^/]+/images/\.(incoming|deleted|mistify)-")


class Story:
    """The pool, the agent that dies again and again, and what was seen; printed with every failure."""

    def __init__(self, agent: Agent, server: FakeImageServer, pool: PoolName) -> None:
        self.agent = agent
        self.server = server
        self.pool = pool
        self.chance = random.Random(seed := secrets.randbits(32))
        self.lines = [f"seed {seed}"]
        self.took_s: dict[str, float] = {}
        self.digests: dict[str, str] = {}
        self.hidden: set[str] = set()

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def serve(self, image_id: str, number: int) -> None:
        """A raw disk, a packed one, or a stream that ``zfs send`` made: the ways an image can come in."""
        body, is_stream = disk(number, MIB), number % 3 == 2
        sent = samples.load(STREAM) if is_stream else gzip.compress(body, 1) if number % 3 else body
        self.digests[image_id] = DIGEST_OF_STREAM if is_stream else hashlib.sha256(body).hexdigest()
        self.server.serve(image_id, sent, piece_bytes=len(sent) // 8 + 1, pause_s=0.002 * PATIENCE)

    def die_during(self, what: str, call: Callable[[], object]) -> None:
        """Kill the agent at a random instant after the call went out, at the latest a little after its answer."""
        sent = threading.Event()

        def ask() -> None:
            sent.set()
            started_s = time.monotonic()
            try:
                call()
            except requests.RequestException:
                return  # the agent died
            self.took_s[what] = time.monotonic() - started_s

        caller = threading.Thread(target=ask)
        caller.start()
        sent.wait()
        delay_s = self.chance.random() * 1.2 * self.took_s.get(what, FIRST_GUESS_S)
        caller.join(delay_s)
        self.lines.append(
            f"{what}: killed {delay_s:.3f} s after it began, {'in' if caller.is_alive() else 'after'} the call"
        )
        self.agent.kill()
        caller.join()
        self.check_dead()

    def check_dead(self) -> None:
        """What ZFS shows of a pool nobody serves: whole things, and hidden ones the next life knows what to do with."""
        self.hidden = {name for name in there(self.pool) if not SEEN.match(name)}
        assert all(HIDDEN.match(name) for name in self.hidden), f"{self.hidden}; {self}"

    def live_again(self) -> None:
        """Start the agent. What the driver had hidden is gone when it serves; what the store had is on its way."""
        self.agent.start()
        left = [name for name in self.hidden & set(there(self.pool)) if "/.mistify-" in name]
        assert left == [], f"{left}; {self}"


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    with (
        made_pool(f"deaths{os.getpid()}", sparse_file(tmp_path / "disk", POOL_BYTES)) as pool,
        FakeImageServer() as server,
    ):
        agent = new_agent(tmp_path / "state", image_service=server.address, driver="zfs", zpool=pool)
        agent.start()
        try:
            yield Story(agent, server, pool)
        finally:
            agent.stop()


def check_clone(story: Story, image_id: str, leaf: str) -> None:
    """A clone of the image is there, or is made, and has the image's bytes."""
    volume = story.agent.call("CloneImage", id=image_id, dest=f"{story.pool}/clones/{leaf}")["volumes"][0]
    found = hashlib.sha256(Path(volume["device"]).read_bytes()).hexdigest()
    assert found == story.digests[image_id], f"{image_id}; {story}"


def delete(agent: Agent, method: str, name: str) -> None:
    """Ask for a deletion; what is gone already is fine."""
    error = agent.raw_call(method, {"id": name})["error"]
    assert error in {None, "not found"}


def die_in_deletion(story: Story, method: str, name: str) -> None:
    story.die_during(method, partial(delete, story.agent, method, name))
    story.live_again()
    delete(story.agent, method, name)


def die_in_receive(story: Story, image_id: str) -> None:
    story.die_during("RequestImage", partial(story.agent.call, "RequestImage", id=image_id))
    story.live_again()
    story.agent.call("RequestImage", id=image_id)
    check_clone(story, image_id, "look")
    delete(story.agent, "DeleteDataset", "clones/look")


def die_in_clone(story: Story, leaf: str) -> None:
    dest = f"{story.pool}/clones/{leaf}"
    story.die_during("CloneImage", partial(story.agent.call, "CloneImage", id="base", dest=dest))
    story.live_again()
    check_clone(story, "base", leaf)


@pytest.mark.timeout(ALL_TIMEOUT_S)
def test_agent_killed_at_any_instant_leaves_nothing_half_done(story: Story) -> None:
    story.serve("base", 0)
    story.agent.call("RequestImage", id="base")
    for death in range(DEATHS):
        number = death // 4
        if death % 4 == 0:
            story.serve(f"img{number}", number + 1)
            die_in_receive(story, f"img{number}")
        elif death % 4 == 1:
            die_in_clone(story, f"clone{number}")
        elif death % 4 == 2:
            die_in_deletion(story, "DeleteDataset", f"clones/clone{number}")
        else:
            die_in_deletion(story, "DeleteImage", f"img{number}")
    for image in story.agent.call("ListImages")["images"]:
        story.agent.call("DeleteImage", id=image["id"])
    delete(story.agent, "DeleteDataset", "clones")
    assert there(story.pool) == [f"{story.pool}{rest}" for rest in ("", "/guests", "/images")], story
