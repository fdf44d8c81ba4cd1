"""The contract of every Leases over a KeyValue. An engine runs it like this:

class TestMyLeases(LeasesContract):
    @pytest.fixture
    def store(self) -> Iterator[KeyValue]: ...

    @pytest.fixture
    def leases(self, store: KeyValue) -> Iterator[Leases]: ...
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from imaging.errors import BusyError, ConflictError, InvalidArgumentError, UnavailableError
from imaging.kv.base import KeyValue, Put
from imaging.kv.leases import Leases

TTL_S = 60.0
THREADS = 6


class LeasesContract:
    """Subclass and give ``store`` and ``leases`` fixtures."""

    def test_leases_satisfy_the_protocol(self, leases: Leases) -> None:
        assert isinstance(leases, Leases)

    def test_acquire_held_is_busy_and_names_the_holder(self, leases: Leases) -> None:
        with leases.acquire("work", ttl_s=TTL_S):
            with pytest.raises(BusyError) as caught:
                leases.acquire("work", ttl_s=TTL_S)
            assert caught.value.dependants == (leases.holder("work"),)
            leases.acquire("other work", ttl_s=TTL_S).release()

    def test_release_lets_the_next_one_in(self, leases: Leases) -> None:
        first = leases.acquire("work", ttl_s=TTL_S)
        first.check()
        first.release()
        first.release()
        assert first.is_lost
        with pytest.raises(ConflictError):
            first.check()
        assert leases.holder("work") is None
        leases.acquire("work", ttl_s=TTL_S).release()

    def test_fence_holds_in_transactions_during_its_turn_only(self, store: KeyValue, leases: Leases) -> None:
        first = leases.acquire("work", ttl_s=TTL_S)
        store.transact([Put("data", b"first")], [first.compare])
        store.transact([Put("data", b"first again")], [first.compare])
        first.release()
        for _ in range(2):  # while nobody holds it, and during another's turn
            with pytest.raises(ConflictError):
                store.transact([Put("data", b"zombie")], [first.compare])
            second = leases.acquire("work", ttl_s=TTL_S)
            with pytest.raises(ConflictError):
                store.transact([Put("data", b"zombie")], [first.compare])
            store.transact([Put("data", b"second")], [second.compare])
            second.release()
        entry = store.get("data")
        assert entry is not None
        assert entry.value == b"second"

    def test_threads_that_acquire_one_lease_exactly_one_has_it(self, leases: Leases) -> None:
        barrier = threading.Barrier(THREADS)

        def acquire(_: int) -> bool:
            barrier.wait(timeout=30)
            try:
                leases.acquire("prize", ttl_s=TTL_S)
            except BusyError:
                return False
            return True

        with ThreadPoolExecutor(THREADS) as pool:
            assert sorted(pool.map(acquire, range(THREADS))) == [False] * (THREADS - 1) + [True]

    @pytest.mark.parametrize("name", ["", "nul\0", "x" * 2000])
    def test_bad_name_is_refused(self, leases: Leases, name: str) -> None:
        with pytest.raises(InvalidArgumentError):
            leases.acquire(name, ttl_s=TTL_S)

    @pytest.mark.parametrize("ttl_s", [0.0, 1.0, -5.0, 1e9])
    def test_bad_time_is_refused(self, leases: Leases, ttl_s: float) -> None:
        with pytest.raises(InvalidArgumentError):
            leases.acquire("work", ttl_s=ttl_s)

    def test_close_releases_and_a_later_use_is_refused(self, store: KeyValue, leases: Leases) -> None:
        fence = leases.acquire("work", ttl_s=TTL_S)
        leases.close()
        leases.close()
        assert fence.is_lost
        assert list(store.list("leases/")) == []
        with pytest.raises(UnavailableError):
            leases.acquire("work", ttl_s=TTL_S)
