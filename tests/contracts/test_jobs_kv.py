"""The job queue on the embedded key/value engine: the contract, and what is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from agent_image.jobs import JobQueue, JobState
from agent_image.jobs_kv import ATTEMPTS_MAX, PAGE, KeyValueJobQueue
from imaging.errors import BadDataError, ConflictError, UnavailableError
from imaging.kv.base import Compare, Entry, KeyValue, Operation, put
from imaging.kv.sqlite import SqliteKeyValue
from tests.contracts.job_queue import CLAIM_TTL_S, PENDING_MAX, RESULT_TTL_S, JobQueueContract


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[SqliteKeyValue]:
    with SqliteKeyValue(tmp_path / "jobs.db") as store:
        yield store


def _open(kv: KeyValue, prefix: str = "jobs/", pending_max: int = PENDING_MAX) -> KeyValueJobQueue:
    return KeyValueJobQueue(
        kv, pending_max=pending_max, claim_ttl_s=CLAIM_TTL_S, result_ttl_s=RESULT_TTL_S, prefix=prefix
    )


class TestKeyValueJobQueue(JobQueueContract):
    @pytest.fixture
    def make(self, kv: SqliteKeyValue) -> Callable[[], JobQueue]:
        return lambda: _open(kv)

    @pytest.fixture
    def empty(self, kv: SqliteKeyValue) -> Callable[[], JobQueue]:
        numbers = count()
        return lambda: _open(kv, f"queue{next(numbers)}/")


class _Counting:
    """A real engine that counts what is asked of it, and lets somebody else be faster on demand."""

    def __init__(self, kv: KeyValue) -> None:
        self._kv = kv
        self.reads = 0
        self.listed = 0
        self.losses = 0
        self.meanwhile: Callable[[], object] | None = None
        """What another process does just before the next read of a job."""

    def get(self, key: str) -> Entry | None:
        self.reads += 1
        if "/job/" in key or "/key/" in key:
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                meanwhile()
        return self._kv.get(key)

    def list(self, prefix: str = "", *, after: str = "", limit: int | None = None) -> Sequence[Entry]:
        found = self._kv.list(prefix, after=after, limit=limit)
        self.listed += len(found)
        return found

    def transact(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        if self.losses:
            self.losses -= 1
            raise ConflictError("injected")
        return self._kv.transact(operations, compares)

    def close(self) -> None:
        self._kv.close()


def test_claim_reads_little_however_many_wait(kv: SqliteKeyValue) -> None:
    counting = _Counting(kv)
    queue = _open(counting, pending_max=256)
    for number in range(256):
        queue.enqueue(f"image/{number}", {"source": "x" * 1000}, now_s=1)
    for claims in range(PAGE * 2):
        counting.reads = counting.listed = 0
        assert queue.claim(now_s=2) is not None
        assert counting.reads == 1
        assert counting.listed <= claims + PAGE


def test_lost_race_is_tried_again_and_given_up_after_a_bound(kv: SqliteKeyValue) -> None:
    counting = _Counting(kv)
    queue = _open(counting)
    counting.losses = ATTEMPTS_MAX - 1
    queue.enqueue("a", {}, now_s=1)
    counting.losses = ATTEMPTS_MAX
    with pytest.raises(UnavailableError, match="busy"):
        queue.claim(now_s=2)
    assert [job.state for job in queue.list()] == [JobState.WAITING]


def test_claim_of_a_job_another_process_just_claimed_takes_the_next(kv: SqliteKeyValue) -> None:
    counting = _Counting(kv)
    queue, other = _open(counting), _open(kv)
    first, second = (queue.enqueue(key, {}, now_s=1) for key in "ab")
    counting.meanwhile = lambda: other.claim(now_s=2)
    job = queue.claim(now_s=2)
    assert job is not None
    assert job.id == second.id
    assert other.get(first.id).attempt == 1


def test_claim_of_a_job_that_was_just_cancelled_and_forgotten_finds_none(kv: SqliteKeyValue) -> None:
    counting = _Counting(kv)
    queue, other = _open(counting), _open(kv)
    queue.enqueue("a", {}, now_s=1)
    counting.meanwhile = lambda: (other.cancel("a", now_s=2), other.prune(now_s=2 + RESULT_TTL_S))
    assert queue.claim(now_s=2) is None


@pytest.mark.parametrize("pending_max", [1, 8])
def test_enqueue_of_a_key_another_process_just_added_joins_it(kv: SqliteKeyValue, pending_max: int) -> None:
    counting = _Counting(kv)
    queue, other = _open(counting, pending_max=pending_max), _open(kv)
    real_list = counting._kv.list

    class _AddsWhileCounting:
        """The other process adds the key after we looked for it."""

        def __call__(self, *args: object, **kwargs: object) -> Sequence[Entry]:
            other.enqueue("a", {"from": "other"}, now_s=1)
            return real_list(*args, **kwargs)  # type: ignore[arg-type]

    counting.list = _AddsWhileCounting()  # type: ignore[method-assign]
    assert queue.enqueue("a", {"from": "us"}, now_s=2).payload == {"from": "other"}
    assert len(other.list()) == 1


def test_finished_jobs_leave_nothing_behind_after_pruning(kv: SqliteKeyValue) -> None:
    queue = _open(kv)
    for number in range(PENDING_MAX):
        queue.enqueue(f"image/{number}", {}, now_s=1)
    while (job := queue.claim(now_s=2)) is not None:
        queue.finish(job, now_s=3, result={})
    assert queue.prune(now_s=3 + RESULT_TTL_S) == PENDING_MAX
    assert [entry.key for entry in kv.list()] == ["jobs/sequence"]


def test_damaged_record_is_bad_data(kv: SqliteKeyValue) -> None:
    queue = _open(kv)
    job = queue.enqueue("a", {}, now_s=1)
    put(kv, f"jobs/job/{job.id}", b"{}")
    for call in (lambda: queue.get(job.id), lambda: queue.find("a"), lambda: queue.claim(now_s=2), queue.list):
        with pytest.raises(BadDataError, match=job.id):
            call()
