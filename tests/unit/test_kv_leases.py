"""Leases over the embedded store: the contract, and what a restart does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imaging.errors import ConflictError
from imaging.kv.base import KeyValue, Put
from imaging.kv.leases import EmbeddedLeases, Leases
from imaging.kv.sqlite import SqliteKeyValue
from tests.contracts.leases import TTL_S, LeasesContract


class TestEmbeddedLeases(LeasesContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[KeyValue]:
        with SqliteKeyValue(tmp_path / "records.db") as store:
            yield store

    @pytest.fixture
    def leases(self, store: KeyValue) -> Iterator[Leases]:
        leases = EmbeddedLeases(store)
        yield leases
        leases.close()

    def test_lease_of_an_earlier_process_has_ended_and_its_fence_does_not_hold(self, store: KeyValue) -> None:
        old = EmbeddedLeases(store).acquire("work", ttl_s=TTL_S)
        EmbeddedLeases(store).acquire("work", ttl_s=TTL_S)
        with pytest.raises(ConflictError):
            store.transact([Put("data", b"")], [old.compare])
