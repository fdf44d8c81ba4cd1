"""The contract of every KeyValue. An engine runs it like this:

    class TestMyEngine(KeyValueContract):
        @pytest.fixture
        def make(self, tmp_path: Path) -> Callable[[], KeyValue]:
            return lambda: MyEngine(tmp_path / "store")

``make`` opens the same store each time; the suite closes one handle before it opens the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from imaging.errors import ConflictError, InvalidArgumentError, UnavailableError
from imaging.kv.base import (
    ABSENT,
    KEY_MAX_BYTES,
    OPERATIONS_MAX,
    VALUE_MAX_BYTES,
    Compare,
    Delete,
    Entry,
    KeyValue,
    Operation,
    Put,
    delete,
    put,
)

Make = Callable[[], KeyValue]

THREADS = 8
ROUNDS = 20

UNICODE_KEYS = ["a", "a/", "a/b", "ä", "z", "ß", "日本", "\ud7ff", "\ue000", "\uffff", "\U0001f600", "\U0010ffff"]
BAD_KEYS = ["", "nul\0inside", "\0", "x" * (KEY_MAX_BYTES + 1), "ä" * KEY_MAX_BYTES, "lone\ud800surrogate"]


class KeyValueContract:
    """Subclass and give a ``make`` fixture."""

    @pytest.fixture
    def store(self, make: Make) -> Iterator[KeyValue]:
        store = make()
        yield store
        store.close()

    # -- one entry -------------------------------------------------------------------------------------------------------

    def test_store_satisfies_the_protocol(self, store: KeyValue) -> None:
        assert isinstance(store, KeyValue)

    def test_get_absent_returns_none(self, store: KeyValue) -> None:
        assert store.get("nothing") is None

    @pytest.mark.parametrize("value", [b"", b"\0", b"plain", bytes(range(256)), b"\x80\x04N."])
    def test_put_any_bytes_are_returned_as_they_were(self, store: KeyValue, value: bytes) -> None:
        revision = put(store, "key", value)
        assert store.get("key") == Entry("key", value, revision)

    def test_put_again_replaces_with_a_greater_revision(self, store: KeyValue) -> None:
        first = put(store, "key", b"1")
        second = put(store, "key", b"2")
        assert 0 < first < second
        assert store.get("key") == Entry("key", b"2", second)

    def test_put_after_delete_revision_still_grows(self, store: KeyValue) -> None:
        first = put(store, "key", b"1")
        delete(store, "key")
        assert store.get("key") is None
        assert put(store, "key", b"1") > first

    def test_delete_absent_is_fine(self, store: KeyValue) -> None:
        delete(store, "never there")
        assert list(store.list()) == []

    # -- limits ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", BAD_KEYS, ids=range(len(BAD_KEYS)))
    def test_bad_key_is_refused_everywhere_and_changes_nothing(self, store: KeyValue, key: str) -> None:
        for call in (
            lambda: store.get(key),
            lambda: put(store, key, b""),
            lambda: delete(store, key),
            lambda: store.transact([Put("good", b"")], [Compare(key, ABSENT)]),
            lambda: store.transact([Put("good", b""), Put(key, b"")]),
        ):
            with pytest.raises(InvalidArgumentError):
                call()
        assert list(store.list()) == []

    def test_longest_key_and_largest_value_are_taken(self, store: KeyValue) -> None:
        key, value = "ä" * (KEY_MAX_BYTES // 2), b"\xff" * VALUE_MAX_BYTES
        revision = put(store, key, value)
        assert store.get(key) == Entry(key, value, revision)

    def test_larger_value_is_refused(self, store: KeyValue) -> None:
        with pytest.raises(InvalidArgumentError):
            put(store, "key", bytes(VALUE_MAX_BYTES + 1))
        assert store.get("key") is None

    def test_full_transaction_is_taken_and_one_more_refused(self, store: KeyValue) -> None:
        operations: list[Operation] = [Put(f"k{number:03d}", b"") for number in range(OPERATIONS_MAX)]
        store.transact(operations)
        assert len(store.list()) == OPERATIONS_MAX
        with pytest.raises(InvalidArgumentError):
            store.transact([*operations, Put("one more", b"")])
        assert len(store.list()) == OPERATIONS_MAX

    def test_one_key_changed_twice_in_a_transaction_is_refused(self, store: KeyValue) -> None:
        with pytest.raises(InvalidArgumentError):
            store.transact([Put("key", b"1"), Delete("key")])
        assert store.get("key") is None

    def test_negative_limit_is_refused(self, store: KeyValue) -> None:
        with pytest.raises(InvalidArgumentError):
            store.list(limit=-1)

    # -- listing ---------------------------------------------------------------------------------------------------------

    def test_list_is_ordered_bytewise(self, store: KeyValue) -> None:
        for key in reversed(UNICODE_KEYS):
            put(store, key, key.encode())
        listed = store.list()
        assert [entry.key for entry in listed] == sorted(UNICODE_KEYS, key=str.encode)
        assert all(entry.value == entry.key.encode() for entry in listed)

    def test_list_prefix_is_literal(self, store: KeyValue) -> None:
        for key in ("a", "a%", "a%b", "a_b", "ab", "a\U0010ffff", "a\U0010ffffx", "b", "A"):
            put(store, key, b"")
        assert [entry.key for entry in store.list("a%")] == ["a%", "a%b"]
        assert [entry.key for entry in store.list("a_")] == ["a_b"]
        assert [entry.key for entry in store.list("a\U0010ffff")] == ["a\U0010ffff", "a\U0010ffffx"]
        assert [entry.key for entry in store.list("b")] == ["b"]
        assert list(store.list("c")) == []

    def test_list_pages_see_every_entry_once(self, store: KeyValue) -> None:
        keys = [f"page/{number:02d}" for number in range(25)]
        for key in keys:
            put(store, key, b"")
        put(store, "other", b"")
        seen, after = [], ""
        while page := store.list("page/", after=after, limit=4):
            assert len(page) <= 4
            seen += [entry.key for entry in page]
            after = seen[-1]
        assert seen == keys

    def test_list_after_needs_no_existing_key_and_may_lie_outside_the_prefix(self, store: KeyValue) -> None:
        for key in ("p/a", "p/c"):
            put(store, key, b"")
        assert [entry.key for entry in store.list("p/", after="p/b")] == ["p/c"]
        assert [entry.key for entry in store.list("p/", after="a")] == ["p/a", "p/c"]
        assert list(store.list("p/", after="q")) == []
        assert list(store.list("p/", limit=0)) == []

    # -- transactions ----------------------------------------------------------------------------------------------------

    def test_transaction_gives_its_puts_one_revision(self, store: KeyValue) -> None:
        put(store, "gone", b"")
        revision = store.transact([Put("a", b"1"), Delete("gone"), Put("b", b"2")])
        assert list(store.list()) == [Entry("a", b"1", revision), Entry("b", b"2", revision)]

    def test_transaction_compare_holds_applies(self, store: KeyValue) -> None:
        first = put(store, "a", b"1", expect=ABSENT)
        second = put(store, "a", b"2", expect=first)
        delete(store, "a", expect=second)
        assert store.get("a") is None

    @pytest.mark.parametrize("shift", [-1, 1, None])
    def test_transaction_compare_fails_changes_nothing(self, store: KeyValue, shift: int | None) -> None:
        revision = put(store, "a", b"1")
        put(store, "b", b"1")
        before = list(store.list())
        wrong = Compare("a", ABSENT if shift is None else revision + shift)
        with pytest.raises(ConflictError):
            store.transact([Put("a", b"2"), Delete("b"), Put("c", b"2")], [wrong])
        with pytest.raises(ConflictError):
            store.transact([Put("c", b"")], [Compare("a", revision), Compare("absent", revision)])
        assert list(store.list()) == before

    def test_transaction_compare_on_an_untouched_key_guards_the_others(self, store: KeyValue) -> None:
        guard = put(store, "guard", b"")
        store.transact([Put("a", b"1")], [Compare("guard", guard)])
        put(store, "guard", b"")
        with pytest.raises(ConflictError):
            store.transact([Put("a", b"2")], [Compare("guard", guard)])
        assert store.transact([], [Compare("nothing", ABSENT)]) >= guard

    # -- threads ---------------------------------------------------------------------------------------------------------

    def test_threads_that_compare_and_swap_lose_no_update(self, store: KeyValue) -> None:
        put(store, "counter", b"0")

        def increment(_: int) -> int:
            lost = 0
            for _ in range(ROUNDS):
                while True:
                    entry = store.get("counter")
                    assert entry is not None
                    try:
                        put(store, "counter", b"%d" % (int(entry.value) + 1), expect=entry.revision)
                        break
                    except ConflictError:
                        lost += 1
            return lost

        with ThreadPoolExecutor(THREADS) as pool:
            lost = sum(pool.map(increment, range(THREADS)))
        entry = store.get("counter")
        assert entry is not None
        assert int(entry.value) == THREADS * ROUNDS, f"{lost} tries were lost"

    def test_threads_that_create_one_key_exactly_one_wins(self, store: KeyValue) -> None:
        barrier = threading.Barrier(THREADS)

        def create(number: int) -> bool:
            barrier.wait(timeout=30)
            try:
                put(store, "prize", b"%d" % number, expect=ABSENT)
            except ConflictError:
                return False
            return True

        with ThreadPoolExecutor(THREADS) as pool:
            won = list(pool.map(create, range(THREADS)))
        entry = store.get("prize")
        assert entry is not None
        assert [number for number, winner in enumerate(won) if winner] == [int(entry.value)]

    def test_reader_never_sees_half_a_transaction(self, store: KeyValue) -> None:
        keys = [f"k{number}" for number in range(10)]
        store.transact([Put(key, b"0") for key in keys])
        done = threading.Event()

        def write() -> None:
            for number in range(1, 60):
                store.transact([Put(key, b"%d" % number) for key in keys])
            done.set()

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            looks = 0
            while not done.is_set() and not writing.done():
                entries = store.list("k")
                assert len({(entry.value, entry.revision) for entry in entries}) == 1
                looks += 1
            writing.result()
        assert looks > 0
        assert {entry.value for entry in store.list("k")} == {b"59"}

    def test_threads_get_distinct_revisions(self, store: KeyValue) -> None:
        def write(number: int) -> list[int]:
            return [put(store, f"{number}/{count}", b"") for count in range(ROUNDS)]

        with ThreadPoolExecutor(THREADS) as pool:
            revisions = [revision for some in pool.map(write, range(THREADS)) for revision in some]
        assert len(set(revisions)) == THREADS * ROUNDS
        assert {entry.revision for entry in store.list()} == set(revisions)

    # -- life ------------------------------------------------------------------------------------------------------------

    def test_reopened_store_has_everything_and_revisions_go_on(self, make: Make) -> None:
        store = make()
        put(store, "kept", b"value")
        last = put(store, "deleted", b"")
        delete(store, "deleted")
        entries = list(store.list())
        store.close()
        store = make()
        try:
            assert list(store.list()) == entries
            assert put(store, "new", b"") > last
        finally:
            store.close()

    def test_close_is_idempotent_and_a_later_use_is_refused(self, make: Make) -> None:
        store = make()
        put(store, "key", b"")
        store.close()
        store.close()
        for call in (lambda: store.get("key"), store.list, lambda: put(store, "key", b"2")):
            with pytest.raises(UnavailableError):
                call()

    def test_close_under_fire_every_acknowledged_write_is_kept(self, make: Make) -> None:
        store = make()
        acknowledged: list[str] = []

        def write(number: int) -> None:
            for count in range(1000):
                key = f"{number}/{count}"
                try:
                    put(store, key, b"")
                except UnavailableError:
                    return
                acknowledged.append(key)
                started.set()

        started = threading.Event()
        with ThreadPoolExecutor(4) as pool:
            writing = [pool.submit(write, number) for number in range(4)]
            started.wait(timeout=30)
            store.close()
            for future in writing:
                future.result()
        store = make()
        try:
            assert {entry.key for entry in store.list()} == set(acknowledged)
        finally:
            store.close()

    # -- against a model -------------------------------------------------------------------------------------------------

    def test_any_sequence_of_calls_behaves_as_a_dictionary(self, make: Make) -> None:
        store = make()
        namespaces = iter(range(1_000_000))
        try:
            machine: Any = lambda: _Machine(store, f"m{next(namespaces)}/")  # noqa: E731
            run_state_machine_as_test(
                machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
            )
        finally:
            store.close()


KEYS = st.text(alphabet="ab/é\U0010ffff", min_size=0, max_size=4)


class _Machine(RuleBasedStateMachine):
    """Random calls on a namespace of the store and on a dictionary must agree."""

    def __init__(self, store: KeyValue, namespace: str) -> None:
        super().__init__()
        self.store = store
        self.namespace = namespace
        self.model: dict[str, tuple[bytes, int]] = {}
        self.last = 0

    def full(self, key: str) -> str:
        return self.namespace + "k" + key

    def applied(self, revision: int) -> int:
        assert revision > self.last
        self.last = revision
        return revision

    @rule(key=KEYS, value=st.binary(max_size=8))
    def put(self, key: str, value: bytes) -> None:
        self.model[self.full(key)] = (value, self.applied(put(self.store, self.full(key), value)))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        delete(self.store, self.full(key))
        self.model.pop(self.full(key), None)

    @rule(keys=st.sets(KEYS, min_size=1, max_size=4), value=st.binary(max_size=8), right=st.booleans(), data=st.data())
    def swap(self, keys: set[str], value: bytes, right: bool, data: st.DataObject) -> None:  # noqa: FBT001
        guard = self.full(data.draw(KEYS))
        revision = self.model.get(guard, (b"", ABSENT))[1]
        operations: list[Operation] = [Put(self.full(key), value) for key in keys]
        if right:
            new = self.applied(self.store.transact(operations, [Compare(guard, revision)]))
            self.model.update({self.full(key): (value, new) for key in keys})
        else:
            with pytest.raises(ConflictError):
                self.store.transact(operations, [Compare(guard, revision + 1)])

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        entry, known = self.store.get(self.full(key)), self.model.get(self.full(key))
        assert (None if entry is None else (entry.value, entry.revision)) == known

    @precondition(lambda self: self.model)
    @rule(prefix=KEYS, after=KEYS, limit=st.none() | st.integers(0, 3))
    def page(self, prefix: str, after: str, limit: int | None) -> None:
        found = self.store.list(self.full(prefix), after=self.full(after), limit=limit)
        expected = sorted(
            (k for k in self.model if k.startswith(self.full(prefix)) and k.encode() > self.full(after).encode()),
            key=str.encode,
        )
        assert [entry.key for entry in found] == expected[:limit]

    @invariant()
    def same_entries(self) -> None:
        found = {entry.key: (entry.value, entry.revision) for entry in self.store.list(self.namespace)}
        assert found == self.model
