"""The contract of every JobQueue. A queue runs it like this:

    class TestMyQueue(JobQueueContract):
        @pytest.fixture
        def make(self, tmp_path: Path) -> Iterator[Callable[[int], JobQueue]]:
            yield lambda pending_max: MyQueue(..., pending_max=pending_max, claim_ttl_s=CLAIM_TTL_S, result_ttl_s=RESULT_TTL_S)

Each call of ``make`` opens the same queue, as a restarted program would; ``empty`` gives a new one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace

from agent_image.jobs import Job, JobQueue, JobState
from imaging.errors import ConflictError, InvalidArgumentError, NotFoundError, UnavailableError

CLAIM_TTL_S = 60.0
RESULT_TTL_S = 3600.0
PENDING_MAX = 8

Make = Callable[[], JobQueue]

THREADS = 6


def claimed(queue: JobQueue, now_s: float) -> Job:
    job = queue.claim(now_s=now_s)
    assert job is not None
    return job


def _fill(queue: JobQueue) -> tuple[str, ...]:
    return tuple(queue.enqueue(f"image/{number}", {}, now_s=1).id for number in range(PENDING_MAX))


def _claim(queue: JobQueue) -> Job | None:
    return queue.claim(now_s=2)


class JobQueueContract:
    """Subclass and give ``make`` (the same queue each time) and ``empty`` (a new queue each time) fixtures.

    Both with the CLAIM_TTL_S, RESULT_TTL_S and PENDING_MAX of this module.
    """

    @pytest.fixture
    def queue(self, make: Make) -> JobQueue:
        return make()

    # -- enqueueing ------------------------------------------------------------------------------------------------------

    def test_queue_satisfies_the_protocol(self, queue: JobQueue) -> None:
        assert isinstance(queue, JobQueue)

    def test_enqueue_is_found_by_key_by_id_and_after_a_restart(self, queue: JobQueue, make: Make) -> None:
        payload = {"source": "http://image/x", "size": 5, "nested": {"list": [1, "ä", None]}}
        job = queue.enqueue("image/x", payload, now_s=100.0, priority=3)
        assert (job.key, job.payload, job.priority, job.enqueued_s) == ("image/x", payload, 3, 100.0)
        assert (job.state, job.attempt, job.claim) == (JobState.WAITING, 0, "")
        assert queue.get(job.id) == queue.find("image/x") == job
        assert list(make().list()) == [job]

    def test_equal_keys_share_a_job(self, queue: JobQueue) -> None:
        job = queue.enqueue("image/x", {"first": True}, now_s=1)
        assert queue.enqueue("image/x", {"first": False}, now_s=2) == job
        held = claimed(queue, 3)
        assert queue.enqueue("image/x", {}, now_s=4) == held
        assert len(queue.list()) == 1

    def test_enqueue_with_a_higher_priority_raises_the_shared_job(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1, priority=1)
        queue.enqueue("b", {}, now_s=2)
        assert queue.enqueue("b", {}, now_s=3, priority=2).priority == 2
        assert queue.enqueue("b", {}, now_s=4, priority=0).priority == 2
        assert [job.key for job in queue.list()] == ["b", "a"]
        assert claimed(queue, 5).key == "b"

    def test_raising_a_claimed_job_keeps_its_claim(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        held = claimed(queue, 2)
        queue.enqueue("a", {}, now_s=3, priority=5)
        assert queue.claim(now_s=4) is None
        assert queue.finish(held, now_s=5, result={}).priority == 5
        assert queue.list(JobState.WAITING, JobState.CLAIMED) == []

    def test_finished_job_does_not_take_new_requests(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        done = queue.finish(claimed(queue, 2), now_s=3, result={})
        again = queue.enqueue("a", {}, now_s=4)
        assert again.id > done.id
        assert queue.find("a") == again
        assert queue.get(done.id) == done

    def test_full_queue_answers_at_once_and_still_shares(self, queue: JobQueue) -> None:
        for number in range(PENDING_MAX):
            queue.enqueue(f"image/{number}", {}, now_s=number)
        held = claimed(queue, 50)
        with pytest.raises(UnavailableError, match=str(PENDING_MAX)):
            queue.enqueue("one more", {}, now_s=51)
        assert queue.find("one more") is None
        assert queue.enqueue("image/3", {}, now_s=52).key == "image/3"
        queue.finish(held, now_s=53, result={})
        assert queue.enqueue("one more", {}, now_s=54).state is JobState.WAITING

    @pytest.mark.parametrize("key", ["", "x" * 513, "nul\0", "lone\ud800"])
    def test_bad_key_is_refused(self, queue: JobQueue, key: str) -> None:
        with pytest.raises(InvalidArgumentError):
            queue.enqueue(key, {}, now_s=1)
        assert list(queue.list()) == []

    def test_payload_that_is_no_json_is_refused(self, queue: JobQueue) -> None:
        with pytest.raises(InvalidArgumentError):
            queue.enqueue("a", {"object": object()}, now_s=1)
        assert list(queue.list()) == []

    @pytest.mark.parametrize("priority", [1_000_001, -1_000_001])
    def test_priority_out_of_range_is_refused(self, queue: JobQueue, priority: int) -> None:
        with pytest.raises(InvalidArgumentError):
            queue.enqueue("a", {}, now_s=1, priority=priority)

    # -- claiming --------------------------------------------------------------------------------------------------------

    def test_claim_order_is_priority_then_age(self, queue: JobQueue) -> None:
        for key, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0), ("f", 1_000_000), ("g", -1_000_000)):
            queue.enqueue(key, {}, now_s=1, priority=priority)
        assert [job.key for job in queue.list()] == list("fbdaecg")
        assert [claimed(queue, 2).key for _ in range(7)] == list("fbdaecg")
        assert queue.claim(now_s=3) is None

    def test_claim_age_does_not_depend_on_the_clock(self, queue: JobQueue, make: Make) -> None:
        queue.enqueue("first", {}, now_s=1000)
        make().enqueue("second", {}, now_s=10)
        assert claimed(queue, 2000).key == "first"

    def test_claim_counts_attempts_and_gives_a_new_token(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        first = claimed(queue, 2)
        assert (first.state, first.attempt, first.claimed_until_s) == (JobState.CLAIMED, 1, 2 + CLAIM_TTL_S)
        second = claimed(queue, 2 + CLAIM_TTL_S)
        assert (second.id, second.attempt) == (first.id, 2)
        assert "" != first.claim != second.claim

    def test_claim_lapses_only_when_its_time_is_over(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        held = claimed(queue, 0)
        assert queue.claim(now_s=CLAIM_TTL_S - 1) is None
        queue.heartbeat(held, now_s=CLAIM_TTL_S - 1)
        assert queue.claim(now_s=2 * CLAIM_TTL_S - 2) is None
        assert claimed(queue, 2 * CLAIM_TTL_S - 1).attempt == 2

    def test_threads_that_claim_never_share_a_job(self, queue: JobQueue) -> None:
        for number in range(PENDING_MAX):
            queue.enqueue(f"image/{number}", {}, now_s=number)
        barrier = threading.Barrier(THREADS)

        def work(_: int) -> list[str]:
            barrier.wait(timeout=60)
            mine = []
            while (job := queue.claim(now_s=100)) is not None:
                mine.append(job.key)
                queue.finish(job, now_s=101, result={})
            return mine

        with ThreadPoolExecutor(THREADS) as pool:
            worked = [key for some in pool.map(work, range(THREADS)) for key in some]
        assert sorted(worked) == [f"image/{number}" for number in range(PENDING_MAX)]

    def test_two_openers_of_one_queue_never_share_a_job(self, make: Make) -> None:
        """As two processes on a shared engine: only the engine's compares stand between them."""
        queues = [make() for _ in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            assert len(set(pool.map(_fill, queues))) == 1
            claims = list(pool.map(_claim, queues))
        ids = [job.id for job in claims if job is not None]
        assert len(set(ids)) == len(ids) == THREADS

    # -- holding ---------------------------------------------------------------------------------------------------------

    def test_heartbeat_reports_progress(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        held = claimed(queue, 2)
        beaten = queue.heartbeat(held, now_s=30, progress={"done_bytes": 5})
        assert (beaten.progress, beaten.claimed_until_s, beaten.claim) == (
            {"done_bytes": 5},
            30 + CLAIM_TTL_S,
            held.claim,
        )
        assert queue.heartbeat(held, now_s=31).progress == {"done_bytes": 5}
        assert queue.get(held.id).claimed_until_s == 31 + CLAIM_TTL_S

    def test_release_gives_the_job_back_after_a_delay(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        waiting = queue.release(claimed(queue, 2), now_s=10, delay_s=30)
        assert (waiting.state, waiting.claim, waiting.not_before_s, waiting.attempt) == (JobState.WAITING, "", 40, 1)
        assert queue.claim(now_s=39) is None
        assert claimed(queue, 40).attempt == 2

    def test_delayed_job_does_not_hold_up_others(self, queue: JobQueue) -> None:
        queue.enqueue("slow", {}, now_s=1, priority=9)
        queue.enqueue("quick", {}, now_s=2)
        queue.release(claimed(queue, 3), now_s=3, delay_s=1000)
        assert claimed(queue, 4).key == "quick"

    @pytest.mark.parametrize("failed", [False, True])
    def test_finish_keeps_the_result(self, queue: JobQueue, make: Make, failed: bool) -> None:  # noqa: FBT001
        queue.enqueue("a", {}, now_s=1)
        done = queue.finish(claimed(queue, 2), now_s=3, result={"code": "x"}, failed=failed)
        assert done.state is (JobState.FAILED if failed else JobState.DONE)
        assert (done.result, done.finished_s, done.claim) == ({"code": "x"}, 3, "")
        assert make().find("a") == make().get(done.id) == done
        assert queue.claim(now_s=10_000) is None
        assert list(queue.list(JobState.WAITING, JobState.CLAIMED)) == []
        assert list(queue.list(done.state)) == list(queue.list()) == [done]

    def test_stale_claim_is_refused_and_changes_nothing(self, queue: JobQueue) -> None:
        waiting = queue.enqueue("a", {}, now_s=1)
        stale = claimed(queue, 2)
        current = claimed(queue, 2 + CLAIM_TTL_S)
        for holder in (stale, waiting, replace(current, claim="guess")):
            with pytest.raises(ConflictError):
                queue.heartbeat(holder, now_s=70, progress={"stale": True})
            with pytest.raises(ConflictError):
                queue.release(holder, now_s=70)
            with pytest.raises(ConflictError):
                queue.finish(holder, now_s=70, result={"stale": True})
        assert queue.get(current.id) == current
        done = queue.finish(current, now_s=71, result={})
        with pytest.raises(ConflictError):
            queue.finish(current, now_s=72, result={"twice": True})
        with pytest.raises(ConflictError):
            queue.heartbeat(current, now_s=72)
        assert queue.get(current.id) == done

    def test_unknown_job_is_not_found(self, queue: JobQueue) -> None:
        assert queue.find("nothing") is None
        assert queue.find("") is None
        with pytest.raises(NotFoundError, match="0123"):
            queue.get("0123")

    # -- cancelling, recovering, pruning ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("held", [False, True])
    def test_cancel_ends_the_job_whoever_holds_it(self, queue: JobQueue, held: bool) -> None:  # noqa: FBT001
        queue.enqueue("a", {}, now_s=1)
        job = claimed(queue, 2) if held else queue.get(queue.enqueue("a", {}, now_s=2).id)
        ended = queue.cancel("a", now_s=3)
        assert ended is not None
        assert (ended.state, ended.result["code"], ended.finished_s) == (JobState.FAILED, "cancelled", 3)
        assert queue.cancel("a", now_s=4) is None
        assert queue.cancel("nothing", now_s=4) is None
        with pytest.raises(ConflictError):
            queue.finish(job, now_s=5, result={})
        assert queue.find("a") == ended

    def test_recover_lapses_every_claim_at_once(self, queue: JobQueue, make: Make) -> None:
        for key in "abc":
            queue.enqueue(key, {}, now_s=1)
        first, second = claimed(queue, 2), claimed(queue, 2)
        queue.finish(second, now_s=3, result={})
        restarted = make()
        [waiting] = restarted.recover(now_s=4)
        assert (waiting.id, waiting.state, waiting.attempt, waiting.claim) == (first.id, JobState.WAITING, 1, "")
        with pytest.raises(ConflictError):
            restarted.finish(first, now_s=5, result={})
        assert [claimed(restarted, 5).key for _ in range(2)] == ["a", "c"]
        assert restarted.claim(now_s=6) is None

    def test_prune_forgets_results_when_their_time_is_over(self, queue: JobQueue) -> None:
        for key, end in (("a", 10), ("b", 20)):
            queue.enqueue(key, {}, now_s=1)
            queue.finish(claimed(queue, 2), now_s=end, result={})
        queue.enqueue("waiting", {}, now_s=1)
        assert queue.prune(now_s=9 + RESULT_TTL_S) == 0
        assert queue.prune(now_s=15 + RESULT_TTL_S) == 1
        assert queue.find("a") is None
        assert [job.key for job in queue.list()] == ["b", "waiting"]
        assert queue.prune(now_s=20 + RESULT_TTL_S) == 1
        assert [job.key for job in queue.list()] == ["waiting"]

    def test_prune_keeps_the_newer_job_of_the_same_key(self, queue: JobQueue) -> None:
        queue.enqueue("a", {}, now_s=1)
        old = queue.finish(claimed(queue, 2), now_s=3, result={})
        new = queue.enqueue("a", {}, now_s=4)
        assert queue.prune(now_s=4 + RESULT_TTL_S) == 1
        assert queue.find("a") == new
        with pytest.raises(NotFoundError):
            queue.get(old.id)

    # -- against a model -------------------------------------------------------------------------------------------------

    def test_any_sequence_of_calls_behaves_as_the_model(self, empty: Make) -> None:
        machine: Any = lambda: _Machine(empty)  # noqa: E731
        run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


JOB_KEYS = st.sampled_from([f"k{number}" for number in range(PENDING_MAX + 2)])


class _Machine(RuleBasedStateMachine):
    """Random calls on a queue and on a list of jobs in memory must agree, over restarts too."""

    def __init__(self, empty: Make) -> None:
        super().__init__()
        self.queue = empty()
        self.now_s = 1000.0
        self.jobs: dict[str, Job] = {}
        self.claims: list[Job] = []

    def pending(self) -> list[Job]:
        found = [job for job in self.jobs.values() if job.state in {JobState.WAITING, JobState.CLAIMED}]
        return sorted(found, key=lambda job: (-job.priority, job.id))

    def ready(self, job: Job) -> bool:
        since = job.claimed_until_s if job.state is JobState.CLAIMED else job.not_before_s
        return since <= self.now_s

    @rule(seconds=st.sampled_from([0, 1, 30, 61, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(key=JOB_KEYS, priority=st.integers(-2, 2))
    def enqueue(self, key: str, priority: int) -> None:
        shared = [job for job in self.pending() if job.key == key]
        if not shared and len(self.pending()) >= PENDING_MAX:
            with pytest.raises(UnavailableError):
                self.queue.enqueue(key, {}, now_s=self.now_s, priority=priority)
            return
        job = self.queue.enqueue(key, {"key": key}, now_s=self.now_s, priority=priority)
        if shared:
            assert job == replace(shared[0], priority=max(priority, shared[0].priority))
        else:
            assert all(job.id > other for other in self.jobs)
        self.jobs[job.id] = job

    @rule()
    def claim(self) -> None:
        expected = next((job for job in self.pending() if self.ready(job)), None)
        job = self.queue.claim(now_s=self.now_s)
        assert (job and job.id) == (expected and expected.id)
        if job is not None and expected is not None:
            assert job.attempt == expected.attempt + 1
            self.jobs[job.id] = job
            self.claims.append(job)

    @rule(pick=st.integers(0, 100), what=st.sampled_from(["heartbeat", "release", "finish", "fail"]))
    def holder_calls(self, pick: int, what: str) -> None:
        if not self.claims:
            return
        held = self.claims[pick % len(self.claims)]
        calls: dict[str, Callable[[], Job]] = {
            "heartbeat": lambda: self.queue.heartbeat(held, now_s=self.now_s, progress={"now": self.now_s}),
            "release": lambda: self.queue.release(held, now_s=self.now_s, delay_s=10),
            "finish": lambda: self.queue.finish(held, now_s=self.now_s, result={"ok": True}),
            "fail": lambda: self.queue.finish(held, now_s=self.now_s, result={"ok": False}, failed=True),
        }
        known = self.jobs.get(held.id)
        if known is None:
            with pytest.raises(NotFoundError):
                calls[what]()
        elif known.claim != held.claim:
            with pytest.raises(ConflictError):
                calls[what]()
        else:
            self.jobs[held.id] = calls[what]()

    @rule(key=JOB_KEYS)
    def cancel(self, key: str) -> None:
        shared = [job for job in self.pending() if job.key == key]
        ended = self.queue.cancel(key, now_s=self.now_s)
        assert [job.id for job in shared] == ([ended.id] if ended else [])
        if ended is not None:
            self.jobs[ended.id] = ended

    @rule()
    def recover(self) -> None:
        lapsed = self.queue.recover(now_s=self.now_s)
        assert [job.id for job in lapsed] == [job.id for job in self.pending() if job.state is JobState.CLAIMED]
        self.jobs.update({job.id: job for job in lapsed})

    @rule()
    def prune(self) -> None:
        old = [
            job.id
            for job in self.jobs.values()
            if job.state in {JobState.DONE, JobState.FAILED} and job.finished_s + RESULT_TTL_S <= self.now_s
        ]
        assert self.queue.prune(now_s=self.now_s) == len(old)
        for job_id in old:
            del self.jobs[job_id]

    @invariant()
    def same_jobs(self) -> None:
        assert list(self.queue.list()) == sorted(self.jobs.values(), key=lambda job: (-job.priority, job.id))
        assert list(self.queue.list(JobState.WAITING, JobState.CLAIMED)) == self.pending()

    @invariant()
    def newest_is_found_by_key(self) -> None:
        newest = {job.key: job for job in sorted(self.jobs.values(), key=lambda job: job.id)}
        assert all(self.queue.find(key) == job for key, job in newest.items())
