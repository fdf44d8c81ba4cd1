"""A real cluster that loses nodes, its leader, its quorum: what the store promises then. Also leases and watches on it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from demo.servers.etcd import EtcdCluster, EtcdNode, etcd_cluster
from imaging.errors import BusyError, ConflictError, UnavailableError
from imaging.kv.base import ABSENT, Compare, Delete, Entry, KeyValue, Put, put
from imaging.kv.etcd import PAGE_ENTRIES, EtcdKeyValue
from imaging.kv.etcd_client import EtcdSettings, UncertainError
from imaging.kv.etcd_leases import EtcdLeases
from imaging.kv.etcd_watch import Change, EtcdWatch
from imaging.kv.leases import TTL_MIN_S, Leases
from tests.contracts.leases import TTL_S, LeasesContract
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("etcd")

_names = itertools.count()

WRITERS = 4


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: EtcdCluster) -> Iterator[EtcdCluster]:
    """Healthy before and after each test."""
    yield shared
    shared.heal()


@pytest.fixture
def settings(cluster: EtcdCluster) -> EtcdSettings:
    return EtcdSettings(cluster.endpoints, prefix=f"/fault{next(_names)}/", read_timeout_s=2.0, write_timeout_s=4.0)


@pytest.fixture
def store(settings: EtcdSettings) -> Iterator[EtcdKeyValue]:
    with EtcdKeyValue(settings) as store:
        yield store


def _eventually_put(store: KeyValue, key: str, value: bytes) -> None:
    """Put as a client would that is told to try again."""

    def done() -> bool:
        try:
            put(store, key, value)
        except UnavailableError:
            return False
        return True

    wait_until(done, f"a put of {key}", timeout_s=120.0)


def _victim(cluster: EtcdCluster, which: str) -> EtcdNode:
    leader = wait_until(cluster.leader, "a leader", timeout_s=60.0)
    assert leader is not None
    return leader if which == "leader" else cluster.followers()[0]


@pytest.mark.parametrize("which", ["leader", "follower"])
@pytest.mark.parametrize("blow", ["kill", "pause"])
def test_node_lost_counters_lose_and_double_nothing(
    cluster: EtcdCluster, store: EtcdKeyValue, which: str, blow: str
) -> None:
    """Compare-and-swap counters, each with one writer: every success counts once, also those whose answer got lost."""
    stop = threading.Event()
    done = [0] * WRITERS

    def count(number: int) -> list[int]:
        """The values the counter may have at the end."""
        key, value, revision = f"counter{number}", 0, store.transact([Put(f"counter{number}", b"0")])
        while not stop.is_set():
            try:
                revision = put(store, key, b"%d" % (value + 1), expect=revision)
                value += 1
                done[number] += 1
            except UnavailableError:
                entry = wait_until(lambda: _find(store, key), "a read", timeout_s=120.0)
                assert entry is not None
                assert int(entry.value) in {value, value + 1}
                value, revision = int(entry.value), entry.revision
        return [value]

    def all_moved(by: int) -> Callable[[], bool]:
        before = list(done)
        return lambda: all(now >= was + by for now, was in zip(done, before, strict=True))

    with ThreadPoolExecutor(WRITERS) as pool:
        counting = [pool.submit(count, number) for number in range(WRITERS)]
        try:
            wait_until(all_moved(3), "counters before the blow", timeout_s=120.0)
            getattr(_victim(cluster, which).process, blow)()
            wait_until(all_moved(3), "counters after the blow", timeout_s=120.0)
            cluster.heal()
            wait_until(all_moved(3), "counters after the return", timeout_s=120.0)
        finally:
            stop.set()
        finals = [future.result(timeout=120) for future in counting]
    for number, final in enumerate(finals):
        entry = store.get(f"counter{number}")
        assert entry is not None
        assert int(entry.value) in final


def _find(store: KeyValue, key: str) -> Entry | None:
    try:
        return store.get(key)
    except UnavailableError:
        return None


@pytest.mark.parametrize("blow", ["kill", "pause"])
def test_quorum_lost_writes_are_unavailable_and_everything_recovers(
    cluster: EtcdCluster, settings: EtcdSettings, store: EtcdKeyValue, blow: str
) -> None:
    put(store, "known", b"value")
    for node in cluster.nodes[:2]:
        getattr(node.process, blow)()
    with pytest.raises(UnavailableError):
        put(store, "known", b"other")
    with pytest.raises(UnavailableError):
        store.get("known")
    with pytest.raises(UnavailableError):
        store.list()
    stale = EtcdSettings(settings.endpoints, prefix=settings.prefix, read_timeout_s=2.0, stale_gets=True)
    with EtcdKeyValue(stale) as strict:
        reader = strict.tolerant()
        entry = reader.get("known")
        assert entry is not None
        assert entry.value in {b"value", b"other"}
        assert [entry.key for entry in reader.list("known")] == ["known"]
        with pytest.raises(UnavailableError):
            strict.get("known")
    cluster.heal()
    _eventually_put(store, "known", b"new")
    entry = store.get("known")
    assert entry is not None
    assert entry.value == b"new"


def test_create_with_a_lost_answer_is_found_or_told(cluster: EtcdCluster, store: EtcdKeyValue) -> None:
    """Unique creates while the leader is paused: nothing that was refused for certain exists, nothing acknowledged is missing."""
    outcomes: dict[str, str] = {}

    def create(number: int) -> None:
        key = f"create{number:02d}"
        try:
            put(store, key, key.encode(), expect=ABSENT)
            outcomes[key] = "there"
        except UnavailableError as err:
            outcomes[key] = "unknown" if "maybe_applied" in err.message else "absent"

    leader = _victim(cluster, "leader")
    with ThreadPoolExecutor(8) as pool:
        creating = [pool.submit(create, number) for number in range(40)]
        leader.process.pause()
        for future in creating:
            future.result(timeout=120)
    cluster.heal()
    present = {entry.key for entry in store.list("create")}
    assert {key for key, outcome in outcomes.items() if outcome == "there"} <= present
    assert not {key for key, outcome in outcomes.items() if outcome == "absent"} & present


def test_list_longer_than_a_page_is_one_moment(store: EtcdKeyValue) -> None:
    keys = [f"long/{number:05d}" for number in range(PAGE_ENTRIES * 2 + 7)]
    for start in range(0, len(keys), 100):
        store.transact([Put(key, b"") for key in keys[start : start + 100]])
    assert [entry.key for entry in store.list("long/")] == keys
    assert [entry.key for entry in store.list("long/", limit=PAGE_ENTRIES + 1)] == keys[: PAGE_ENTRIES + 1]
    assert [entry.key for entry in store.list("long/", after=keys[4], limit=3)] == keys[5:8]


# -- leases --------------------------------------------------------------------------------------------------------------


class TestEtcdLeases(LeasesContract):
    @pytest.fixture
    def leases(self, store: EtcdKeyValue) -> Iterator[Leases]:
        leases = EtcdLeases(store)
        yield leases
        leases.close()


def test_lease_is_kept_over_the_loss_of_the_leader(cluster: EtcdCluster, store: EtcdKeyValue) -> None:
    leases = EtcdLeases(store)
    fence = leases.acquire("work", ttl_s=10.0)
    _victim(cluster, "leader").process.kill()
    first = fence.next_renewal_s
    wait_until(lambda: fence.next_renewal_s > first + 2 * fence.ttl_s / 3, "three renewals", timeout_s=60.0)
    fence.check()
    _eventually_put(store, "fenced", b"")
    store.transact([Put("fenced", b"held")], [fence.compare])
    leases.close()


def test_lease_of_a_dead_holder_is_taken_over_and_the_zombie_is_fenced(
    settings: EtcdSettings, store: EtcdKeyValue
) -> None:
    """The dead holder is one whose store is gone: it can't renew, and it does not release."""
    zombie_store = EtcdKeyValue(settings)
    zombie = EtcdLeases(zombie_store)
    fence = zombie.acquire("work", ttl_s=TTL_MIN_S)
    zombie_store.close()
    leases = EtcdLeases(store)

    def taken() -> object:
        try:
            return leases.acquire("work", ttl_s=TTL_S)
        except BusyError:
            return None

    successor = wait_until(taken, "the lease to run out", timeout_s=60.0)
    assert fence.is_lost
    with pytest.raises(ConflictError):
        fence.check()
    with pytest.raises(ConflictError):
        store.transact([Put("data", b"zombie")], [fence.compare])
    assert store.get("data") is None
    assert successor is not None
    leases.close()
    zombie.close()


# -- watching ------------------------------------------------------------------------------------------------------------


def _collect(watch: EtcdWatch, seen: list[tuple[Change, ...]]) -> threading.Thread:
    def follow() -> None:
        for transaction in watch.changes():
            seen.append(transaction)  # noqa: PERF402  one by one: the watch does not end

    thread = threading.Thread(target=follow)
    thread.start()
    return thread


def test_watch_tells_every_transaction_once_over_the_loss_of_its_node(
    cluster: EtcdCluster, store: EtcdKeyValue
) -> None:
    first = store.transact([Put("seen/a", b"1"), Put("other", b"")])
    seen: list[tuple[Change, ...]] = []
    with EtcdWatch(store, "seen/", after_revision=first - 1) as watch:
        thread = _collect(watch, seen)
        store.transact([Put("seen/b", b"2"), Delete("seen/a")])
        wait_until(lambda: len(seen) == 2, "two transactions", timeout_s=60.0)
        cluster.nodes[0].process.kill()
        _eventually_put(store, "seen/c", b"3")
        wait_until(lambda: any(c.key == "seen/c" for t in seen for c in t), "the third", timeout_s=120.0)
    thread.join(timeout=60)
    assert not thread.is_alive()
    changes = [[(c.key, None if c.entry is None else c.entry.value) for c in transaction] for transaction in seen]
    assert changes[0] == [("seen/a", b"1")]
    assert sorted(changes[1]) == [("seen/a", None), ("seen/b", b"2")]
    assert changes[2] == [("seen/c", b"3")]
    revisions = [transaction[0].revision for transaction in seen]
    assert revisions == sorted(set(revisions))


def test_watch_from_a_forgotten_revision_is_a_conflict(store: EtcdKeyValue) -> None:
    first = put(store, "seen", b"1")
    last = put(store, "seen", b"2")
    store.client.write("/v3/kv/compaction", {"revision": str(last), "physical": True}, "cannot compact")
    with EtcdWatch(store, "seen", after_revision=first - 1) as watch, pytest.raises(ConflictError):
        list(watch.changes())


# -- uncertain outcomes, one by one --------------------------------------------------------------------------------------


class _LossyStore(EtcdKeyValue):
    """Applies the next transactions and loses the answer, as a node does that dies at the wrong moment."""

    lost = 0

    def _commit(self, body: Mapping[str, Any]) -> int:
        revision = super()._commit(body)
        if self.lost:
            self.lost -= 1
            raise UncertainError("the answer was lost")
        return revision


@pytest.fixture
def lossy(settings: EtcdSettings) -> Iterator[_LossyStore]:
    store = _LossyStore(settings)
    yield store
    store.close()


def test_lost_answer_of_a_swap_is_found_out(lossy: _LossyStore) -> None:
    first = put(lossy, "key", b"1")
    lossy.lost = 1
    second = put(lossy, "key", b"2", expect=first)
    entry = lossy.get("key")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"2", second)


def test_lost_answer_of_a_create_is_found_out(lossy: _LossyStore) -> None:
    lossy.lost = 1
    revision = lossy.transact([Put("key", b"1"), Put("index", b"")], [Compare("key", ABSENT)])
    assert [entry.revision for entry in lossy.list()] == [revision, revision]


def test_lost_answer_without_a_compare_is_told(lossy: _LossyStore) -> None:
    lossy.lost = 1
    with pytest.raises(UnavailableError, match="maybe_applied"):
        put(lossy, "key", b"1")


def test_lost_answer_of_a_deletion_is_told(lossy: _LossyStore) -> None:
    first = put(lossy, "key", b"1")
    lossy.lost = 1
    with pytest.raises(UnavailableError, match="maybe_applied"):
        lossy.transact([Delete("key")], [Compare("key", first)])


def test_lost_answer_overwritten_meanwhile_is_found_in_history(lossy: _LossyStore, store: EtcdKeyValue) -> None:
    first = put(store, "key", b"1")
    body = lossy._body([Put("key", b"mine")], [Compare("key", first)], 0)
    mine = EtcdKeyValue._commit(lossy, body)
    put(store, "key", b"theirs")
    put(store, "key", b"theirs again")
    assert lossy._winner([Put("key", b"mine")], Compare("key", first)) == mine
    with pytest.raises(ConflictError):
        lossy._winner([Put("key", b"somebody else's")], Compare("key", first))
