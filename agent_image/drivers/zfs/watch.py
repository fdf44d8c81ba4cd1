"""Keeps the index true to what others do to the pool: follows the pool's events, compares what has no event.

One thread reads events, one looks at what they name; both are ours and end with :meth:`Watch.stop`. Own changes are in the index
before their events arrive, so they cost nothing here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator

from agent_image.drivers.zfs import survey
from agent_image.drivers.zfs.command import ENVIRONMENT, program
from agent_image.drivers.zfs.events import EVERYTHING, MISSED, Event, Look, look_for, parse
from agent_image.drivers.zfs.index import PoolIndex, Reading
from agent_image.drivers.zfs.lzc import Lzc
from agent_image.drivers.zfs.sizes import DeviceSizes
from imaging.errors import MistifyError, NotFoundError
from imaging.names import DatasetName, PoolName, SnapshotName

TICK_S = 0.5
"""Events of half a second are looked at together: a storm of changes to one dataset costs one look."""
READ_PAUSE_S = 0.25
"""Events that come meanwhile wait in the pipe ..."""
READ_BYTES = 256 << 10
"""... which takes some 300 of them; after that they wait in the kernel, which says how many it had to drop."""
SIZES_INTERVAL_S = 2.0
"""Reading the sizes of 2,000 devices takes about a millisecond."""
COMPARE_INTERVAL_S = 300.0
"""Everything is compared now and then, should an event have been missed ..."""
COMPARE_SHARE_MAX = 0.02
"""... and takes at most this share of the time, however large the pool."""
RESTART_INTERVAL_S = 5.0
STOP_TIMEOUT_S = 10.0
CLOCK_SLACK_S = 2
"""Events carry whole seconds."""
GONE = frozenset({"sysevent.fs.zfs.pool_export", "sysevent.fs.zfs.pool_destroy"})
BACK = frozenset({"sysevent.fs.zfs.pool_import", "sysevent.fs.zfs.pool_create"})

log = logging.getLogger(__name__)


class Watch:
    """Fills the index at start and follows the pool from then on."""

    def __init__(self, lzc: Lzc, pool: PoolName, index: PoolIndex) -> None:
        self._lzc = lzc
        self._pool = pool
        self._index = index
        self._wake = threading.Condition()
        self._events: list[Event] = []
        self._stopping = threading.Event()
        self._follower: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._sizes = DeviceSizes(pool)
        self._left: set[DatasetName] = set()
        """Datasets whose last look was overtaken by a change of our own."""
        self._compared_s = self._compare_cost_s = self._sizes_read_s = 0.0
        self.is_pool_there = True

    def start(self) -> None:
        """Begin to follow, then read the whole pool, so that nothing falls between."""
        self._begin_s = int(time.time()) - CLOCK_SLACK_S
        self._follow()
        self._sizes.remember()
        self.compare()
        for target in (self._read_events, self._look_at_changes):
            thread = threading.Thread(target=target, name=f"zfs-watch-{self._pool}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End both threads and the follower."""
        self._stopping.set()
        with self._wake:
            self._wake.notify_all()
        self._end_follower()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Reading]:
        """A look whose result is put into the index; what it could not put in is looked at again at the next turn."""
        with self._index.reading() as reading:
            yield reading
        self._left |= reading.left

    def compare(self) -> None:
        """Read the whole pool into the index."""
        begin_s = time.monotonic()
        with self._reading() as reading:
            datasets, snapshots = survey.everything(self._lzc, self._pool.root)
            self._index.apply_all(reading, datasets, snapshots)
        self._compared_s = time.monotonic()
        self._compare_cost_s = self._compared_s - begin_s

    # -- following events --------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        command = [program("zpool"), "events", "-f", "-H", "-v", str(self._pool)]
        self._follower = subprocess.Popen(  # noqa: S603 - absolute path, a parsed pool name
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            pipesize=READ_BYTES,
        )

    def _end_follower(self) -> None:
        follower = self._follower
        if follower is not None:
            follower.kill()
            follower.wait(STOP_TIMEOUT_S)

    def _read_events(self) -> None:
        while not self._stopping.is_set():
            follower = self._follower
            assert follower is not None
            assert follower.stdout is not None
            with follower.stdout as pipe:
                for event in parse(self._pieces(pipe.fileno())):
                    self._take(event)
            follower.wait()
            if self._stopping.wait(RESTART_INTERVAL_S):
                return
            log.warning("zpool_events_restarted", extra={"pool": str(self._pool), "status": follower.returncode})
            self._follow()
            self._take(MISSED)

    def _pieces(self, fd: int) -> Iterator[bytes]:
        """What comes, some events at a time: waking up for each would slow down the calls that cause them."""
        while data := os.read(fd, READ_BYTES):
            yield data
            self._stopping.wait(READ_PAUSE_S)

    def _take(self, event: Event) -> None:
        if event.time_s < self._begin_s and event != MISSED:
            return
        if event.kind in GONE:
            self.is_pool_there = False
        with self._wake:
            self._events.append(event)
            self._wake.notify_all()

    # -- looking -----------------------------------------------------------------------------------------------------

    def _look_at_changes(self) -> None:
        while not self._stopping.is_set():
            with self._wake:
                if not self._events:
                    self._wake.wait(TICK_S)
            self._stopping.wait(TICK_S)
            with self._wake:
                events, self._events = self._events, []
            try:
                self._work(events)
            except MistifyError:
                log.warning("zfs_index_refresh_failed", extra={"pool": str(self._pool)}, exc_info=True)
                self._compared_s = 0.0

    def _work(self, events: list[Event]) -> None:
        """Events of our own calls come before the calls return, so they are judged only now, when the index has the outcome."""
        if not self.is_pool_there and not self._lzc.is_imported():
            return
        left, self._left = self._left, set()
        looks = [self._look_for(event) for event in events] + self._changed_sizes()
        if not self.is_pool_there or any(look.everything for look in looks) or self._is_compare_due():
            self.compare()
            self.is_pool_there = True
            return
        for name, target in [move for look in looks for move in look.moves]:
            self._look_at_move(name, target)
        for tree in {name for look in looks for name in look.trees}:
            self._look_at_tree(tree)
        for dataset in {name for look in looks for name in look.datasets}:
            self._look_at_dataset(dataset)
        for snapshot in {name for look in looks for name in look.snapshots}:
            self._look_at_snapshot(snapshot)
        for dataset in left:
            self._look_at_whole(dataset)

    def _look_for(self, event: Event) -> Look:
        return EVERYTHING if event.kind in BACK else look_for(event, self._index)

    def _is_compare_due(self) -> bool:
        interval_s = max(COMPARE_INTERVAL_S, self._compare_cost_s / COMPARE_SHARE_MAX)
        return time.monotonic() - self._compared_s > interval_s

    def _look_at_dataset(self, name: DatasetName) -> None:
        with self._reading() as reading:
            self._index.apply(reading, name, survey.find_dataset(self._lzc, name))

    def _look_at_whole(self, name: DatasetName) -> None:
        """A dataset with its snapshots."""
        with self._reading() as reading:
            info = survey.find_dataset(self._lzc, name)
            self._index.apply(reading, name, info)
            if info is not None:
                self._index.apply_snapshots(reading, name, survey.snapshots(self._lzc, name))

    def _look_at_snapshot(self, name: SnapshotName) -> None:
        with self._reading() as reading:
            self._index.apply_snapshot(reading, name, survey.find_snapshot(self._lzc, name))

    def _look_at_move(self, name: DatasetName, target: DatasetName) -> None:
        """Somebody renamed a dataset: what is below and the origins of its clones follow, if it is still as the event says."""
        known = self._index.find(name)
        with self._reading() as reading:
            old, new = survey.find_dataset(self._lzc, name), survey.find_dataset(self._lzc, target)
            is_move = known is not None and old is None and new is not None and new.guid == known.guid
            if is_move and not reading.is_outdated(name) and not reading.is_outdated(target):
                self._index.rename(name, target)
                return
        self._look_at_dataset(name)
        self._look_at_tree(target)

    def _look_at_tree(self, name: DatasetName) -> None:
        with self._reading() as reading:
            try:
                datasets, snapshots = survey.everything(self._lzc, name)
            except NotFoundError:
                self._index.apply(reading, name, None)
                return
            for info in datasets:
                self._index.apply(reading, info.name, info)
                own = [entry for entry in snapshots if entry.name.dataset == info.name]
                self._index.apply_snapshots(reading, info.name, own)

    def _changed_sizes(self) -> list[Look]:
        """A new ``volsize`` has no event, but shows in the size of the device."""
        if time.monotonic() - self._sizes_read_s < SIZES_INTERVAL_S:
            return []
        found = self._sizes.differing(self._index)
        self._sizes_read_s = time.monotonic()
        return [Look(datasets=(name,)) for name in found]
