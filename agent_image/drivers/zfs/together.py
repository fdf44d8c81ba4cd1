"""Calls that come while one is under way are made together: ZFS takes snapshots of many datasets for the price of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

TOGETHER_MAX = 256
"""Names in one call: it is one change, all or none, and its size has to stay bounded."""


class Together:
    """Makes calls of several callers one. Who comes first makes the call for all that wait by then; nobody waits for anybody to come."""

    def __init__(self, call: Callable[[Sequence[str]], None], key: Callable[[str], str]) -> None:
        """``call`` works on all names or none; of names with one ``key`` it takes only one at a time."""
        self._call = call
        self._key = key
        self._changed = threading.Condition()
        self._waiting: list[tuple[list[str], Future[None]]] = []
        self._is_under_way = False

    def __call__(self, names: Sequence[str]) -> None:
        """Make the call for these names; its error if it fails for them."""
        mine: Future[None] = Future()
        with self._changed:
            self._waiting.append((list(names), mine))
            self._changed.wait_for(lambda: mine.done() or not self._is_under_way)
            batch = [] if mine.done() else self._next_batch(mine)
            self._is_under_way = self._is_under_way or bool(batch)
        if batch:
            try:
                self._make(batch)
            finally:
                with self._changed:
                    self._is_under_way = False
                    self._changed.notify_all()
        mine.result()

    def _next_batch(self, mine: Future[None]) -> list[tuple[list[str], Future[None]]]:
        """What goes together with ``mine``, which is among those that wait; the others go on waiting."""
        batch = [entry for entry in self._waiting if entry[1] is mine]
        names, keys = len(batch[0][0]), {self._key(name) for name in batch[0][0]}
        for entry in self._waiting:
            wanted = {self._key(name) for name in entry[0]}
            if entry[1] is not mine and not wanted & keys and names + len(entry[0]) <= TOGETHER_MAX:
                batch.append(entry)
                keys |= wanted
                names += len(entry[0])
        self._waiting = [entry for entry in self._waiting if entry not in batch]
        return batch

    def _make(self, batch: Sequence[tuple[list[str], Future[None]]]) -> None:
        """One call for all; if it is refused, one for each, as the refusal may be meant for any of them."""
        if len(batch) > 1 and self._made([name for names, _ in batch for name in names]) is None:
            for _, future in batch:
                future.set_result(None)
            return
        for names, future in batch:
            error = self._made(names)
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _made(self, names: Sequence[str]) -> BaseException | None:
        try:
            self._call(names)
        except BaseException as err:  # noqa: BLE001 - it travels to the caller it belongs to
            return err
        return None
