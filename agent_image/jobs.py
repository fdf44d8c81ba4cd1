"""JobQueue: what the agent has accepted to do, kept over crashes.

Words. A *job* is one accepted piece of work; its ``key`` says what it is about (``image/ID``), its ``payload`` is what a worker needs to
do it. A worker *claims* a job for a while, *heartbeats* to keep it and to report progress, and *finishes* it. Each claim is an *attempt*.

Rules.

* ``enqueue`` is durable when it returns. Equal keys share a job: while one is waiting or claimed, enqueueing its key again returns it
  (and raises its priority if the new one is higher). More than ``pending_max`` jobs that are not finished: UnavailableError at once.
* Claim order is priority (higher first), then age. A job whose ``not_before_s`` lies ahead is not claimed.
* An accepted job is finished or reported, exactly once as seen from outside, over any number of crashes: a claim that is not renewed for
  ``claim_ttl_s`` lapses and the job is claimed again. ``recover`` lapses every claim at once (at start: the claimants are dead).
* Only the holder of the current claim may heartbeat, release or finish; a stale claim raises ConflictError.
* A finished job keeps its result for ``result_ttl_s`` and is then forgotten by ``prune``.
* Time is passed in. Calls block; they may come from several threads.

States: ``waiting`` -> ``claimed`` -> ``done`` | ``failed``; ``claimed`` -> ``waiting`` (release, lapse).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import msgspec

PENDING_MAX = 256
"""Jobs accepted and not finished; each is an image being pulled, and a hypervisor runs fewer guests than that."""

CLAIM_TTL_S = 60.0
"""Twelve heartbeats of 5 s: a worker that missed them all is gone."""

RESULT_TTL_S = 3600.0
"""How long a caller may come back for a result."""


class JobState(StrEnum):
    """Where a job is in its life."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    DONE = "done"
    FAILED = "failed"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job as stored."""

    id: str
    """Sorts by age."""
    key: str
    payload: dict[str, Any]
    priority: int = 0
    state: JobState = JobState.WAITING
    attempt: int = 0
    enqueued_s: float
    not_before_s: float = 0.0
    claim: str = ""
    """Token of the current claim; empty unless claimed."""
    claimed_until_s: float = 0.0
    progress: dict[str, Any] = {}
    result: dict[str, Any] = {}
    """Of a finished job: what it gave, or ``{"code", "message"}``."""
    finished_s: float = 0.0


@runtime_checkable
class JobQueue(Protocol):
    """See the module's docstring: it is the specification."""

    def enqueue(self, key: str, payload: dict[str, Any], *, now_s: float, priority: int = 0) -> Job:
        """Accept a job or join the one with this key."""

    def find(self, key: str) -> Job | None:
        """The newest job with this key, finished ones included."""

    def get(self, job_id: str) -> Job:
        """The job; NotFoundError."""

    def list(self, *states: JobState) -> Sequence[Job]:
        """Jobs in these states (none given: all), in claim order."""

    def claim(self, *, now_s: float) -> Job | None:
        """The next job that may run, claimed; None if there is none."""

    def heartbeat(self, job: Job, *, now_s: float, progress: dict[str, Any] | None = None) -> Job:
        """Keep the claim, report progress."""

    def release(self, job: Job, *, now_s: float, delay_s: float = 0.0) -> Job:
        """Give the job back, to be claimed again after ``delay_s``."""

    def finish(self, job: Job, *, now_s: float, result: dict[str, Any], failed: bool = False) -> Job:
        """End the job."""

    def cancel(self, key: str, *, now_s: float) -> Job | None:
        """End the unfinished job of this key as failed with code ``cancelled``, whoever holds it; None if there is none."""

    def recover(self, *, now_s: float) -> Sequence[Job]:
        """Lapse every claim; the jobs that are waiting again."""

    def prune(self, *, now_s: float) -> int:
        """Forget results older than ``result_ttl_s``; how many."""
