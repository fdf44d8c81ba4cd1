"""BlobStore: the contract of every content-addressed byte store.

Words. A *blob* is immutable bytes, named by the sha256 *digest* of exactly those bytes. An *ingest* is a blob being
written, named by a *ref* the writer chooses; it is invisible to readers. *Commit* makes it a blob, *abort* forgets it. A
*lease* keeps digests and refs from being collected until it expires or is released. *Collect* removes what nothing needs.

Life of a blob: ``ingest(ref)`` -> ``write`` ... -> ``commit(expected digest, size)`` -> ``open`` by readers -> ``collect``.

Rules.

* An ingest is invisible until commit. Commit verifies the size and digest it was told, and always the digest it
  computed itself: the blob's name is what was written, never what was claimed.
* Commit publishes in one order: flush, fsync, verify, rename, fsync of the directory. After the rename nothing may fail the
  call. Committing a digest that is already there is success and keeps the older file.
* Reopening an ingest by its ref resumes it: ``offset_bytes`` says how much is durable, the digest state is restored.
* Aborting an unknown ref is success. A writer that vanished leaves an ingest that ``ingests()`` shows with its age.
* A lease protects from the first byte: ``ingest`` takes the lease it belongs to. ``collect`` never removes a blob or ingest that is
  leased, in ``keep``, or younger than ``grace_s``, and it reports what it removed and freed; ``dry_run`` removes nothing.
* Whoever names a blob for good (a record) does so before its lease ends. So what removes looks at the leases first, then asks ``needed``:
  a blob that is neither leased nor needed in that order is nobody's, however many processes are at work.
* ``open`` may verify while reading; a mismatch raises BadDataError before the last piece is handed out and quarantines the
  blob. ``verify`` re-reads one blob and quarantines it if it is damaged.
* Threads may share a store; one ref has one writer at a time (BusyError).

Errors: NotFoundError, BadDataError (digest or size), NoSpaceError (disk or quota; the ingest keeps what was durable),
TooLargeError (``max_bytes``), BusyError (ref in use), UnavailableError (backend down).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, runtime_checkable

from imaging.digests import Digest


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """A committed blob."""

    digest: Digest
    size_bytes: int
    created_s: float


@dataclass(frozen=True, slots=True)
class IngestInfo:
    """An ingest that is under way or was left behind."""

    ref: str
    offset_bytes: int
    updated_s: float


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a collection removed (or would remove)."""

    blobs: tuple[Digest, ...] = ()
    refs: tuple[str, ...] = ()
    freed_bytes: int = 0
    kept: int = 0
    complete: bool = field(default=True)
    """False if a limit ended it early; the next collection goes on."""


def needs_none(_digest: Digest) -> bool:
    """Nobody needs any blob beyond those that are kept or leased."""
    return False


class BlobWriter(Protocol):
    """One ingest. Use as a context manager: leaving it without commit keeps the ingest for a later resume."""

    @property
    def offset_bytes(self) -> int:
        """How many bytes were written so far (after a reopen: how many are durable)."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; NoSpaceError or TooLargeError leave the offset where it was."""

    def digest(self) -> Digest:
        """The sha256 of everything written so far."""

    def checkpoint(self) -> int:
        """Make what was written durable; the offset a resume starts from."""

    def restart(self) -> None:
        """Forget everything written so far (the source changed)."""

    def commit(self, *, digest: Digest | None = None, size_bytes: int | None = None) -> BlobInfo:
        """Publish; see the rules. BadDataError if the expectation does not hold: the ingest is then gone."""

    def abort(self) -> None:
        """Forget the ingest."""

    def close(self) -> None:
        """Let go of the ingest and keep it."""

    def abandon(self) -> None:
        """Let go of the ingest and leave what is stored exactly as it is: another process writes it now."""

    def __enter__(self) -> BlobWriter: ...
    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class BlobStore(Protocol):
    """See the module's docstring: it is the specification."""

    def ingest(self, ref: str, *, lease: str | None = None, max_bytes: int | None = None) -> BlobWriter:
        """Start or resume an ingest; BusyError if the ref has a writer."""

    def ingests(self) -> Sequence[IngestInfo]:
        """Ingests under way or left behind, by ref."""

    def abort(self, ref: str) -> None:
        """Forget an ingest that has no writer; unknown is success."""

    def info(self, digest: Digest) -> BlobInfo:
        """The blob; NotFoundError if absent."""

    def find_ingest(self, ref: str) -> IngestInfo | None:
        """An ingest under way or left behind, or None."""

    def open(self, digest: Digest, *, offset_bytes: int = 0, verify: bool = False) -> AbstractContextManager[BinaryIO]:
        """Read a blob from ``offset_bytes``; ``verify`` (whole reads only) checks the digest on the way."""

    def path(self, digest: Digest) -> str | None:
        """A local file with exactly the blob's bytes for sendfile, or None if the store has none."""

    def redirect_url(self, digest: Digest) -> str | None:
        """An address from which a reader may get exactly the blob's bytes by itself for a while; None if the store gives none."""

    def list(self) -> Iterator[BlobInfo]:
        """Every blob, in digest order."""

    def delete(self, digest: Digest, *, needed: Callable[[Digest], bool] = needs_none) -> None:
        """Remove a blob; NotFoundError if absent, BusyError if it is leased or, asked after the leases, ``needed``."""

    def verify(self, digest: Digest) -> None:
        """Re-read and compare; BadDataError (and quarantine) if it is damaged."""

    def lease(self, name: str, digests: Collection[Digest] = (), *, ttl_s: float) -> None:
        """Create or extend a lease, and add digests to it."""

    def leases(self) -> Sequence[str]:
        """Names of the leases that have not expired, sorted."""

    def leased(self, name: str) -> Sequence[Digest]:
        """Digests a lease holds, sorted; none if there is no such lease, or no more.

        A commit adds its digest before the ingest is gone: whoever died in between finds here what it had made.
        """

    def release(self, name: str) -> None:
        """End a lease; unknown is success."""

    def collect(
        self,
        keep: Collection[Digest],
        *,
        grace_s: float,
        dry_run: bool = False,
        limit: int | None = None,
        needed: Callable[[Digest], bool] = needs_none,
    ) -> CollectReport:
        """Remove what nothing keeps; see the rules. ``needed`` has the last word on each blob, after the leases."""

    def close(self) -> None:
        """Release the store."""
