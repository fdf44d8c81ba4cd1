"""LocalBlobStore: blobs as read-only files, one directory, one owning process.

    blobs/sha256/<hh>/<hex>      a blob, mode 0444; its modification time says when it was last committed
    ingest/<sha256 of ref>/      an ingest (:mod:`imaging.blobs.ingest`)
    quarantine/<hex>.<time>      a blob whose bytes no longer match its name
    leases/<sha256 of name>.json a lease
    lock                         the owner

Races. Everything that decides about a name (commit's rename, delete, collect's unlink, leases) happens under one lock
and is short; hashing, copying and fsync of data happen outside. Committing a digest that exists renews its time, so that
a collection that runs meanwhile sees a young blob.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from imaging.blobs.aftermath import logged_after
from imaging.blobs.base import BlobInfo, CollectReport, IngestInfo, needs_none
from imaging.blobs.ingest import Ingest, load_state, recover_ingest, ref_key, remove_ingest
from imaging.blobs.leases import LeaseBook
from imaging.blobs.space import RESERVE_FREE_BYTES, Space
from imaging.blobs.sweep import QUARANTINE_KEEP_S, Sweep
from imaging.blobs.verifying import BUFFER_BYTES, VerifyingReader
from imaging.blobs.writer import LocalBlobWriter
from imaging.digests import Digest
from imaging.errors import BusyError, InvalidArgumentError, NotFoundError, UnavailableError
from imaging.files import LockFile, fsync_directory, make_directory, os_errors

_HEX = re.compile(r"[0-9a-f]{64}\Z")
_log = logging.getLogger(__name__)


class LocalBlobStore:
    """BlobStore in one directory; see the module's docstring and the contract's."""

    def __init__(
        self,
        directory: Path | str,
        *,
        quota_bytes: int | None = None,
        reserve_free_bytes: int = RESERVE_FREE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        root = make_directory(Path(directory))
        self._blobs, self._ingests, self._quarantine = root / "blobs" / "sha256", root / "ingest", root / "quarantine"
        self._clock = clock
        self._lock = threading.RLock()
        self._writers: dict[str, LocalBlobWriter | None] = {}
        self._closed = False
        self._space = Space(root, quota_bytes=quota_bytes, reserve_free_bytes=reserve_free_bytes)
        self._lock_file = LockFile(root / "lock").acquire()
        try:
            self._make_layout()
            self._leases = LeaseBook(root / "leases")
            self._recover()
        except BaseException:
            self._lock_file.release()
            raise

    def _make_layout(self) -> None:
        """All directories, before any blob: a commit never waits for, or depends on, a directory being made durable."""
        for path in (self._blobs, self._ingests, self._quarantine):
            make_directory(path)
        folders = [self._blobs / f"{number:02x}" for number in range(256)]
        with os_errors(f"cannot make the directories of {self._blobs}"):
            for path in folders:
                path.mkdir(exist_ok=True)
        fsync_directory(self._blobs)

    def _recover(self) -> None:
        """Remove what a crash left, trust what may be trusted, and count it all."""
        for directory in self._ingest_directories():
            size = recover_ingest(directory)
            if size is None:
                remove_ingest(directory)
            else:
                self._space.give(-size)
        with os_errors("cannot read the blob store"):
            self._space.give(-sum(path.stat().st_size for path in self._quarantine.iterdir()))
        self._space.give(-sum(blob.size_bytes for blob in self.list()))

    @property
    def used_bytes(self) -> int:
        """Bytes of blobs, ingests and quarantine: what counts against the quota."""
        return self._space.used_bytes

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the blob store is closed")

    def _blob_path(self, digest: Digest) -> Path:
        if digest.algorithm != "sha256" or not _HEX.match(digest.hex):
            raise InvalidArgumentError(f"a blob is named by its sha256 digest, not by {str(digest)[:160]!r}")
        return self._blobs / digest.hex[:2] / digest.hex

    # -- writing ---------------------------------------------------------------------------------------------------------

    def ingest(self, ref: str, *, lease: str | None = None, max_bytes: int | None = None) -> LocalBlobWriter:
        """See BlobStore."""
        key = ref_key(ref)
        with self._lock:
            self._check_open()
            if lease is not None:
                self._leases.require(lease, now_s=self._clock())
            if key in self._writers:
                raise BusyError(f"the ingest has a writer: {ref[:80]!r}", [ref])
            self._writers[key] = None  # ours from here on, though hashing a long prefix may take a while
        try:
            files = Ingest(self._ingests / key, ref, lease=lease, now_s=self._clock())
        except BaseException:
            with self._lock:
                del self._writers[key]
            raise
        writer = LocalBlobWriter(self, files, self._space, self._clock, max_bytes)
        with self._lock:
            self._writers[key] = writer
        if self._closed:  # closed while the prefix was hashed
            writer.close()
            self._check_open()
        return writer

    def publish(self, files: Ingest) -> BlobInfo:
        """Make a complete, synced ingest a blob (called by its writer). After the rename nothing fails the call."""
        digest = files.hasher.digest()
        target = self._blob_path(digest)
        now = self._clock()
        with self._lock, os_errors(f"cannot publish blob {digest}"):
            self._check_open()
            self._leases.add(files.state.lease, digest, now_s=now)
            known = target.exists()
            os.utime(target if known else files.data_path, (now, now))  # a collection sees a young blob
            if known:
                self._space.give(files.offset_bytes)
            else:
                files.data_path.rename(target)
        with logged_after("cannot finish publishing", digest):
            fsync_directory(target.parent)
            remove_ingest(files.directory, durably=False)
        return BlobInfo(digest, files.offset_bytes, now)

    def let_go(self, files: Ingest) -> None:
        """The writer of this ingest is done (called by the writer)."""
        with self._lock:
            self._writers.pop(files.directory.name, None)

    def ingests(self) -> Sequence[IngestInfo]:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            infos = [self._ingest_info(path) for path in self._ingest_directories()]
        return sorted((info for info in infos if info is not None), key=lambda info: info.ref)

    def find_ingest(self, ref: str) -> IngestInfo | None:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            return self._ingest_info(self._ingests / ref_key(ref))

    def _ingest_directories(self) -> Sequence[Path]:
        """What is named like an ingest; a stranger's file is left alone."""
        with os_errors("cannot list the ingests"):
            return sorted(path for path in self._ingests.iterdir() if _HEX.match(path.name) and path.is_dir())

    def _ingest_info(self, directory: Path) -> IngestInfo | None:
        state = load_state(directory)
        try:
            stat = (directory / "data").stat()
        except FileNotFoundError:
            return None  # at its very beginning or end
        return IngestInfo(state.ref, stat.st_size, max(state.updated_s, stat.st_mtime)) if state else None

    def abort(self, ref: str) -> None:
        """See BlobStore."""
        directory = self._ingests / ref_key(ref)
        with self._lock:
            self._check_open()
            if directory.name in self._writers:
                raise BusyError(f"the ingest has a writer: {ref[:80]!r}", [ref])
            self._drop_idle(directory)

    def _drop_idle(self, directory: Path) -> None:
        info = self._ingest_info(directory)
        remove_ingest(directory)
        self._space.give(info.offset_bytes if info else 0)

    # -- reading ---------------------------------------------------------------------------------------------------------

    def info(self, digest: Digest) -> BlobInfo:
        """See BlobStore."""
        self._check_open()
        path = self._blob_path(digest)
        with self._absent_named(digest):
            stat = path.stat()
        return BlobInfo(digest, stat.st_size, stat.st_mtime)

    @contextmanager
    def _absent_named(self, digest: Digest) -> Iterator[None]:
        with os_errors(f"cannot read blob {digest}"):
            try:
                yield
            except FileNotFoundError as err:
                raise NotFoundError(f"no such blob: {digest}") from err

    @contextmanager
    def open(self, digest: Digest, *, offset_bytes: int = 0, verify: bool = False) -> Iterator[BinaryIO]:
        """See BlobStore."""
        self._check_open()
        path = self._blob_path(digest)
        with self._absent_named(digest):
            file = path.open("rb")
        with file:
            size = os.fstat(file.fileno()).st_size
            if not 0 <= offset_bytes <= size or (verify and offset_bytes):
                raise InvalidArgumentError(f"cannot read blob {digest} from {offset_bytes} of {size} bytes")
            if verify:
                raw = VerifyingReader(file.fileno(), digest, lambda: self._set_aside(digest, file.fileno()))
                yield cast("BinaryIO", io.BufferedReader(raw, BUFFER_BYTES))
            else:
                file.seek(offset_bytes)
                yield file

    def path(self, digest: Digest) -> str | None:
        """See BlobStore."""
        self.info(digest)
        return str(self._blob_path(digest))

    def redirect_url(self, digest: Digest) -> str | None:
        """See BlobStore: a file is for this machine."""
        self.info(digest)
        return None

    def list(self) -> Iterator[BlobInfo]:
        """See BlobStore."""
        self._check_open()
        return self._walk()

    def _walk(self) -> Iterator[BlobInfo]:
        with os_errors("cannot list the blob store"):
            folders = sorted(path for path in self._blobs.iterdir() if path.is_dir())
        for folder in folders:
            with os_errors("cannot list the blob store"):
                names = sorted(path.name for path in folder.iterdir() if _HEX.match(path.name))
            for name in names:
                with contextlib.suppress(NotFoundError):  # removed since we looked
                    yield self.info(Digest("sha256", name))

    def verify(self, digest: Digest) -> None:
        """See BlobStore."""
        with self.open(digest, verify=True) as reader:
            while reader.read(BUFFER_BYTES):
                pass

    def _set_aside(self, digest: Digest, fd: int) -> None:
        """Move the damaged file an open descriptor shows out of the readers' way, unless the name has another file by now."""
        path = self._blob_path(digest)
        aside = self._quarantine / f"{digest.hex}.{time.time_ns()}"
        with logged_after("cannot quarantine", digest), self._lock, os_errors(f"cannot quarantine blob {digest}"):
            if path.exists() and os.path.samestat(path.stat(), os.fstat(fd)):
                path.rename(aside)
                os.utime(aside, (self._clock(), self._clock()))
                fsync_directory(path.parent)
                fsync_directory(self._quarantine)
                _log.error("blob quarantined", extra={"component": "blobs", "digest": str(digest)})

    # -- removing --------------------------------------------------------------------------------------------------------

    def delete(self, digest: Digest, *, needed: Callable[[Digest], bool] = needs_none) -> None:
        """See BlobStore."""
        with self._lock:
            blob = self.info(digest)
            holders = self._leases.holders(digest, now_s=self._clock())
            if holders:
                raise BusyError(f"the blob is leased: {digest}", holders)
            if needed(digest):
                raise BusyError(f"the blob is needed: {digest}")
            self._unlink(blob)
        fsync_directory(self._blob_path(digest).parent)

    def _unlink(self, blob: BlobInfo) -> None:
        with self._absent_named(blob.digest):
            self._blob_path(blob.digest).unlink()
        self._space.give(blob.size_bytes)

    def lease(self, name: str, digests: Collection[Digest] = (), *, ttl_s: float) -> None:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            now = self._clock()
            self._leases.extend(name, digests, expires_s=now + ttl_s, now_s=now)

    def leases(self) -> Sequence[str]:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            return self._leases.names(now_s=self._clock())

    def leased(self, name: str) -> Sequence[Digest]:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            return self._leases.digests(name, now_s=self._clock())

    def release(self, name: str) -> None:
        """See BlobStore."""
        with self._lock:
            self._check_open()
            self._leases.release(name)

    def collect(
        self,
        keep: Collection[Digest],
        *,
        grace_s: float,
        dry_run: bool = False,
        limit: int | None = None,
        needed: Callable[[Digest], bool] = needs_none,
    ) -> CollectReport:
        """See BlobStore. ``limit`` bounds the removals. The lock is taken for each removal anew: writers hardly notice."""
        sweep = Sweep(frozenset(keep), self._clock() - grace_s, dry_run, limit, needed)
        if not dry_run:
            with self._lock:
                self._check_open()
                self._leases.prune(now_s=self._clock())
        self._sweep_ingests(sweep)
        for blob in self.list():
            if not sweep.complete:
                break
            self._sweep_blob(blob.digest, sweep)
        self._sweep_quarantine(sweep)
        return sweep.report()

    def _sweep_ingests(self, sweep: Sweep) -> None:
        for info in self.ingests():
            directory = self._ingests / ref_key(info.ref)
            with self._lock:
                if self._ingest_needed(directory, sweep):
                    sweep.kept += 1
                elif sweep.may_remove():
                    sweep.refs.append(info.ref)
                    sweep.freed_bytes += info.offset_bytes
                    if not sweep.dry_run:
                        self._drop_idle(directory)

    def _ingest_needed(self, directory: Path, sweep: Sweep) -> bool:
        """Decided from what is there now, under the lock: the list may be old."""
        state, info = load_state(directory), self._ingest_info(directory)
        if state is None or info is None or directory.name in self._writers:
            return True
        return self._leases.is_live(state.lease, now_s=self._clock()) or info.updated_s > sweep.before_s

    def _sweep_blob(self, digest: Digest, sweep: Sweep) -> None:
        with self._lock, contextlib.suppress(NotFoundError):
            blob = self.info(digest)  # again, under the lock: it may have been committed anew
            leased = self._leases.holders(digest, now_s=self._clock())
            if digest in sweep.keep or leased or blob.created_s > sweep.before_s or sweep.needed(digest):
                sweep.kept += 1
            elif sweep.may_remove():
                if not sweep.dry_run:
                    self._unlink(blob)
                sweep.blobs.append(digest)
                sweep.freed_bytes += blob.size_bytes

    def _sweep_quarantine(self, sweep: Sweep) -> None:
        if sweep.dry_run:
            return
        before = self._clock() - QUARANTINE_KEEP_S
        with self._lock, os_errors("cannot clean the quarantine"):
            for path in list(self._quarantine.iterdir()):
                stat = path.stat()
                if stat.st_mtime < before:
                    path.unlink()
                    self._space.give(stat.st_size)
                    sweep.freed_bytes += stat.st_size

    def close(self) -> None:
        """Release the store; writers still open are closed and their ingests kept."""
        with self._lock:
            writers = [writer for writer in self._writers.values() if writer is not None]
        for writer in writers:
            writer.close()
        with self._lock:
            self._closed = True
            self._lock_file.release()

    def __enter__(self) -> LocalBlobStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
