"""Fixtures of the acceptance tests. The agent's storage driver is a parameter: the same tests run on a real pool.

``MISTIFY_TEST_DRIVER`` names the driver (default ``file``), ``MISTIFY_TEST_POOL`` the pool. A test that starts an agent of its own
takes ``own_pool`` or ``make_pool``, because one agent serves a pool.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.acceptance.daemons import Agent, Daemon, start_agent, start_image_service
from tests.fakes.image_server import FakeImageServer
from tests.fakes.source_server import SourceServer, start_source_server
from tests.integration.zfs_pool import made_pool, make_empty, run, sparse_file

OWN_POOL_BYTES = 4 << 30
"""Sparse."""
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another driver than ``file`` run what the driver takes part in: the rest was shown on that one."""
    if os.environ.get("MISTIFY_TEST_DRIVER", "file") == "file":
        return
    others = [item for item in items if HERE in item.path.parents and "driver" not in getattr(item, "fixturenames", ())]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


@pytest.fixture(scope="session")
def driver() -> str:
    """The storage driver under test."""
    return os.environ.get("MISTIFY_TEST_DRIVER", "file")


@pytest.fixture(scope="session")
def pool() -> str:
    """The pool under test."""
    return os.environ.get("MISTIFY_TEST_POOL", "mistify")


@pytest.fixture
def make_pool(driver: str, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Make an empty pool of that name, gone after the test. The file driver makes its own, one for each state directory."""
    with ExitStack() as made:

        def make(name: str) -> str:
            if driver == "zfs":
                made.enter_context(made_pool(name, sparse_file(tmp_path / f"{name}.disk", OWN_POOL_BYTES)))
            return name

        yield make


@pytest.fixture
def own_pool(make_pool: Callable[[str], str]) -> str:
    """An empty pool for the agent that a test starts."""
    return make_pool(f"own{os.getpid()}")


@pytest.fixture
def old_table_directory(driver: str, own_pool: str, tmp_path: Path) -> Path:
    """Where the program we replace kept its table: in the file system of images, which is mounted."""
    if driver == "file":
        return tmp_path / "state"
    mountpoint = Path("/", own_pool, "images")
    run("zfs", "create", "-o", f"mountpoint={mountpoint}", f"{own_pool}/images")
    return mountpoint


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
    if driver == "zfs":  # the next module finds a pool as new as its state directory
        make_empty(pool)


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's image service keeps its state."""
    return tmp_path_factory.mktemp("service") / "state"


@pytest.fixture(scope="module")
def service(state_dir: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """One image service for all tests of a module, started with the module's ``SERVICE_FLAGS``."""
    with start_image_service(state_dir, **getattr(request.module, "SERVICE_FLAGS", {})) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def sources() -> Iterator[SourceServer]:
    """A web server that images are fetched from."""
    with start_source_server() as server:
        yield server
