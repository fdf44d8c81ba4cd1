"""Fixtures of the acceptance tests. The agent's storage driver is a parameter: the same tests run on a real pool.

``MISTIFY_TEST_DRIVER`` names the driver (default ``file``), ``MISTIFY_TEST_POOL`` the pool.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.acceptance.daemons import Agent, start_agent
from tests.fakes.image_server import FakeImageServer


@pytest.fixture(scope="session")
def driver() -> str:
    """The storage driver under test."""
    return os.environ.get("MISTIFY_TEST_DRIVER", "file")


@pytest.fixture(scope="session")
def pool() -> str:
    """The pool under test."""
    return os.environ.get("MISTIFY_TEST_POOL", "mistify")


@pytest.fixture(scope="module")
def image_server() -> Iterator[FakeImageServer]:
    """An image server that tests tell how to behave."""
    with FakeImageServer() as server:
        yield server


@pytest.fixture(scope="module")
def agent(
    tmp_path_factory: pytest.TempPathFactory, image_server: FakeImageServer, driver: str, pool: str
) -> Iterator[Agent]:
    """One agent for all tests of a module: they keep apart by the names they use."""
    state_dir = tmp_path_factory.mktemp("agent") / "state"
    with start_agent(state_dir, image_service=image_server.address, driver=driver, zpool=pool) as agent:
        yield agent
