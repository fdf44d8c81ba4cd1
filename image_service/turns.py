"""Turns on the event loop: taken and given back on a thread, and never forgotten by a cancelled caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from image_service.replica import Replica
from image_service.spool import settled
from imaging.errors import LeaseLostError
from imaging.kv.leases import Fence
from imaging.threads import Offload

LOOK_S = 0.5
"""How often a turn is looked at, by the clock alone: work that waits for others notices soon that it is nobody's work any more."""


async def find_turn(name: str, replica: Replica, offload: Offload) -> Fence | None:
    """Take a turn, to be released by the caller; None if another replica has it."""
    task = asyncio.ensure_future(offload(replica.find_turn, name))
    try:
        return await settled(task)
    except asyncio.CancelledError:
        if task.exception() is None:
            await _release(task.result(), offload)
        raise


@asynccontextmanager
async def turn_at(name: str, replica: Replica, offload: Offload) -> AsyncIterator[Fence | None]:
    """Hold a turn while the block runs; None if another replica has it. LeaseLostError ends the block when the turn is over."""
    fence = await find_turn(name, replica, offload)
    try:
        async with ended_with(fence):
            yield fence
    finally:
        await _release(fence, offload)


@asynccontextmanager
async def ended_with(fence: Fence | None) -> AsyncIterator[None]:
    """Cancel the block when the turn is over, and raise LeaseLostError."""
    if fence is None:
        yield
        return
    limit = asyncio.timeout(None)
    try:
        async with limit:
            watch = asyncio.create_task(_wait_lost(fence, limit), name=f"watch {fence.name}")
            try:
                yield
            finally:
                watch.cancel()
    except TimeoutError as err:
        if not limit.expired():
            raise
        raise LeaseLostError(f"the lease is lost: {fence.name}") from err


async def _wait_lost(fence: Fence, limit: asyncio.Timeout) -> None:
    loop = asyncio.get_running_loop()
    while not fence.is_lost:  # noqa: ASYNC110 - what ends a turn is the clock
        await asyncio.sleep(LOOK_S)
    limit.reschedule(loop.time())


async def _release(fence: Fence | None, offload: Offload) -> None:
    if fence is not None:
        await settled(offload(fence.release))
