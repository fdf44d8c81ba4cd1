"""Telling those who wait for an image that its record has changed, whichever replica changed it.

An engine that can be watched (etcd) is watched by one thread for all who wait; they look at the record again when it has changed, and now
and then anyway, because a watch can break. Any other engine has one process, where a look takes some 50 us: there they look often.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from image_service.metadata import RECORDS
from imaging.errors import ConflictError, MistifyError
from imaging.kv.base import KeyValue
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_watch import Change, EtcdWatch

LOOK_S = 0.25
"""How often to look where nothing can be watched: 500 who wait then look 2,000 times a second."""

WATCHED_LOOK_S = 5.0
"""How often to look although nothing was told."""

RETRY_S = 2.0
"""Before a watch that ended is begun anew."""

FROM_NOW = -1
"""As the revision to watch from."""

log = logging.getLogger(__name__)


class News:
    """See the module's docstring. Lives on one event loop: ``start``, use, ``close``."""

    def __init__(self, engine: KeyValue) -> None:
        self._engine = engine if isinstance(engine, EtcdKeyValue) else None
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._deleted: list[Callable[[str], None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = threading.Event()
        self._watch: EtcdWatch | None = None
        self._thread: threading.Thread | None = None

    def on_deleted(self, tell: Callable[[str], None]) -> None:
        """From now on call ``tell`` on the loop with the id of each image that any replica deletes, where that can be watched."""
        self._deleted.append(tell)

    def start(self) -> None:
        """Begin to watch, if that can be done."""
        if self._engine is not None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._follow, args=(self._engine,), name="news", daemon=True)
            self._thread.start()

    @property
    def look_s(self) -> float:
        """How long to wait for news before looking without any."""
        return LOOK_S if self._engine is None else WATCHED_LOOK_S

    @contextmanager
    def listening(self, image_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the image's record may have changed. Clear it, then look at the record, then wait."""
        event = asyncio.Event()
        self._waiting.setdefault(image_id, set()).add(event)
        try:
            yield event
        finally:
            others = self._waiting[image_id]
            others.discard(event)
            if not others:
                del self._waiting[image_id]

    def wake(self) -> None:
        """Let everybody look."""
        for events in self._waiting.values():
            for event in events:
                event.set()

    def _hear(self, changes: tuple[Change, ...]) -> None:
        for change in changes:
            image_id = change.key.removeprefix(RECORDS)
            for event in self._waiting.get(image_id, ()):
                event.set()
            if change.entry is None:
                for tell in self._deleted:
                    tell(image_id)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _follow(self, engine: EtcdKeyValue) -> None:
        while not self._closed.is_set():
            try:
                with EtcdWatch(engine, RECORDS, after_revision=FROM_NOW) as watch:
                    self._watch = watch
                    if self._closed.is_set():
                        return
                    for changes in watch.changes():
                        self._tell(self._hear, changes)
            except ConflictError:
                self._tell(self.wake)  # something was missed
            except MistifyError as err:
                log.warning("changes can't be watched: %s", err.message)
            self._closed.wait(RETRY_S)

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._closed.set()

    async def close(self) -> None:
        """Stop watching, and let everybody who waits look once more; idempotent."""
        self._closed.set()
        self.wake()
        if self._watch is not None:
            self._watch.close()
        if self._thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
