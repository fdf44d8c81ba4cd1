"""Uploads in parts as they are kept beside the image records, for all replicas.

Keys::

    uploads/<id>    the upload, JSON
    asks/<turn>     empty; says that somebody waits for a turn that is held idly

Whoever writes to an upload has the turn ``tus-<id>`` and changes its record only during that turn. Blocking; threads may share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from image_service.collector import TUS_PREFIX
from image_service.lifecycle import Image
from image_service.metadata import MetadataStore
from image_service.replica import Replica
from imaging.errors import BadDataError, ConflictError, LeaseLostError
from imaging.kv.base import Compare, Delete, Entry, Operation, Put
from imaging.kv.leases import Fence

RECORDS = "uploads/"
ASKS = "asks/"


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """One upload as stored."""

    image: Image
    """What the image will be; its id is the upload's."""
    length_bytes: int
    metadata: str = ""
    """What the client said, as it said it."""
    expires_s: float = 0.0
    offset_bytes: int = 0
    """How much is durable, as of the last part that ended."""

    @property
    def ref(self) -> str:
        """The name of its ingest, of the lease that protects that, and of the turn at writing it."""
        return TUS_PREFIX + self.image.id


def _decode(entry: Entry) -> Upload:
    try:
        return msgspec.json.decode(entry.value, type=Upload)
    except msgspec.MsgspecError as err:
        raise BadDataError("the record of an upload is damaged") from err


class UploadRecords:
    """See the module's docstring."""

    def __init__(self, records: MetadataStore) -> None:
        self._records = records

    @property
    def replica(self) -> Replica:
        """This process among those that share the engine."""
        return self._records.replica

    def list(self, limit: int | None = None) -> Sequence[Upload]:
        """Every upload, at most so many."""
        return [_decode(entry) for entry in self._records.engine.list(RECORDS, limit=limit)]

    def find(self, upload_id: str) -> Upload | None:
        """The upload, or None."""
        entry = self._records.engine.get(RECORDS + upload_id)
        return _decode(entry) if entry else None

    def is_wanted(self, ref: str) -> bool:
        """Whether it is the ingest of an upload that may go on."""
        return ref.startswith(TUS_PREFIX) and self.find(ref.removeprefix(TUS_PREFIX)) is not None

    def is_image(self, upload: Upload) -> bool:
        """Whether it has become an image."""
        return self._records.find_by_id(upload.image.id) is not None

    def add(self, upload: Upload) -> None:
        """A new upload."""
        self._records.engine.transact([_put(upload)])

    def save(self, upload: Upload, turn: Fence) -> None:
        """A changed upload; LeaseLostError."""
        self._change(_put(upload), turn)

    def remove(self, upload: Upload, turn: Fence) -> None:
        """Forget an upload; LeaseLostError."""
        self._change(Delete(RECORDS + upload.image.id), turn)

    def _change(self, operation: Operation, turn: Fence) -> None:
        try:
            self._records.engine.transact([operation], [turn.compare])
        except ConflictError as err:
            raise LeaseLostError(f"the lease is lost: {turn.name}") from err

    def put_image(self, image: Image, turn: Fence) -> None:
        """An upload has become an image; LeaseLostError."""
        self._records.put(image, fence=turn)

    # -- asking for turns ------------------------------------------------------------------------------------------------

    def ask(self, turn_name: str) -> None:
        """Say that this turn is waited for."""
        self._records.engine.transact([Put(ASKS + turn_name, b"")])

    def unask(self, turn_name: str) -> None:
        """The turn was got; whoever else waits asks again."""
        self._records.engine.transact([Delete(ASKS + turn_name)])

    def asked(self) -> Sequence[tuple[str, Compare]]:
        """Turns somebody waits for, each with what is to be said to :meth:`heard`."""
        entries = self._records.engine.list(ASKS)
        return [(entry.key.removeprefix(ASKS), Compare(entry.key, entry.revision)) for entry in entries]

    def heard(self, ask: Compare) -> None:
        """The turn was given back, or nobody holds it."""
        try:
            self._records.engine.transact([Delete(ask.key)], [ask])
        except ConflictError:
            return  # somebody asks anew


def _put(upload: Upload) -> Put:
    return Put(RECORDS + upload.image.id, msgspec.json.encode(upload))
