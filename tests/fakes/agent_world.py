"""The agent's parts without HTTP, on the file driver, beside a fake image server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent_image.app import AgentParts
from agent_image.config import AgentSettings
from agent_image.drivers.file import FileDriver
from agent_image.fetch_http import FetchLimits
from agent_image.metrics import AgentMetrics
from agent_image.store import ImageStore
from imaging.kv.sqlite import SqliteKeyValue
from imaging.names import DatasetName, PoolName, SnapshotName
from tests.fakes.image_server import FakeImageServer

MIB = 1 << 20

POOL = PoolName.parse("mistify")

LIMITS = FetchLimits(connect_s=10, stall_s=20, total_s=120, resume_delay_s=0.01)


class World:
    """One agent's parts, opened."""

    def __init__(self, state_dir: Path, server: FakeImageServer, **changes: Any) -> None:
        size_bytes = changes.pop("pool_bytes", 1 << 30)
        state_dir.mkdir(parents=True, exist_ok=True)
        settings = AgentSettings(
            pool=POOL,
            driver="file",
            state_dir=state_dir,
            image_service=server.address,
            fetchers=2,
            limits=LIMITS,
        )
        self.server = server
        self.settings = replace(settings, **changes)
        self.driver = FileDriver(POOL, state_dir, size_bytes=size_bytes)
        self.driver.open()
        self.table = SqliteKeyValue(state_dir / "agent.db")
        self.metrics = AgentMetrics()
        self.parts = AgentParts(self.settings, self.driver, self.table, self.metrics)
        self.parts.records.load()

    @property
    def store(self) -> ImageStore:
        """What the tests speak to."""
        return self.parts.store

    def datasets(self) -> list[str]:
        """Everything in the pool, hidden datasets too."""
        return [str(info.name) for info in self.driver.list(POOL.root)]

    def content(self, snapshot: str) -> bytes:
        """All bytes of a volume's snapshot."""
        name = SnapshotName.parse(snapshot)
        size_bytes = self.driver.get_snapshot(name).volsize_bytes or 0
        with self.driver.open_snapshot(name) as fd, open(fd, "rb", closefd=False) as file:
            return file.read(size_bytes)

    def write(self, volume: DatasetName, data: bytes) -> None:
        """Change the start of a volume."""
        with self.driver.open_volume(volume, writable=True) as fd:
            os.pwrite(fd, data, 0)

    async def close(self) -> None:
        """Everything that was opened, in the daemon's order."""
        await self.parts.fetches.stop()
        self.parts.fetches.close()
        self.parts.close()
        self.table.close()
        self.driver.close()


@asynccontextmanager
async def open_world(state_dir: Path, server: FakeImageServer, **changes: Any) -> AsyncIterator[World]:
    """A world whose store is open and at work."""
    world = World(state_dir, server, **changes)
    try:
        await world.store.open()
        yield world
    finally:
        await world.close()


def read_path(path: str, size_bytes: int = -1) -> bytes:
    """Bytes of a file or device, for tests that run on a loop and may block it."""
    with Path(path).open("rb") as file:
        return file.read(size_bytes)


def disk(seed: int, size_bytes: int = MIB) -> bytes:
    """A raw disk: data that does not repeat, then zeros."""
    unit = b"".join((seed * 1_000_003 + n).to_bytes(8, "little") for n in range(4096))
    data = (unit * (size_bytes // len(unit) + 1))[: size_bytes // 2]
    return data.ljust(size_bytes, b"\0")
