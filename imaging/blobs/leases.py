"""Leases on disk: what may not be collected, and until when."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import msgspec

from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, NotFoundError
from imaging.files import atomic_write_bytes, fsync_directory, make_directory, os_errors, remove_temporaries

LEASE_DIGESTS_MAX = 10_000
"""A lease is one piece of work; its file is rewritten whenever it grows."""

LEASE_NAME_MAX_BYTES = 512
"""Longer than any id a caller would build one from."""


class LeaseRecord(msgspec.Struct, kw_only=True):
    """One lease as stored."""

    name: str
    expires_s: float
    digests: set[str]


class LeaseBook:
    """The leases of one store. Not locked: the store calls it under its own lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)
        self._leases: dict[str, LeaseRecord] = {}
        remove_temporaries(directory)
        for path in sorted(directory.glob("*.json")):
            record = self._load(path)
            self._leases[record.name] = record

    @staticmethod
    def _load(path: Path) -> LeaseRecord:
        """A lease that cannot be read stops the store: going on would let its blobs be collected."""
        with os_errors(f"cannot read lease {path}"):
            data = path.read_bytes()
        try:
            return msgspec.json.decode(data, type=LeaseRecord)
        except msgspec.MsgspecError as err:
            raise BadDataError(f"the lease file is damaged: {path}") from err

    def _path(self, name: str) -> Path:
        return self._directory / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def _save(self, record: LeaseRecord) -> None:
        if len(record.digests) > LEASE_DIGESTS_MAX:
            raise InvalidArgumentError(f"a lease holds at most {LEASE_DIGESTS_MAX} digests: {record.name!r}")
        atomic_write_bytes(self._path(record.name), msgspec.json.encode(record))
        self._leases[record.name] = record

    def extend(self, name: str, digests: Collection[Digest], *, expires_s: float, now_s: float) -> None:
        """Create a lease, or make it last longer and hold more; never shorter or less."""
        if not name or not name.isprintable() or len(name.encode(errors="replace")) > LEASE_NAME_MAX_BYTES:
            raise InvalidArgumentError(
                f"a lease's name has 1 to {LEASE_NAME_MAX_BYTES} bytes of printable text: {name[:80]!r}"
            )
        old = self._leases.get(name)
        if old is None or old.expires_s <= now_s:
            old = LeaseRecord(name=name, expires_s=expires_s, digests=set())
        more = old.digests | {str(digest) for digest in digests}
        self._save(LeaseRecord(name=name, expires_s=max(old.expires_s, expires_s), digests=more))

    def add(self, name: str | None, digest: Digest, *, now_s: float) -> None:
        """Let a live lease hold one more digest; no lease, or one that has ended, holds nothing."""
        if name is not None and self.is_live(name, now_s=now_s):
            self.extend(name, [digest], expires_s=0.0, now_s=now_s)

    def require(self, name: str, *, now_s: float) -> None:
        """NotFoundError unless the lease is live."""
        if not self.is_live(name, now_s=now_s):
            raise NotFoundError(f"no such lease: {name[:80]!r}")

    def is_live(self, name: str | None, *, now_s: float) -> bool:
        """Whether the lease exists and has not expired."""
        record = self._leases.get(name) if name is not None else None
        return record is not None and record.expires_s > now_s

    def holders(self, digest: Digest, *, now_s: float) -> list[str]:
        """Names of the live leases that hold the digest."""
        text = str(digest)
        return sorted(r.name for r in self._leases.values() if r.expires_s > now_s and text in r.digests)

    def digests(self, name: str, *, now_s: float) -> list[Digest]:
        """What a lease holds, sorted; nothing if it has ended."""
        record = self._leases.get(name)
        if record is None or record.expires_s <= now_s:
            return []
        return [Digest.parse(text) for text in sorted(record.digests)]

    def names(self, *, now_s: float) -> list[str]:
        """Names of the live leases, sorted."""
        return sorted(record.name for record in self._leases.values() if record.expires_s > now_s)

    def release(self, name: str) -> None:
        """End a lease; unknown is success."""
        if name in self._leases:
            with os_errors(f"cannot release lease {name!r}"):
                self._path(name).unlink(missing_ok=True)
            fsync_directory(self._directory)
            del self._leases[name]

    def prune(self, *, now_s: float) -> None:
        """Forget leases that have expired."""
        for name in [r.name for r in self._leases.values() if r.expires_s <= now_s]:
            self.release(name)
