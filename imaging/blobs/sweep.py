"""One collection of a blob store: its rules, and what it did. Every engine counts and reports in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from imaging.blobs.base import CollectReport, needs_none
from imaging.digests import Digest

QUARANTINE_KEEP_S = 7 * 86400.0
"""Damaged blobs are kept this long for whoever wants to know what happened; then collect removes them."""


@dataclass(slots=True)
class Sweep:
    """One collection under way: its rules and what it did."""

    keep: frozenset[Digest]
    before_s: float
    dry_run: bool
    left: int | None
    needed: Callable[[Digest], bool] = needs_none
    blobs: list[Digest] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    freed_bytes: int = 0
    kept: int = 0

    def may_remove(self) -> bool:
        """Count one more removal against the limit."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0

    @property
    def complete(self) -> bool:
        """Whether the limit was not hit."""
        return self.left is None or self.left >= 0

    def report(self) -> CollectReport:
        """The outcome as the contract words it."""
        return CollectReport(tuple(self.blobs), tuple(self.refs), self.freed_bytes, self.kept, self.complete)
