"""Downloads whose send goes wrong: a proper status before the first byte, a broken connection after it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from agent_image.drivers.base import SendFlags, SnapshotInfo, StorageDriver
from agent_image.store import ImageStore
from agent_image.web import DOWNLOADS_MAX, PATH, SnapshotDownloads
from imaging.errors import UnavailableError, UnsupportedError
from imaging.names import SnapshotName

NAME = SnapshotName.parse("p/f@s")


class OneSnapshot:
    """A store that knows one snapshot, and the driver that sends it as told."""

    def __init__(self, pieces: list[bytes | Exception]) -> None:
        self.pieces = pieces
        self.gate = asyncio.Event()

    async def find_snapshot(self, _wire_id: str) -> SnapshotInfo:
        return SnapshotInfo(NAME, 1, 1, 1, 512)

    def send(
        self,
        _name: SnapshotName,
        fd: int,
        *,
        base: str | None = None,
        flags: SendFlags | None = None,
        resume_token: str | None = None,
    ) -> None:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            left = memoryview(piece)
            while left:
                left = left[os.write(fd, left) :]


@asynccontextmanager
async def serving(pieces: list[bytes | Exception]) -> AsyncIterator[tuple[str, Counter[str]]]:
    fake, counts = OneSnapshot(pieces), Counter[str]()

    def count(outcome: str) -> None:
        counts[outcome] += 1

    downloads = SnapshotDownloads(cast("ImageStore", fake), cast("StorageDriver", fake), count=count)
    app = web.Application()
    app.router.add_route("*", PATH, downloads.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}{PATH}?id=f@s", counts
    finally:
        await runner.cleanup()
        downloads.close()


async def fetch(url: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.read()


async def test_download_whole_stream_arrives(tmp_path: Path) -> None:
    body = os.urandom(5_000_000)
    async with serving([body[:1], body[1:4_000_000], body[4_000_000:]]) as (url, counts):
        assert await fetch(url) == (200, body)
        assert counts == {"ok": 1}


@pytest.mark.parametrize(
    ("error", "status"), [(UnsupportedError("a filesystem has nothing to send"), 501), (UnavailableError("busy"), 503)]
)
async def test_download_that_can_not_start_is_a_status_with_text(error: Exception, status: int) -> None:
    async with serving([error]) as (url, counts):
        assert await fetch(url) == (status, f"{error}\n".encode())
        assert counts.total() == 1


@pytest.mark.parametrize("sent", [1, 64 << 10, 3_000_000])
async def test_download_that_fails_in_mid_stream_never_looks_complete(sent: int) -> None:
    async with serving([os.urandom(sent), UnavailableError("the pool is suspended")]) as (url, counts):
        with pytest.raises(aiohttp.ClientError):
            await fetch(url)
        assert counts == {"unavailable": 1}


async def test_download_beyond_the_limit_is_told_to_come_back() -> None:
    async with serving([bytes(64 << 20)]) as (url, _counts), aiohttp.ClientSession() as session:
        held: list[Any] = [await session.get(url) for _ in range(DOWNLOADS_MAX)]
        try:
            status, text = await fetch(url)
            assert status == 503
            assert b"are being downloaded already" in text
        finally:
            for response in held:
                response.close()
