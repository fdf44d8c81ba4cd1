"""Long work that several requests wait for: made once, bounded, cancellable, and never waited for longer than a connection lasts.

One piece of work per key at a time; whoever asks for the same key meanwhile waits for the same result. A request that has waited
long enough is told to come again (UnavailableError, with Retry-After on the wire) while the work goes on. What failed for good is
remembered for a while, so that a client that comes again gets the reason and not another round of the same work.

That is among the requests of one process. Among processes the work itself takes a turn (:meth:`Work.wait` while it is another's).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from imaging.errors import InternalError, MistifyError, NoSpaceError, UnavailableError
from imaging.files import free_bytes
from imaging.threads import Offload

T = TypeVar("T")

ROOM_CHECK_BYTES = 16 << 20
"""How often free space is looked at while temporary files grow: a look costs microseconds, and little can be written between two."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeriveLimits:
    """Limits on derived images."""

    derivations_max: int = 2
    """At once: each keeps a processor busy with compression and a disk with reading."""
    waiting_max: int = 32
    """Accepted and not ended; further ones are told to come again."""
    wait_s: float = 20.0
    """A request waits so long for its derivation, well below the 60 s after which clients give up a silent connection."""
    total_timeout_s: float = 6 * 3600.0
    """One derivation: 1 TiB at 50 MB/s."""
    size_max_bytes: int = 1 << 40
    """Virtual size of a disk that is derived from: 1 TiB of zeros alone takes ten minutes to hash."""
    cache_max_bytes: int = 256 << 30
    """All derived blobs together; the least recently used go first."""
    cache_max_age_s: float = 30 * 86400.0
    """A derived blob nobody asked for in so long goes."""
    failure_keep_s: float = 60.0
    """How long the reason of a failed derivation is kept for those who come again."""
    free_min_bytes: int = 256 << 20
    """Stays free on the disk of the temporary files."""


class Work:
    """One piece of work as its thread sees it: told what was done, it says when to stop."""

    def __init__(self, key: str, directory: Path, limits: DeriveLimits) -> None:
        self.key = key
        self.directory = directory
        self.limits = limits
        self.done_bytes = 0
        self._deadline = time.monotonic() + limits.total_timeout_s
        self._stop = threading.Event()
        self._checked_bytes = 0

    def stop(self) -> None:
        """From another thread: the work is not wanted any more."""
        self._stop.set()

    def step(self, count_bytes: int) -> None:
        """So many more bytes were read or made; raises if the work has to end."""
        self.done_bytes += count_bytes
        if self._stop.is_set():
            raise UnavailableError("the service is stopping; try again later")
        if time.monotonic() > self._deadline:
            raise UnavailableError(f"deriving the image took longer than {self.limits.total_timeout_s:.0f} s")
        if self.done_bytes - self._checked_bytes >= ROOM_CHECK_BYTES:
            self._checked_bytes = self.done_bytes
            self.check_room()

    def wait(self, pause_s: float) -> None:
        """Nothing can be done for a while; raises if the work has to end."""
        self._stop.wait(pause_s)
        self.step(0)

    def check_room(self) -> None:
        """NoSpaceError before temporary files fill the disk."""
        if free_bytes(self.directory) < self.limits.free_min_bytes:
            raise NoSpaceError("no room for the temporary files of a derived image: no space left on device")


@dataclass(frozen=True, slots=True)
class _Failure:
    error: MistifyError
    until: float


class SharedWork:
    """See the module's docstring. Lives on one event loop; ``close`` ends what is running."""

    def __init__(self, directory: Path, limits: DeriveLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._threads = Offload("derive", limits.derivations_max)
        self._slots = asyncio.Semaphore(limits.derivations_max)
        self._tasks: dict[str, tuple[asyncio.Task[Any], Work]] = {}
        self._failures: dict[str, _Failure] = {}
        self._closed = False
        self.started = 0
        """Pieces of work begun since the start."""

    @property
    def running(self) -> int:
        """Pieces of work accepted and not ended."""
        return len(self._tasks)

    async def run(self, key: str, make: Callable[[Work], T]) -> T:
        """The result of ``make``, called on a thread once for all who ask for ``key`` at the same time.

        UnavailableError if too much is waiting already, or if it takes longer than a request may wait.
        """
        task, work = self._tasks.get(key) or self._start(key, make)
        await asyncio.wait([task], timeout=self._limits.wait_s)
        if not task.done():
            raise UnavailableError(f"the image is being made ({work.done_bytes} bytes worked through); try again later")
        if task.cancelled():
            raise UnavailableError("the service is stopping; try again later")
        return cast("T", task.result())

    def _start(self, key: str, make: Callable[[Work], T]) -> tuple[asyncio.Task[T], Work]:
        self._raise_known_failure(key)
        if self._closed or len(self._tasks) >= self._limits.waiting_max:
            raise UnavailableError("too many derived images are being made; try again later")
        work = Work(key, self._directory, self._limits)
        task = asyncio.create_task(self._run(work, make), name=f"derive {key}")
        self._tasks[key] = task, work
        task.add_done_callback(lambda _: self._end(key, task))
        return task, work

    async def _run(self, work: Work, make: Callable[[Work], T]) -> T:
        async with self._slots:
            self.started += 1
            return await self._threads(self._make, work, make)

    def _make(self, work: Work, make: Callable[[Work], T]) -> T:
        try:
            work.step(0)
            return make(work)
        except MistifyError:
            raise
        except Exception as err:
            raise InternalError(f"deriving {work.key} failed unexpectedly") from err

    def _end(self, key: str, task: asyncio.Task[Any]) -> None:
        del self._tasks[key]
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.warning("derivation failed", extra={"key": key}, exc_info=error)
        if isinstance(error, MistifyError) and not error.retryable:
            self._failures[key] = _Failure(error, time.monotonic() + self._limits.failure_keep_s)

    def _raise_known_failure(self, key: str) -> None:
        now = time.monotonic()
        self._failures = {name: one for name, one in self._failures.items() if one.until > now}
        known = self._failures.get(key)
        if known is not None:
            raise type(known.error)(known.error.message) from known.error

    async def close(self) -> None:
        """End everything that runs and refuse what comes; idempotent."""
        self._closed = True
        for _, work in self._tasks.values():
            work.stop()
        if self._tasks:
            await asyncio.wait([task for task, _ in self._tasks.values()])
        self._threads.close()
