"""Leases as objects, one each, so that every replica sees them. Read anew whenever they decide about something."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import msgspec

from imaging.blobs.leases import LEASE_DIGESTS_MAX, LEASE_NAME_MAX_BYTES, LeaseRecord
from imaging.blobs.s3_bucket import S3Bucket
from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, NotFoundError

LEASES = "leases/"

PRUNE_AFTER_S = 86400.0
"""A lease that ended so long ago is removed. Not sooner: its owner may be taking it up again just now, and S3 can't tell."""


class S3Leases:
    """The leases of one bucket. Not locked: one lease has one owner, and the store calls it under its own lock."""

    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket

    @staticmethod
    def _key(name: str) -> str:
        return f"{LEASES}{hashlib.sha256(name.encode(errors='replace')).hexdigest()}"

    def find(self, name: str) -> LeaseRecord | None:
        """The live lease of that name, or None."""
        return self._live(self._load(self._key(name)))

    def _live(self, record: LeaseRecord | None) -> LeaseRecord | None:
        return record if record is not None and record.expires_s > self._bucket.now_s() else None

    def _load(self, key: str) -> LeaseRecord | None:
        """As stored. One that cannot be read stops the caller: going on would let its blobs be collected."""
        try:
            return msgspec.json.decode(self._bucket.read(key), type=LeaseRecord)
        except NotFoundError:
            return None
        except msgspec.MsgspecError as err:
            raise BadDataError(f"the lease object is damaged: {key}") from err

    def live(self) -> Sequence[LeaseRecord]:
        """Every live lease, by name."""
        records = [self._live(self._load(stored.key)) for stored in self._bucket.list(LEASES)]
        return sorted((record for record in records if record is not None), key=lambda record: record.name)

    def extend(self, name: str, digests: Collection[Digest], *, ttl_s: float) -> None:
        """Create a lease, or make it last longer and hold more; never shorter or less."""
        if not name or not name.isprintable() or len(name.encode(errors="replace")) > LEASE_NAME_MAX_BYTES:
            raise InvalidArgumentError(
                f"a lease's name has 1 to {LEASE_NAME_MAX_BYTES} bytes of printable text: {name[:80]!r}"
            )
        old = self.find(name)
        held = (old.digests if old else set()) | {str(digest) for digest in digests}
        if len(held) > LEASE_DIGESTS_MAX:
            raise InvalidArgumentError(f"a lease holds at most {LEASE_DIGESTS_MAX} digests: {name!r}")
        expires = max(old.expires_s if old else 0.0, self._bucket.now_s() + ttl_s)
        record = LeaseRecord(name=name, expires_s=expires, digests=held)
        self._bucket.put(self._key(name), msgspec.json.encode(record))

    def add(self, name: str | None, digest: Digest) -> None:
        """Let a live lease hold one more digest; no lease, or one that has ended, holds nothing."""
        if name is not None and self.find(name) is not None:
            self.extend(name, [digest], ttl_s=0.0)

    def require(self, name: str) -> None:
        """NotFoundError unless the lease is live."""
        if self.find(name) is None:
            raise NotFoundError(f"no such lease: {name[:80]!r}")

    def release(self, name: str) -> None:
        """End a lease; unknown is success."""
        self._bucket.delete(self._key(name))

    def prune(self) -> None:
        """Forget leases that ended long ago."""
        for stored in list(self._bucket.list(LEASES)):
            record = self._load(stored.key)
            if record is not None and record.expires_s < self._bucket.now_s() - PRUNE_AFTER_S:
                self._bucket.delete(stored.key)
