"""Turns on the event loop: taken and given back on a thread, and never forgotten by a cancelled caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from image_service.replica import Replica
from image_service.spool import settled
from imaging.kv.leases import Fence
from imaging.threads import Offload


@asynccontextmanager
async def turn_at(name: str, replica: Replica, offload: Offload) -> AsyncIterator[Fence | None]:
    """Hold a turn while the block runs; None if another replica has it."""
    task = asyncio.ensure_future(offload(replica.find_turn, name))
    try:
        fence = await settled(task)
    except asyncio.CancelledError:
        if task.exception() is None:
            await _release(task.result(), offload)
        raise
    try:
        yield fence
    finally:
        await _release(fence, offload)


async def _release(fence: Fence | None, offload: Offload) -> None:
    if fence is not None:
        await settled(offload(fence.release))
