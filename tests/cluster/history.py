"""Was what clients saw possible? Exact: each record's operations, in some order that respects time, must be explained by one record.

A *key* is a source (or one upload). At any moment it has no record, or one, with an id that never comes back after it was deleted.
A record begins unfinished, becomes complete once, by itself, and stays so. An operation takes effect at one instant between its call
and its answer; one that got no answer takes effect at any later instant, or never.

The search is Wing and Gong's: take any operation nobody had to precede, apply it, go on; remember what was tried (the set of
operations taken and the record). Operations that change nothing are taken at once: they exclude nothing. Exponential in what
overlaps, so histories are kept short.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

NEVER = math.inf

STATES_MAX = 2_000_000
"""More than any history of our length ever needed; beyond it the test says that it can't tell."""


class Kind(Enum):
    """What was asked for."""

    CREATE = "create"
    READ = "read"
    DELETE = "delete"


class Seen(Enum):
    """What the answer said about the record."""

    ABSENT = "absent"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Operation:
    """One call: ``image_id`` is what was asked about, or the answer's; "" where the answer was lost."""

    kind: Kind
    begun: float
    ended: float = NEVER
    image_id: str = ""
    seen: Seen = Seen.NOTHING

    @property
    def is_answered(self) -> bool:
        """Whether it must have happened, by then."""
        return self.ended != NEVER


class Record(NamedTuple):
    """The record of a key. ``image_id``: None: there is none; "": there is one that nobody has seen yet."""

    image_id: str | None = None
    is_complete: bool = False
    used: frozenset[str] = frozenset()


def _present(record: Record, image_id: str) -> Record | None:
    """The record, if it may be this one."""
    if record.image_id == image_id:
        return record
    if record.image_id == "" and image_id not in record.used:
        return record._replace(image_id=image_id, used=record.used | {image_id})
    return None


def _seen(record: Record | None, seen: Seen) -> Record | None:
    if record is None or seen is Seen.NOTHING:
        return record
    if seen is Seen.COMPLETE:
        return record._replace(is_complete=True)
    return None if record.is_complete else record


def apply(record: Record, operation: Operation) -> Record | None:
    """The record after the operation; None if it could not have been answered so."""
    image_id = operation.image_id
    if operation.kind is Kind.CREATE:
        return _create(record, operation)
    if operation.seen is Seen.ABSENT:
        return None if record.image_id == image_id else record
    there = _present(record, image_id)
    if operation.kind is Kind.READ:
        return _seen(there, operation.seen)
    return None if there is None else Record(None, is_complete=False, used=there.used)


def _create(record: Record, operation: Operation) -> Record | None:
    if record.image_id is None:
        if operation.image_id in record.used:
            return None
        used = record.used | ({operation.image_id} if operation.image_id else set())
        return _seen(Record(operation.image_id, is_complete=False, used=used), operation.seen)
    if not operation.image_id:
        return record
    return _seen(_present(record, operation.image_id), operation.seen)


def is_possible(operations: Sequence[Operation]) -> bool:
    """Whether the operations of one key have an order that explains them; AssertionError if that can't be found out."""
    ordered = sorted(operations, key=lambda operation: operation.begun)
    required = sum(1 << number for number, operation in enumerate(ordered) if operation.is_answered)
    todo, tried = [(0, Record())], {(0, Record())}
    while todo:
        taken, record = todo.pop()
        if taken & required == required:
            return True
        for step in _steps(ordered, taken, record):
            if step not in tried:
                tried.add(step)
                todo.append(step)
        assert len(tried) < STATES_MAX, f"cannot tell: {len(ordered)} operations overlap too much"
    return False


def _steps(ordered: Sequence[Operation], taken: int, record: Record) -> list[tuple[int, Record]]:
    """What may come next; only one step if it changes nothing."""
    open_ = [(number, each) for number, each in enumerate(ordered) if not taken >> number & 1]
    limit = min((each.ended for _, each in open_), default=NEVER)
    steps = []
    for number, operation in open_:
        if operation.begun > limit:
            break
        after = apply(record, operation)
        if after == record and operation.is_answered:
            return [(taken | 1 << number, record)]
        if after is not None and after != record:
            steps.append((taken | 1 << number, after))
    return steps


@dataclass
class History:
    """What all clients did, by key. Threads may share it."""

    operations: dict[str, list[Operation]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @staticmethod
    def now() -> float:
        """The one clock all operations are measured by."""
        return time.monotonic()

    def add(self, key: str, operation: Operation) -> None:
        """Note an operation that has ended, or whose answer was lost."""
        with self._lock:
            self.operations.setdefault(key, []).append(operation)

    def length(self, key: str) -> int:
        """How many operations a key has."""
        with self._lock:
            return len(self.operations.get(key, ()))

    def impossible(self) -> Mapping[str, Sequence[Operation]]:
        """The keys whose operations no order explains."""
        return {key: operations for key, operations in self.operations.items() if not is_possible(operations)}
