"""The lock that orders changes of one pool: those that only add share it, those that move or remove names have it alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

LOOK_S = 1.0
"""How often who waits looks whether there is any hope."""


def _hope() -> None:
    """There is always."""


class ChangeLock:
    """``with lock`` has it alone and may be nested; ``with lock.shared()`` shares it and must not be nested in any way.

    Who waits to have it alone goes before those who come to share it, so that nobody waits for ever. ZFS puts changes that are
    made at once into one transaction group, which is why sharing pays.

    A change hangs in the kernel while its pool is suspended, and the lock with it. So who waits calls ``look`` now and then, which
    raises if waiting is in vain.
    """

    def __init__(self, look: Callable[[], None] = _hope) -> None:
        self._look = look
        self._alone = threading.RLock()
        self._changed = threading.Condition()
        self._sharing = 0

    def __enter__(self) -> None:
        self._take()
        try:
            while not self._is_alone():
                self._look()
        except BaseException:
            self._alone.release()
            raise

    def _take(self) -> None:
        while not self._alone.acquire(timeout=LOOK_S):
            self._look()

    def _is_alone(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._sharing, LOOK_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alone.release()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share it for the block."""
        self._take()
        with self._changed:
            self._sharing += 1
        self._alone.release()
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()
