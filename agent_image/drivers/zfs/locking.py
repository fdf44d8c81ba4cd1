"""The lock that orders changes of one pool: those that only add share it, those that move or remove names have it alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType


class ChangeLock:
    """``with lock`` has it alone and may be nested; ``with lock.shared()`` shares it and must not be nested in any way.

    Who waits to have it alone goes before those who come to share it, so that nobody waits for ever. ZFS puts changes that are
    made at once into one transaction group, which is why sharing pays.
    """

    def __init__(self) -> None:
        self._alone = threading.RLock()
        self._changed = threading.Condition()
        self._sharing = 0

    def __enter__(self) -> None:
        self._alone.acquire()
        with self._changed:
            self._changed.wait_for(lambda: not self._sharing)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alone.release()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share it for the block."""
        with self._alone, self._changed:
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()
