"""One writer at a time: locks on subtrees of the pool, for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from imaging.names import DatasetName


@dataclass(eq=False, slots=True)
class _Grip:
    """What one holder has."""

    writes: Sequence[DatasetName]
    reads: Sequence[DatasetName]


def _overlap(some: Iterable[DatasetName], others: Sequence[DatasetName]) -> bool:
    return any(one.is_within(other) or other.is_within(one) for one in some for other in others)


class SubtreeLocks:
    """Locks datasets with everything below.

    Two holds conflict if one of them writes and their subtrees overlap. A hold takes all its datasets in one step, so holders can't
    wait for each other in a circle. A waiter is passed by later holds that do not conflict with it or with what is held: it
    waits behind earlier waiters it conflicts with, so nobody starves.
    """

    def __init__(self) -> None:
        self._held: list[_Grip] = []
        self._waiting: list[_Grip] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, *writes: DatasetName, reads: Sequence[DatasetName] = ()) -> AsyncIterator[None]:
        """Hold ``writes`` alone and ``reads`` together with other readers."""
        grip = _Grip(writes, reads)
        await self._acquire(grip)
        try:
            yield
        finally:
            self._held.remove(grip)
            # A notification needs the condition's lock, which waits; a cancelled holder must still wake the others.
            await asyncio.shield(self._wake())

    async def _acquire(self, grip: _Grip) -> None:
        async with self._changed:
            self._waiting.append(grip)
            try:
                await self._changed.wait_for(lambda: self._may_go(grip))
                self._held.append(grip)
            finally:
                self._waiting.remove(grip)
                self._changed.notify_all()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _may_go(self, grip: _Grip) -> bool:
        earlier = self._waiting[: self._waiting.index(grip)]
        return not any(_conflict(grip, other) for other in (*self._held, *earlier))


def _conflict(one: _Grip, other: _Grip) -> bool:
    return _overlap(one.writes, other.writes) or _overlap(one.writes, other.reads) or _overlap(one.reads, other.writes)
