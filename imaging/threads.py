"""The one bridge between an event loop and the blocking world (sqlite, fsync, hashing, libzfs_core)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Offload:
    """Runs blocking calls on a bounded pool of threads: ``await offload(function, *args)``.

    A cancelled await does not stop the call; the thread runs it to its end. The caller that must not forget the result
    shields the await.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self.threads_max = threads_max
        self._executor = ThreadPoolExecutor(threads_max, thread_name_prefix=name)

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` on a thread and return what it returns or raise what it raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, functools.partial(function, *args, **kwargs))

    def close(self) -> None:
        """Let running calls end, refuse new ones."""
        self._executor.shutdown(wait=True, cancel_futures=True)
