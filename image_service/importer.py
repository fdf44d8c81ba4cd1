"""Fetches images from their sources, in the background, a bounded number at a time.

One fetch is one task that owns its image's record from ``pending`` to ``complete`` or ``error``, in one process: it holds the turn
``fetch-<id>``, and every change it makes holds only during that turn. A turn that is over ends the task, which then leaves all as it
is: whoever has the turn now goes on with it. Every process looks for fetches nobody has the turn of (:meth:`Importer.take_over`).

A fetch retries what may pass with
backoff and jitter within a budget, goes on from the last durable byte, and looks at its record with compare-and-swap at every
step: a record that is gone ends the fetch and takes the bytes along.

Order that prevents mixing two versions of a source: forget the old bytes, then record the new validator, then write the new bytes. A
crash between any two leaves an ingest whose bytes belong to the recorded validator, or none.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from image_service.admission import Reservation
from image_service.collector import FETCH_PREFIX, Collector, fetch_ref
from image_service.facts import Facts
from image_service.fetcher import Body, Fetcher
from image_service.inspection import Inspection
from image_service.inspector import Inspector
from image_service.lifecycle import (
    UNFINISHED,
    UNKNOWN_SIZE,
    Image,
    set_downloading,
    set_failed,
    set_finished,
    update_size,
)
from image_service.metadata import MetadataStore
from image_service.spool import LEASE_TTL_S, Pools, Spool, find_committed, settled
from image_service.turns import turn_at
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError, LeaseLostError, MistifyError, NotFoundError, UnavailableError
from imaging.kv.leases import Fence

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits of the importer."""

    fetches_max: int = 8
    """Fetches at once: more only divide the same line and disk."""
    waiting_max: int = 4096
    """Fetches accepted and not ended; each costs a task and a record."""
    total_timeout_s: float = 24 * 3600.0
    """One fetch, retries included: 1 TiB at 13 MB/s."""
    failures_max: int = 6
    """Failures in a row that brought no byte: with the backoff below about a minute, which a restart of the source takes."""
    backoff_s: float = 1.0
    """Before the second attempt; doubles with every failure."""
    backoff_max_s: float = 30.0
    """More would only keep people waiting."""
    checkpoint_s: float = 5.0
    """How often progress is made durable: what a crash costs."""
    take_over_s: float = 3.0
    """How often to look for fetches of replicas that died: one short call each time. A turn outlives its holder for longer."""


def utc_now() -> datetime:
    """The time records are stamped with."""
    return datetime.now(UTC)


class Importer:
    """See the module's docstring."""

    def __init__(
        self,
        records: MetadataStore,
        blobs: BlobStore,
        fetcher: Fetcher,
        collector: Collector,
        inspector: Inspector,
        *,
        pools: Pools,
        limits: FetchLimits,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._records = records
        self._blobs = blobs
        self._fetcher = fetcher
        self._collector = collector
        self._admission = inspector.admission
        self._inspector = inspector
        self._offload = pools.records
        self._data = pools.data
        self._limits = limits
        self._now = now
        self._slots = asyncio.Semaphore(limits.fetches_max)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._received: dict[str, int] = {}
        self._seen: dict[str, Inspection] = {}
        """What has looked at the bytes of a fetch so far: over its attempts nothing is looked at twice."""
        self._parked = False

    # -- what the service calls --------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """UnavailableError if no further fetch is accepted now."""
        if self._parked or len(self._tasks) >= self._limits.waiting_max:
            raise UnavailableError("too many fetches are waiting; try again later")

    def start(self, image_id: str) -> None:
        """Fetch an unfinished image; nothing happens if that is under way."""
        if image_id in self._tasks or self._parked:
            return
        task = asyncio.create_task(self._run(image_id), name=f"fetch {image_id}")
        self._tasks[image_id] = task
        task.add_done_callback(lambda _: self._forget_task(image_id, task))

    def _forget_task(self, image_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(image_id) is task:
            del self._tasks[image_id]
        if not task.cancelled() and task.exception() is not None:
            log.error("fetch ended badly; the next start goes on with it", exc_info=task.exception())

    async def cancel(self, image_id: str) -> None:
        """End the fetch of an image and wait until it has let go; none is fine."""
        task = self._tasks.get(image_id)
        if task is not None:
            task.cancel()
            await settled(asyncio.wait([task]))

    def drop(self, image_id: str) -> None:
        """Another replica has deleted an image: end its fetch here, and remove what came after that replica had removed the rest."""
        if image_id in self._tasks:
            ending = asyncio.create_task(self._drop(image_id), name=f"drop {image_id}")
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _drop(self, image_id: str) -> None:
        await self.cancel(image_id)
        try:
            await settled(self._data(self._collector.forget, fetch_ref(image_id)))
        except MistifyError as err:
            log.warning("bytes of a deleted image are left to the collector: %s", err.message)

    async def park(self) -> None:
        """End every fetch so that the next start goes on where it was; no new one is accepted."""
        self._parked = True
        tasks = [*self._tasks.values(), *self._endings]
        for task in tasks:
            task.cancel()
        if tasks:
            await settled(asyncio.wait(tasks))

    async def take_over(self) -> None:
        """Start every fetch that is owed and that nobody has the turn of."""
        owed = await self._offload(self._records.owed)
        if owed:
            held = await self._offload(self._records.replica.held, FETCH_PREFIX)
            for image_id in owed:
                if fetch_ref(image_id) not in held:
                    self.start(image_id)

    async def keep_taking_over(self) -> None:
        """Take over what the dead leave behind, until cancelled."""
        while True:
            try:
                await self.take_over()
            except MistifyError as err:
                log.warning("can't see which fetches are owed: %s", err.message)
            await asyncio.sleep(self._limits.take_over_s)

    def received_bytes(self, image_id: str) -> int | None:
        """How many bytes of a running fetch are here; None if it is not running."""
        return self._received.get(image_id)

    @property
    def running(self) -> int:
        """Fetches accepted and not ended."""
        return len(self._tasks)

    # -- one fetch ---------------------------------------------------------------------------------------------------

    async def _run(self, image_id: str) -> None:
        try:
            async with self._slots, turn_at(fetch_ref(image_id), self._records.replica, self._offload) as turn:
                if turn is not None:
                    await self._have_turn(image_id, turn)
        except (LeaseLostError, UnavailableError) as err:
            log.warning("fetch is left to whoever takes it up: %s", err.message, extra={"image_id": image_id})
        finally:
            self._received.pop(image_id, None)
            self._seen.pop(image_id, None)

    async def _have_turn(self, image_id: str, turn: Fence) -> None:
        try:
            await self._fetch(image_id, turn)
        except LeaseLostError:
            raise
        except MistifyError as err:
            await self._end(image_id, turn, err.message)
        except Exception:
            log.exception("fetch failed for a reason of our own", extra={"image_id": image_id})
            await self._end(image_id, turn, "internal error")

    async def _end(self, image_id: str, turn: Fence, reason: str) -> None:
        """The fetch is given up: its bytes go, then its record says why (if there still is one)."""
        await self._offload(self._check, turn)
        log.warning("fetch was given up: %s", reason, extra={"image_id": image_id})
        await settled(self._data(self._collector.forget, fetch_ref(image_id)))
        try:
            await self._update(image_id, turn, lambda image: set_failed(image, reason, now=self._now()))
        except (NotFoundError, ConflictError) as err:
            log.info("record of the fetch is gone: %s", err, extra={"image_id": image_id})

    def _check(self, turn: Fence) -> None:
        """Ask the engine, not only the clock: what follows can't be undone."""
        turn.check()
        if self._records.replica.is_over(turn):
            raise LeaseLostError(f"the lease is lost: {turn.name}")

    async def _fetch(self, image_id: str, turn: Fence) -> None:
        deadline = time.monotonic() + self._limits.total_timeout_s
        failures, reached = 0, -1
        while True:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(deadline - time.monotonic(), 0)):
                    await self._attempt(image_id, turn)
            except TimeoutError as err:
                raise UnavailableError(f"image source took longer than {self._limits.total_timeout_s:.0f} s") from err
            except LeaseLostError:
                raise
            except MistifyError as err:
                turn.check()  # an engine that can't be reached is no failure of the fetch
                received = self._received.get(image_id, 0)
                failures, reached = (1 if received > reached else failures + 1), max(reached, received)
                if not err.retryable or failures >= self._limits.failures_max:
                    raise
                log.info("fetch will be tried again: %s", err.message, extra={"image_id": image_id})
                await asyncio.sleep(self._pause_s(failures))
            else:
                return

    def _pause_s(self, failures: int) -> float:
        """Exponential, with full jitter on the upper half, so that many fetches of one dead source do not return in step."""
        full = min(self._limits.backoff_s * 2.0 ** (failures - 1), self._limits.backoff_max_s)
        return full / 2 + random.uniform(0, full / 2)  # noqa: S311 - spreads load, guards nothing

    async def _attempt(self, image_id: str, turn: Fence) -> None:
        image = await self._offload(self._records.get_by_id, image_id)
        if image.status not in UNFINISHED or await self._is_stored(image, turn):
            return
        limit = self._admission.size_max_bytes
        with await self._offload(self._admission.reserve, fetch_ref(image_id)) as room:
            inspect = functools.partial(self._inspector.begin, image.type)
            seen = self._seen.pop(image_id, None)
            async with await Spool.open(
                self._blobs, self._data, room, max_bytes=limit, inspect=inspect, seen=seen, turn=turn
            ) as spool:
                self._received[image_id] = spool.offset_bytes
                try:
                    total_bytes = await self._converse(image, turn, spool, room)
                except (MistifyError, asyncio.CancelledError):
                    if not turn.is_lost:
                        await spool.checkpoint()  # what is here is kept for the next attempt, or the next start
                    if spool.inspection is not None:
                        self._seen[image_id] = spool.inspection
                    raise
                await settled(self._publish(image, turn, total_bytes, spool))

    async def _is_stored(self, image: Image, turn: Fence) -> bool:
        """Whether all bytes were stored before a crash came: then only the looking is left, and done."""
        info = await self._data(find_committed, self._blobs, fetch_ref(image.id))
        if info is None:
            return False
        await settled(self._look(image, turn, info, None))
        return True

    async def _converse(self, image: Image, turn: Fence, spool: Spool, room: Reservation) -> int:
        """Take everything the source has behind what is here; the length it gave."""
        if image.validator and image.expected_size_bytes == spool.offset_bytes:
            return spool.offset_bytes  # a crash came between the last byte and the commit
        async with self._fetcher.open(
            image.source,
            offset_bytes=spool.offset_bytes,
            validator=image.validator,
            total_bytes=image.expected_size_bytes,
        ) as body:
            _check_length(image, body.total_bytes)
            await self._offload(room.announce, body.total_bytes, received_bytes=body.offset_bytes)
            await self._take(image, turn, body, spool)
            return body.total_bytes

    async def _take(self, image: Image, turn: Fence, body: Body, spool: Spool) -> None:
        """Write the body behind what is there; see the module's docstring for the order."""
        if body.offset_bytes != spool.offset_bytes:
            await spool.restart()
        known = body.total_bytes != UNKNOWN_SIZE
        await self._update(
            image.id,
            turn,
            lambda old: set_downloading(old, body.total_bytes, now=self._now(), validator=body.validator),
        )
        saved = time.monotonic()
        async for chunk in body.chunks():
            await spool.write(chunk)
            self._received[image.id] = spool.offset_bytes
            if time.monotonic() - saved >= self._limits.checkpoint_s:
                await self._save(image.id, turn, spool)
                saved = time.monotonic()
        if known and spool.offset_bytes != body.total_bytes:
            raise UnavailableError(f"image source sent {spool.offset_bytes} of {body.total_bytes} bytes")

    async def _save(self, image_id: str, turn: Fence, spool: Spool) -> None:
        """Make progress durable, and find out whether anybody still wants it."""
        size_bytes = await spool.checkpoint()
        await self._data(self._blobs.lease, fetch_ref(image_id), ttl_s=LEASE_TTL_S)
        await self._update(image_id, turn, lambda image: update_size(image, size_bytes))

    async def _publish(self, image: Image, turn: Fence, total_bytes: int, spool: Spool) -> None:
        _check_length(image, spool.offset_bytes)
        wanted = Digest.parse(image.expected_digest) if image.expected_digest else None
        size_bytes = None if total_bytes == UNKNOWN_SIZE else total_bytes
        info = await spool.commit(digest=wanted, size_bytes=size_bytes)
        await self._look(image, turn, info, spool.inspection)

    async def _look(self, image: Image, turn: Fence, info: BlobInfo, inspection: Inspection | None) -> None:
        """The bytes are stored: find out to the end what they are, and say so."""

        def finish(facts: Facts) -> None:
            now = self._now()
            self._records.update(
                image.id, lambda old: set_finished(old, info.digest, info.size_bytes, facts, now=now), fence=turn
            )

        await self._data(self._inspector.publish, fetch_ref(image.id), image, info, inspection, finish)

    async def _update(self, image_id: str, turn: Fence, change: Callable[[Image], Image]) -> Image:
        return await settled(self._offload(self._records.update, image_id, change, fence=turn))


def _check_length(image: Image, size_bytes: int) -> None:
    """BadDataError if the caller said another length than what the source says, or gave."""
    if image.wanted_size_bytes != UNKNOWN_SIZE and size_bytes not in {UNKNOWN_SIZE, image.wanted_size_bytes}:
        raise BadDataError(f"image source has {size_bytes} bytes, not {image.wanted_size_bytes}")
