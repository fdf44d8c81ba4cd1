"""The checker is only worth what it catches."""

from __future__ import annotations

import random

import pytest

from tests.cluster.history import NEVER, History, Kind, Operation, Record, Seen, apply, is_possible


def create(begun: float, ended: float, image_id: str = "", seen: Seen = Seen.UNFINISHED) -> Operation:
    return Operation(Kind.CREATE, begun, ended, image_id, seen)


def read(begun: float, ended: float, image_id: str, seen: Seen) -> Operation:
    return Operation(Kind.READ, begun, ended, image_id, seen)


def delete(begun: float, ended: float, image_id: str, seen: Seen = Seen.NOTHING) -> Operation:
    return Operation(Kind.DELETE, begun, ended, image_id, seen)


LOST = Operation(Kind.CREATE, 0, NEVER)

POSSIBLE = {
    "nothing": [],
    "created-read-deleted": [
        create(0, 1, "x"),
        read(2, 3, "x", Seen.UNFINISHED),
        read(4, 5, "x", Seen.COMPLETE),
        delete(6, 7, "x"),
        read(8, 9, "x", Seen.ABSENT),
    ],
    "two-creates-one-record": [create(0, 5, "x"), create(0, 5, "x")],
    "again-after-deletion": [create(0, 1, "x"), delete(2, 3, "x"), create(4, 5, "y")],
    "read-overlapping-the-deletion-both-ways": [
        create(0, 1, "x"),
        delete(2, 9, "x"),
        read(3, 4, "x", Seen.UNFINISHED),
        read(5, 6, "x", Seen.ABSENT),
    ],
    "lost-create-found-later": [LOST, create(5, 6, "x"), delete(7, 8, "x")],
    "lost-create-that-never-was": [LOST, delete(5, 6, "x", Seen.ABSENT)],
    "lost-delete-happened": [create(0, 1, "x"), delete(2, NEVER, "x"), read(8, 9, "x", Seen.ABSENT)],
    "lost-delete-happened-late": [
        create(0, 1, "x"),
        delete(2, NEVER, "x"),
        read(3, 4, "x", Seen.UNFINISHED),
        create(5, 6, "y"),
    ],
    "lost-delete-never-happened": [create(0, 1, "x"), delete(2, NEVER, "x"), read(8, 9, "x", Seen.COMPLETE)],
    "two-deletes-at-once": [create(0, 1, "x"), delete(2, 9, "x"), delete(2, 9, "x", Seen.ABSENT)],
}

IMPOSSIBLE = {
    "lost-record": [create(0, 1, "x"), read(2, 3, "x", Seen.ABSENT)],
    "two-records-at-once": [create(0, 1, "x"), create(2, 3, "y")],
    "two-records-at-once-overlapping": [create(0, 5, "x"), create(0, 5, "y"), read(6, 7, "x", Seen.UNFINISHED)],
    "back-after-deletion": [create(0, 1, "x"), delete(2, 3, "x"), read(4, 5, "x", Seen.COMPLETE)],
    "same-id-twice": [create(0, 1, "x"), delete(2, 3, "x"), create(4, 5, "x")],
    "deleted-twice": [create(0, 1, "x"), delete(2, 3, "x"), delete(4, 5, "x")],
    "deleted-twice-at-once": [create(0, 1, "x"), delete(2, 9, "x"), delete(2, 9, "x")],
    "complete-then-not": [
        create(0, 1, "x"),
        read(2, 3, "x", Seen.COMPLETE),
        read(4, 5, "x", Seen.UNFINISHED),
    ],
    "stale-read-after-a-newer-one": [
        create(0, 1, "x"),
        delete(2, 9, "x"),
        read(3, 4, "x", Seen.ABSENT),
        read(5, 6, "x", Seen.UNFINISHED),
    ],
    "never-created": [read(0, 1, "x", Seen.COMPLETE)],
    "one-lost-create-made-two": [LOST, read(5, 6, "x", Seen.UNFINISHED), read(7, 8, "y", Seen.UNFINISHED)],
    "lost-delete-took-a-later-record": [
        create(0, 1, "x"),
        delete(2, NEVER, "x"),
        create(3, 4, "y"),
        read(5, 6, "y", Seen.ABSENT),
    ],
    "deletion-of-what-was-there-refused": [create(0, 1, "x"), delete(2, 3, "x", Seen.ABSENT)],
    "took-effect-before-it-was-asked": [read(0, 1, "x", Seen.UNFINISHED), create(2, 3, "x")],
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_history_that_a_record_explains_is_possible(name: str) -> None:
    assert is_possible(POSSIBLE[name])


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_history_that_no_record_explains_is_caught(name: str) -> None:
    assert not is_possible(IMPOSSIBLE[name])


def test_history_names_the_keys_that_are_wrong() -> None:
    history = History({"good": list(POSSIBLE["created-read-deleted"]), "bad": list(IMPOSSIBLE["lost-record"])})
    assert set(history.impossible()) == {"bad"}


def _random_history(chance: random.Random, length: int) -> list[Operation]:
    """What clients of a real record see: each operation takes effect at one instant inside a random interval."""
    record, operations, number = Record(), [], 0
    for instant in range(length):
        begun, ended = instant - chance.uniform(0, 4), instant + chance.uniform(0, 4)
        known = [*record.used, record.image_id or "none"]
        kind = chance.choice(list(Kind))
        if kind is Kind.CREATE:
            number += 1
            operation = create(begun, ended, record.image_id or f"id{number}", Seen.NOTHING)
        else:
            asked = chance.choice(known)
            there = asked == record.image_id
            seen = (Seen.NOTHING if kind is Kind.DELETE else Seen.UNFINISHED) if there else Seen.ABSENT
            operation = Operation(kind, begun, ended, asked, seen)
        after = apply(record, operation)
        assert after is not None
        record = after
        lost = operation.kind is not Kind.READ and chance.random() < 0.15
        operations.append(Operation(operation.kind, begun, NEVER, operation.image_id) if lost else operation)
    return operations


@pytest.mark.parametrize("seed", range(40))
def test_history_of_a_real_record_is_possible(seed: int) -> None:
    assert is_possible(_random_history(random.Random(seed), 40)), f"seed {seed}"


@pytest.mark.parametrize("seed", range(40))
def test_history_of_a_real_record_with_one_lie_at_its_end_is_caught(seed: int) -> None:
    operations = _random_history(random.Random(seed), 20)
    begun = 1000.0
    last = create(begun, begun + 1, "new")
    lie = read(begun + 2, begun + 3, "new", Seen.ABSENT)
    assert not is_possible([*operations, last, lie]), f"seed {seed}"
