"""One collection in a bucket: what it knows beyond any other collection."""

from __future__ import annotations

from imaging.blobs import sweep
from imaging.blobs.s3_bucket import StoredObject

QUARANTINE = "quarantine/"

UPLOAD_KEEP_S = 86400.0
"""An upload that is put together takes minutes. After a day nobody goes on with it."""


class Sweep(sweep.Sweep):
    """One collection under way in a bucket."""

    __slots__ = ()

    def is_old(self, stored: StoredObject) -> bool:
        """Whether the object is past the grace."""
        return stored.modified_s <= self.before_s
