"""KeyValueJobQueue: the job queue on any key/value engine.

Records, below one prefix:

    job/<id>                       the job
    order/<priority>/<id>          an unfinished job, in claim order; its value says from when it may be claimed
    key/<key>                      id of the newest job with that key
    finished/<microseconds>/<id>   a finished job, in the order it may be forgotten
    sequence                       the last id given

A job and its index entries change in one transaction that compares the job's revision, so that two workers (or two
processes, on a shared engine) never both get a job. An id is a number that only grows: age order does not depend on the
clock. A claim reads a page of the order index, whose entries are tiny, and one job.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from agent_image.jobs import CLAIM_TTL_S, PENDING_MAX, RESULT_TTL_S, Job, JobState
from imaging.errors import BadDataError, ConflictError, InvalidArgumentError, NotFoundError, UnavailableError
from imaging.kv.base import ABSENT, Compare, Delete, Entry, KeyValue, Operation, Put

JOB_KEY_MAX_BYTES = 512
"""Half of what the engines take, because a prefix is put before it."""

PRIORITY_MAX = 1_000_000
"""Priorities run from minus to plus this, so that they sort as ten digits."""

ATTEMPTS_MAX = 64
"""Times a change is tried anew because somebody else changed the record first; each lost try is another's success."""

PAGE = 32
"""Index entries read at a time: a claim skips the jobs being worked on, and those are few."""

_UNFINISHED = frozenset({JobState.WAITING, JobState.CLAIMED})


_UNCLAIMED: dict[str, Any] = {"claim": "", "claimed_until_s": 0.0}

T = TypeVar("T")


class _LostRaceError(Exception):
    """The record changed between reading and writing it. Never leaves this module."""


class _Slot(msgspec.Struct, array_like=True):
    """What the order index knows of a job."""

    ready_s: float
    """From when it may be claimed: its ``not_before_s``, or the end of the current claim."""


class KeyValueJobQueue:
    """JobQueue over a KeyValue; see the module's docstring and the contract's."""

    def __init__(
        self,
        kv: KeyValue,
        *,
        pending_max: int = PENDING_MAX,
        claim_ttl_s: float = CLAIM_TTL_S,
        result_ttl_s: float = RESULT_TTL_S,
        prefix: str = "jobs/",
    ) -> None:
        self._kv = kv
        self._pending_max = pending_max
        self._claim_ttl_s = claim_ttl_s
        self._result_ttl_s = result_ttl_s
        self._prefix = prefix
        self._lock = threading.Lock()  # spares threads of one process the lost tries; the compares do the rest

    # -- records ---------------------------------------------------------------------------------------------------------

    def _job_key(self, job_id: str) -> str:
        return f"{self._prefix}job/{job_id}"

    def _name_key(self, key: str) -> str:
        return f"{self._prefix}key/{key}"

    @property
    def _sequence_key(self) -> str:
        return f"{self._prefix}sequence"

    def _order_key(self, job: Job) -> str:
        return f"{self._prefix}order/{PRIORITY_MAX - job.priority:010d}/{job.id}"

    def _finished_key(self, job: Job) -> str:
        return f"{self._prefix}finished/{max(0, int(job.finished_s * 1e6)):020d}/{job.id}"

    def _load(self, job_id: str) -> tuple[Job, int]:
        entry = self._kv.get(self._job_key(job_id))
        if entry is None:
            raise NotFoundError(f"no such job: {job_id[:80]!r}")
        return _decoded(entry.key, entry.value, Job), entry.revision

    def _index(self, job: Job) -> Iterator[Operation]:
        """The index entry a job has in its state."""
        if job.state in _UNFINISHED:
            yield Put(self._order_key(job), msgspec.json.encode(_Slot(_ready_s(job))))
        else:
            yield Put(self._finished_key(job), b"")

    def _save(self, old: Job, new: Job, revision: int) -> Job:
        """Replace a job and its index entries in one transaction; ConflictError if it changed meanwhile."""
        operations: list[Operation] = [Put(self._job_key(new.id), self._encode(new)), *self._index(new)]
        if new.state not in _UNFINISHED or new.priority != old.priority:
            operations.append(Delete(self._order_key(old)))
        self._transact(operations, [Compare(self._job_key(old.id), revision)])
        return new

    def _transact(self, operations: Sequence[Operation], compares: Sequence[Compare]) -> None:
        try:
            self._kv.transact(operations, compares)
        except ConflictError as err:
            raise _LostRaceError from err

    @staticmethod
    def _encode(job: Job) -> bytes:
        try:
            return msgspec.json.encode(job)
        except (TypeError, ValueError, RecursionError) as err:
            raise InvalidArgumentError(f"the job cannot be stored as JSON: {job.key[:80]!r}") from err

    def _retry(self, change: Callable[[], T]) -> T:
        """Read, decide, write; again while somebody else was faster."""
        with self._lock:
            for _ in range(ATTEMPTS_MAX):
                with suppress(_LostRaceError):
                    return change()
        raise UnavailableError("the job queue is too busy")

    def _paged(self, prefix: str) -> Iterator[Entry]:
        """Entries below a prefix of ours, a page at a time."""
        prefix, after = self._prefix + prefix, ""
        while True:
            page = self._kv.list(prefix, after=after, limit=PAGE)
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1].key

    # -- the contract: enqueueing and looking -----------------------------------------------------------------------------

    def enqueue(self, key: str, payload: dict[str, Any], *, now_s: float, priority: int = 0) -> Job:
        """See JobQueue."""
        if not -PRIORITY_MAX <= priority <= PRIORITY_MAX:
            raise InvalidArgumentError(f"a priority is between -{PRIORITY_MAX} and {PRIORITY_MAX}: {priority}")
        if not key or len(key.encode(errors="replace")) > JOB_KEY_MAX_BYTES:
            raise InvalidArgumentError(f"a job's key has 1 to {JOB_KEY_MAX_BYTES} bytes: {key[:80]!r}")
        return self._retry(lambda: self._enqueue(key, payload, now_s, priority))

    def _enqueue(self, key: str, payload: dict[str, Any], now_s: float, priority: int) -> Job:
        """Every added job moves the sequence: read it first, and nothing can be added between looking and adding."""
        sequence = self._kv.get(self._sequence_key)
        joined = self._join(key, priority)
        if joined is not None:
            return joined
        number = int(sequence.value) + 1 if sequence else 1
        self._check_room(sequence)
        job = Job(id=f"{number:016d}", key=key, payload=payload, priority=priority, enqueued_s=now_s)
        operations = [
            Put(self._sequence_key, b"%d" % number),
            Put(self._name_key(key), job.id.encode()),
            Put(self._job_key(job.id), self._encode(job)),
            *self._index(job),
        ]
        self._transact(operations, [Compare(self._sequence_key, sequence.revision if sequence else ABSENT)])
        return job

    def _join(self, key: str, priority: int) -> Job | None:
        """The unfinished job with this key, its priority raised if need be."""
        found = self._find(key)
        if found is None or found[0].state not in _UNFINISHED:
            return None
        job, revision = found
        return job if priority <= job.priority else self._save(job, replace(job, priority=priority), revision)

    def _check_room(self, sequence: Entry | None) -> None:
        pending = self._kv.list(f"{self._prefix}order/", limit=self._pending_max)
        if len(pending) < self._pending_max:
            return
        if self._kv.get(self._sequence_key) != sequence:  # filled meanwhile, perhaps with this very key
            raise _LostRaceError
        raise UnavailableError(f"the job queue is full: {self._pending_max} jobs are waiting or being worked on")

    def _find(self, key: str) -> tuple[Job, int] | None:
        name = self._kv.get(self._name_key(key))
        if name is None:
            return None
        try:
            return self._load(name.value.decode())
        except NotFoundError:  # forgotten between the two reads
            return None

    def find(self, key: str) -> Job | None:
        """See JobQueue."""
        found = self._find(key) if key else None
        return found[0] if found else None

    def get(self, job_id: str) -> Job:
        """See JobQueue."""
        return self._load(job_id)[0]

    def list(self, *states: JobState) -> Sequence[Job]:
        """See JobQueue. Unfinished jobs come from the order index, so that results kept for an hour cost nothing here."""
        wanted = frozenset(states or JobState)
        if wanted <= _UNFINISHED:
            return [job for job in self._in_order() if job.state in wanted]
        jobs = [_decoded(entry.key, entry.value, Job) for entry in self._paged("job/")]
        return sorted((job for job in jobs if job.state in wanted), key=lambda job: (-job.priority, job.id))

    def _in_order(self) -> Iterator[Job]:
        for entry in self._paged("order/"):
            with suppress(NotFoundError):  # finished and forgotten since the page was read
                yield self.get(_last_part(entry.key))

    # -- the contract: working --------------------------------------------------------------------------------------------

    def claim(self, *, now_s: float) -> Job | None:
        """See JobQueue."""
        return self._retry(lambda: self._claim(now_s))

    def _claim(self, now_s: float) -> Job | None:
        for entry in self._paged("order/"):
            if _decoded(entry.key, entry.value, _Slot).ready_s <= now_s:
                job, revision = self._reload(_last_part(entry.key), now_s)
                claimed = replace(
                    job,
                    state=JobState.CLAIMED,
                    attempt=job.attempt + 1,
                    claim=secrets.token_hex(8),
                    claimed_until_s=now_s + self._claim_ttl_s,
                )
                return self._save(job, claimed, revision)
        return None

    def _reload(self, job_id: str, now_s: float) -> tuple[Job, int]:
        """A job the index just named; what counts is the record, for another process may have claimed it since."""
        try:
            job, revision = self._load(job_id)
        except NotFoundError as err:
            raise _LostRaceError from err
        if job.state not in _UNFINISHED or _ready_s(job) > now_s:
            raise _LostRaceError
        return job, revision

    def _change_held(self, job: Job, **changes: Any) -> Job:
        """Change a job on behalf of the holder of its claim; ConflictError if somebody else holds it or nobody does."""

        def change() -> Job:
            stored, revision = self._load(job.id)
            if stored.state is not JobState.CLAIMED or not job.claim or stored.claim != job.claim:
                raise ConflictError(f"the claim on job {job.id} is no longer held: {job.key[:80]!r}")
            return self._save(stored, replace(stored, **changes), revision)

        return self._retry(change)

    def heartbeat(self, job: Job, *, now_s: float, progress: dict[str, Any] | None = None) -> Job:
        """See JobQueue. A claim that lapsed but was not taken by anybody yet is renewed: the work goes on."""
        changes = {} if progress is None else {"progress": progress}
        return self._change_held(job, claimed_until_s=now_s + self._claim_ttl_s, **changes)

    def release(self, job: Job, *, now_s: float, delay_s: float = 0.0) -> Job:
        """See JobQueue."""
        return self._change_held(job, **_UNCLAIMED, state=JobState.WAITING, not_before_s=now_s + delay_s)

    def finish(self, job: Job, *, now_s: float, result: dict[str, Any], failed: bool = False) -> Job:
        """See JobQueue."""
        state = JobState.FAILED if failed else JobState.DONE
        return self._change_held(job, **_UNCLAIMED, state=state, result=result, finished_s=now_s)

    def cancel(self, key: str, *, now_s: float) -> Job | None:
        """See JobQueue."""
        result = {"code": "cancelled", "message": f"cancelled: {key}"}

        def change() -> Job | None:
            found = self._find(key) if key else None
            if found is None or found[0].state not in _UNFINISHED:
                return None
            ended = replace(found[0], **_UNCLAIMED, state=JobState.FAILED, result=result, finished_s=now_s)
            return self._save(found[0], ended, found[1])

        return self._retry(change)

    # -- the contract: housekeeping -----------------------------------------------------------------------------------------

    def recover(self, *, now_s: float) -> Sequence[Job]:
        """See JobQueue."""
        lapsed = [self._lapse(job.id, now_s) for job in self.list(JobState.CLAIMED)]
        return [job for job in lapsed if job is not None]

    def _lapse(self, job_id: str, now_s: float) -> Job | None:
        def change() -> Job | None:
            try:
                job, revision = self._load(job_id)
            except NotFoundError:  # finished and forgotten since it was listed
                return None
            if job.state is not JobState.CLAIMED:
                return None
            waiting = replace(job, **_UNCLAIMED, state=JobState.WAITING, not_before_s=min(job.not_before_s, now_s))
            return self._save(job, waiting, revision)

        return self._retry(change)

    def prune(self, *, now_s: float) -> int:
        """See JobQueue."""
        cutoff = (now_s - self._result_ttl_s) * 1e6
        old = takewhile(lambda entry: int(entry.key.rsplit("/", 2)[1]) <= cutoff, self._paged("finished/"))
        return sum(self._forget(entry.key) for entry in old)

    def _forget(self, finished_key: str) -> int:
        """Remove one finished job and, if it is the newest with its key, that key."""

        def change() -> int:
            job_id = _last_part(finished_key)
            entry = self._kv.get(self._job_key(job_id))
            if entry is None:  # another process pruned it
                return 0
            operations: list[Operation] = [Delete(finished_key), Delete(entry.key)]
            compares = [Compare(entry.key, entry.revision)]
            name = self._kv.get(self._name_key(_decoded(entry.key, entry.value, Job).key))
            if name is not None and name.value.decode() == job_id:
                operations.append(Delete(name.key))
                compares.append(Compare(name.key, name.revision))
            self._transact(operations, compares)
            return 1

        return self._retry(change)


def _ready_s(job: Job) -> float:
    """From when an unfinished job may be claimed."""
    return job.claimed_until_s if job.state is JobState.CLAIMED else job.not_before_s


def _decoded(key: str, value: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as err:
        raise BadDataError(f"the stored job is damaged: {key!r}") from err


def _last_part(key: str) -> str:
    return key.rpartition("/")[2]
