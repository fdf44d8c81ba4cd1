"""Stages of a fetch that work at the same time: each reads its source on a thread of its own, a bounded amount ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from agent_image.drivers.base import Readable
from imaging.errors import MistifyError

PIECE_BYTES = 256 << 10
"""What a stage asks its source for. Larger pieces gain nothing here and are held several times over on their way."""

AHEAD_MAX_BYTES = 1 << 20
"""What a stage may hold that nobody has taken yet: enough to smooth out the network, little enough that four fetches at once, of two
stages each, leave the agent below 150 MiB."""

JOIN_TIMEOUT_S = 120.0
"""A stage ends when its source does: after the network's stall limit at the latest."""


def _ignore(_piece: bytes) -> None:
    """Nobody watches."""


class ReadAhead:
    """A source that is read on another thread while the consumer works on what came before.

    ``watch`` sees every piece on that thread, in order, before the consumer can have it. An error of the source (or of ``watch``) is
    raised by the ``read`` that would have needed the next piece, and is kept in ``failure``. Leaving the context ends the
    thread; a source that waits for the network must be woken by its owner.
    """

    def __init__(
        self,
        source: Readable,
        name: str,
        *,
        watch: Callable[[bytes], None] = _ignore,
        piece_bytes: int = PIECE_BYTES,
        ahead_max_bytes: int = AHEAD_MAX_BYTES,
    ) -> None:
        self.failure: BaseException | None = None
        self._source = source
        self._watch = watch
        self._piece_bytes = piece_bytes
        self._ahead_max_bytes = ahead_max_bytes
        self._pieces: deque[bytes] = deque()
        self._held_bytes = 0
        self._ended = False
        self._closed = False
        self._rest = memoryview(b"")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._pump, name=name, daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._pieces.clear()
            self._changed.notify_all()
        self._thread.join(JOIN_TIMEOUT_S)

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes (any number, for -1), at least one unless the source has ended."""
        if size == 0:
            return b""
        if not self._rest:
            piece = self._take()
            if size < 0 or len(piece) <= size:
                return piece
            self._rest = memoryview(piece)
        end = len(self._rest) if size < 0 else min(size, len(self._rest))
        data, self._rest = bytes(self._rest[:end]), self._rest[end:]
        return data

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes (fewer at the end of the source) without taking them."""
        while len(self._rest) < size:
            piece = self._take()
            if not piece:
                break
            self._rest = memoryview(bytes(self._rest) + piece)
        return bytes(self._rest[:size])

    def _take(self) -> bytes:
        """The next piece; empty at the end, and again after it."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._ended)
            if self._pieces:
                piece = self._pieces.popleft()
                self._held_bytes -= len(piece)
                self._changed.notify_all()
                return piece
            if self.failure is not None:
                raise self.failure
            return b""

    def _pump(self) -> None:
        try:
            while piece := self._source.read(self._piece_bytes):
                self._watch(piece)
                if not self._put(piece):
                    return
        except BaseException as err:  # noqa: BLE001 - handed to the consumer, whatever it is
            self.failure = err
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, piece: bytes) -> bool:
        """Whether the consumer still wants pieces."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._held_bytes < self._ahead_max_bytes)
            if self._closed:
                return False
            self._pieces.append(piece)
            self._held_bytes += len(piece)
            self._changed.notify_all()
            return True


def first_failure(stages: list[ReadAhead], error: MistifyError) -> BaseException:
    """What went wrong first: an error in an early stage looks like a cut-off stream to the later ones."""
    return next((stage.failure for stage in stages if stage.failure is not None), error)
