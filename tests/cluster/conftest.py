"""Servers are started once for all tests here; each test has an installation of its own on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.world import Site, Stores, shared_stores
from tests.fakes.source_server import SourceServer, start_source_server


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    with shared_stores(tmp_path_factory.mktemp("stores")) as stores:
        yield stores


@pytest.fixture
def site(stores: Stores, tmp_path: Path) -> Iterator[Site]:
    stores.etcd.heal()
    site = Site(stores, tmp_path)
    with site.exits:
        yield site


@pytest.fixture
def sources() -> Iterator[SourceServer]:
    with start_source_server() as server:
        yield server
