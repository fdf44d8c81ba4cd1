"""What was written between snapshots: asked from ZFS once, as two snapshots never change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from imaging.names import SnapshotName

ENTRIES_MAX = 200_000
"""Some 40 MiB; then the memory begins anew, which costs one look at each snapshot that is asked for."""


class Span(NamedTuple):
    """Two snapshots by guid, 0 where there is none before."""

    guid: int
    guid_before: int


class WrittenMemory:
    """Remembers sizes by guid: a destroyed predecessor makes another span, a rename or promotion the same. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Span, int] = {}

    def of(
        self, spans: Mapping[SnapshotName, Span], ask: Callable[[Sequence[SnapshotName]], Mapping[SnapshotName, int]]
    ) -> dict[SnapshotName, int]:
        """The sizes; ``ask`` is called for what is not known, and leaves out what is gone."""
        with self._lock:
            found = {name: self._known[span] for name, span in spans.items() if span in self._known}
        unknown = [name for name in spans if name not in found]
        if unknown:
            asked = ask(unknown)
            with self._lock:
                if len(self._known) + len(asked) > ENTRIES_MAX:
                    self._known.clear()
                self._known.update((spans[name], size_bytes) for name, size_bytes in asked.items())
            found.update(asked)
        return found

    def forget(self) -> None:
        """Ask again. Snapshots whose names are not of our grammar are nobody's predecessors here, so now and then this is right."""
        with self._lock:
            self._known.clear()
