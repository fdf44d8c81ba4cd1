"""The pool of workers that empties the job queue: claims, fetches, publishes, reports."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from agent_image.fetch import Fetcher, FetchOrder, FetchProgress
from agent_image.fetch_http import CancelToken
from agent_image.jobs import Job, JobQueue, JobState
from agent_image.records import ImageRecord, ImageStatus
from agent_image.store_images import Images
from imaging import errors
from imaging.errors import ConflictError, InternalError, MistifyError, UnavailableError
from imaging.threads import Offload

ATTEMPTS_MAX = 5
"""Of one job that fails for reasons that may pass; what lasts longer is for the caller to know."""

BACKOFF_S = 0.5
"""Before the second attempt; doubled for each further one, up to BACKOFF_MAX_S, with jitter: in all about ten seconds."""

BACKOFF_MAX_S = 30.0

HEARTBEAT_S = 5.0
"""A twelfth of the time after which a claim lapses."""

POLL_S = 1.0
"""How often an idle worker looks for a job whose delay has passed; new jobs wake it at once."""

STOP_TIMEOUT_S = 2.5
"""Inside the 3 s a draining daemon gives to parking. A fetch ends as soon as its threads notice, most within milliseconds."""

_CODE_CANCELLED = "cancelled"

_BY_CODE: dict[str, type[MistifyError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, MistifyError) and kind is not MistifyError
}

log = logging.getLogger(__name__)


class FetchMetrics(Protocol):
    """What the pool counts."""

    def fetched(self, outcome: str, duration_s: float) -> None:
        """A fetch ended: ``ok`` or the code of its error."""

    def retried(self, code: str) -> None:
        """A fetch failed for a reason that may pass and will be tried again."""


@dataclass(eq=False, slots=True)
class _Running:
    """One job a worker is at."""

    job: Job
    cancel: CancelToken
    progress: FetchProgress
    ended: asyncio.Event = field(default_factory=asyncio.Event)


Outcome = ImageRecord | MistifyError


class FetchPool:
    """Accepts orders, works them, tells who waits.

    An order that was accepted is worked to its end whoever waits for it. Life: construct, ``start``, use, ``stop``: what is unfinished
    goes back into the queue for the next start.
    """

    def __init__(
        self,
        queue: JobQueue,
        images: Images,
        fetcher: Fetcher,
        *,
        fetchers: int,
        metrics: FetchMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._images = images
        self._fetcher = fetcher
        self._metrics = metrics
        self._clock = clock
        self._count = fetchers
        self._threads = Offload("fetch", fetchers)
        self._queue_threads = Offload("jobs", 2)
        self._workers: list[asyncio.Task[None]] = []
        self._running: dict[str, _Running] = {}
        self._waiting: dict[str, set[asyncio.Future[Outcome]]] = {}
        self._wake = asyncio.Event()
        self._stopping = False

    # -- life --------------------------------------------------------------------------------------------------------

    async def recover(self) -> Sequence[str]:
        """At start: take back what dead workers had claimed; ids of the images whose fetch will go on."""
        await self._queue_threads(self._queue.recover, now_s=self._clock())
        await self._queue_threads(self._queue.prune, now_s=self._clock())
        waiting = await self._queue_threads(self._queue.list, JobState.WAITING)
        unfinished = [_order(job).id for job in waiting]
        await self._images.pool.run(self._fetcher.forget_others, frozenset(unfinished))
        return unfinished

    def start(self) -> None:
        """Begin to work."""
        self._workers = [asyncio.create_task(self._work(), name=f"fetcher-{n}") for n in range(self._count)]

    async def stop(self) -> None:
        """Stop all fetches, put unfinished jobs back, answer who waits; idempotent."""
        self._stopping = True
        for running in list(self._running.values()):
            running.cancel.cancel()
        self._wake.set()
        if self._workers:
            _, late = await asyncio.wait(self._workers, timeout=STOP_TIMEOUT_S)
            for task in late:
                log.error("a fetch did not stop in time; its job is claimed again at the next start")
                task.cancel()
        stopped = UnavailableError("the agent is stopping; the fetch goes on when it starts again")
        for job_id in list(self._waiting):
            self._settle(job_id, stopped)

    def close(self) -> None:
        """End the threads."""
        self._queue_threads.close()
        if not self._running:
            self._threads.close()

    @property
    def alive(self) -> bool:
        """Whether all workers are at work."""
        return bool(self._workers) and not any(worker.done() for worker in self._workers)

    @property
    def running(self) -> int:
        """Fetches under way."""
        return len(self._running)

    # -- for callers -------------------------------------------------------------------------------------------------

    async def submit(self, order: FetchOrder) -> Job:
        """Accept an order, durably; UnavailableError at once if too many are waiting."""
        if self._stopping:
            raise UnavailableError("the agent is stopping")
        payload = msgspec.to_builtins(order)
        job = await self._queue_threads(self._queue.enqueue, order.key, payload, now_s=self._clock())
        self._wake.set()
        return job

    async def wait(self, job: Job) -> ImageRecord:
        """Wait for a job's end: the image, or the error it ended with."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(job.id, set())
        waiting.add(future)
        try:
            # The job may have ended before we began to wait; one that ends from now on will find us.
            current = await self._queue_threads(self._queue.get, job.id)
            if current.state in {JobState.DONE, JobState.FAILED} and not future.done():
                future.set_result(_outcome(current))
            if self._stopping and not future.done():
                raise UnavailableError("the agent is stopping; the fetch goes on when it starts again")
            outcome = await future
        finally:
            waiting.discard(future)
            if not waiting and self._waiting.get(job.id) is waiting:
                del self._waiting[job.id]
        if isinstance(outcome, MistifyError):
            raise outcome
        return outcome

    async def list_pending(self) -> Sequence[ImageRecord]:
        """Images on their way, oldest job first."""
        jobs = await self._queue_threads(self._queue.list, JobState.CLAIMED, JobState.WAITING)
        return [self._as_record(job) for job in jobs]

    async def find_pending(self, image_id: str) -> ImageRecord | None:
        """An image on its way, or None."""
        job = await self._queue_threads(self._queue.find, FetchOrder(id=image_id).key)
        if job is None or job.state in {JobState.DONE, JobState.FAILED}:
            return None
        return self._as_record(job)

    async def find_failed(self, image_id: str) -> ImageRecord | None:
        """The last fetch of an image if it was given up and its result is still kept; None if there was none or it was cancelled."""
        job = await self._queue_threads(self._queue.find, FetchOrder(id=image_id).key)
        if job is None or job.state is not JobState.FAILED or job.result.get("code") == _CODE_CANCELLED:
            return None
        order = _order(job)
        facts = job.progress | {"stage": ImageStatus.ERROR.value, "message": str(job.result.get("message", ""))}
        return ImageRecord(id=order.id, type=order.type, source=order.source, status=ImageStatus.ERROR, progress=facts)

    async def forget_results(self) -> int:
        """Drop results that nobody may come back for any more; how many."""
        return await self._queue_threads(self._queue.prune, now_s=self._clock())

    async def pending_count(self) -> int:
        """Accepted jobs that are not finished."""
        return len(await self._queue_threads(self._queue.list, JobState.CLAIMED, JobState.WAITING))

    def _as_record(self, job: Job) -> ImageRecord:
        order = _order(job)
        running = self._running.get(job.id)
        progress = job.progress | (running.progress.to_job() if running is not None else {})
        status = ImageStatus.PENDING if running is None else ImageStatus.DOWNLOADING
        facts = progress | {"attempt": int(progress.get("failures", 0)) + 1, "stage": status.value}
        return ImageRecord(
            id=order.id, type=order.type, source=order.source, digest=order.digest, status=status, progress=facts
        )

    async def cancel(self, image_id: str) -> ImageRecord | None:
        """Stop the fetch of an image and wait until nothing of it is left; what it was, or None if there was none.

        Takes the image's lock: an image is either published or cancelled, never both.
        """
        key = FetchOrder(id=image_id).key
        async with self._images.pool.locks.hold(self._images.dataset(image_id)):
            if self._images.records.find(image_id) is not None:
                return None
            pending = await self.find_pending(image_id)
            job = await self._queue_threads(self._queue.cancel, key, now_s=self._clock())
            if job is None or pending is None:
                return None
            running = self._running.get(job.id)
            if running is not None:
                running.cancel.cancel()
        self._settle(job.id, _cancelled(image_id))
        if running is not None:
            await running.ended.wait()
        else:
            await self._images.pool.run(self._fetcher.forget, image_id)
        return pending

    # -- workers -----------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._stopping:
            self._wake.clear()  # before the claim: what is enqueued after it sets the event again
            try:
                job = await self._queue_threads(self._queue.claim, now_s=self._clock())
            except MistifyError:
                log.exception("can't claim a job")
                job = None
            if job is not None:
                await self._run_safely(job)
            elif not self._stopping:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), POLL_S)

    async def _run_safely(self, job: Job) -> None:
        """Work a job; whatever goes wrong, the worker lives on."""
        running = self._running.get(job.id)
        if running is not None:
            # Its claim lapsed (the machine slept) but its worker is here and alive: it goes on with the new claim.
            running.job = job
            return
        try:
            await self._run(job)
        except Exception:
            log.exception("a job is left to be claimed again", extra={"job_id": job.id})

    async def _run(self, job: Job) -> None:
        running = _Running(job, CancelToken(), FetchProgress())
        self._running[job.id] = running
        if self._stopping:
            running.cancel.cancel()
        beat = asyncio.create_task(self._beat(running))
        started_s = time.perf_counter()
        try:
            outcome = await self._attempt(running)
        finally:
            beat.cancel()
            await asyncio.wait([beat])
            del self._running[job.id]
            running.ended.set()
        if outcome is not None:
            code = outcome.code if isinstance(outcome, MistifyError) else "ok"
            self._metrics.fetched(code, time.perf_counter() - started_s)
            self._settle(job.id, outcome)

    async def _beat(self, running: _Running) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            progress = running.job.progress | running.progress.to_job()
            try:
                running.job = await self._queue_threads(
                    self._queue.heartbeat, running.job, now_s=self._clock(), progress=progress
                )
            except ConflictError:
                # Cancelled, or lapsed and about to be taken over again by this process: nobody else claims jobs.
                log.warning("lost the claim on a job", extra={"job_id": running.job.id})
            except MistifyError:
                log.exception("can't renew the claim on a job", extra={"job_id": running.job.id})

    async def _attempt(self, running: _Running) -> Outcome | None:
        """Work the job once; how it ended, or None if it goes on later (or somebody else ended it)."""
        order = _order(running.job)
        try:
            return await self._fetch_and_publish(order, running)
        except MistifyError as err:
            return await self._fail(running, err)
        except Exception as err:
            log.exception("a fetch failed for a reason it should not", extra={"image_id": order.id})
            failure = InternalError(f"the fetch of {order.id} failed unexpectedly")
            failure.__cause__ = err
            return await self._fail(running, failure)

    async def _fetch_and_publish(self, order: FetchOrder, running: _Running) -> ImageRecord:
        record = self._images.records.find(order.id)
        if record is None:
            log.info("fetching", extra={"image_id": order.id, "attempt": running.job.attempt})
            await self._threads(self._fetcher.fetch, order, running.cancel, running.progress)
        async with self._images.pool.locks.hold(self._images.dataset(order.id)):
            record = self._images.records.find(order.id)
            if record is None:
                running.cancel.check()
                record = await self._images.pool.run(self._images.publish, order.id)
                log.info("image complete", extra={"image_id": order.id, "size_bytes": record.size_bytes})
            await self._finish(running.job, msgspec.to_builtins(record), failed=False)
        return record

    async def _fail(self, running: _Running, err: MistifyError) -> MistifyError | None:
        job = running.job
        if running.cancel.cancelled:
            if self._stopping:
                await self._give_back(job, 0.0)
            else:
                await self._images.pool.run(self._fetcher.forget, _order(job).id)
            return None
        failures = int(job.progress.get("failures", 0)) + 1
        if err.retryable and failures < ATTEMPTS_MAX:
            await self._retry(job, failures, err)
            return None
        log.warning(
            "fetch failed", extra={"image_id": _order(job).id, "error": err.message, "cause": repr(err.__cause__)}
        )
        await self._finish(job, {"code": err.code, "message": err.message}, failed=True)
        return err

    async def _retry(self, job: Job, failures: int, err: MistifyError) -> None:
        delay_s = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
        log.info("fetch will be tried again", extra={"job_id": job.id, "error": err.message, "delay_s": delay_s})
        self._metrics.retried(err.code)
        progress: dict[str, Any] = {"failures": failures, "message": err.message}
        try:
            job = await self._queue_threads(self._queue.heartbeat, job, now_s=self._clock(), progress=progress)
        except MistifyError as lost:
            log.warning("lost the claim on a job", extra={"job_id": job.id, "error": lost.message})
            return
        await self._give_back(job, delay_s)
        asyncio.get_running_loop().call_later(delay_s, self._wake.set)

    async def _give_back(self, job: Job, delay_s: float) -> None:
        try:
            await self._queue_threads(self._queue.release, job, now_s=self._clock(), delay_s=delay_s)
        except MistifyError as err:
            log.warning("can't give a job back", extra={"job_id": job.id, "error": err.message})

    async def _finish(self, job: Job, result: dict[str, Any], *, failed: bool) -> None:
        try:
            await self._queue_threads(self._queue.finish, job, now_s=self._clock(), result=result, failed=failed)
        except ConflictError:
            log.warning("a job ended before its worker did", extra={"job_id": job.id})

    def _settle(self, job_id: str, outcome: Outcome) -> None:
        """Tell everybody who waits for a job."""
        for future in self._waiting.pop(job_id, ()):
            if not future.done():
                future.set_result(outcome)


def _order(job: Job) -> FetchOrder:
    return msgspec.convert(job.payload, FetchOrder)


def _outcome(job: Job) -> Outcome:
    """What a finished job's stored result means."""
    if job.state is JobState.DONE:
        return msgspec.convert(job.result, ImageRecord)
    code, message = str(job.result.get("code", "")), str(job.result.get("message", ""))
    if code == _CODE_CANCELLED:
        return _cancelled(_order(job).id)
    return _BY_CODE.get(code, InternalError)(message)


def _cancelled(image_id: str) -> ConflictError:
    return ConflictError(f"image {image_id} was deleted while it was being fetched")
