"""Looks at images: begins an inspection with the first byte, and concludes it when the blob is stored and before anybody sees the image.

An image whose bytes did not all pass one inspection (its transfer went on after a restart) is read again from the store. Bytes that a
complete image of the same type has already are not looked at twice.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from image_service import diskfile
from image_service.admission import Admission
from image_service.collector import Collector
from image_service.facts import Facts, ImageFormat, InspectionLimits
from image_service.imagestore.describing import describe
from image_service.inspection import Inspection
from image_service.lifecycle import Details, Image, ImageStatus, ImageType, facts_of, set_damaged, set_seen
from image_service.metadata import MetadataStore
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    InvalidArgumentError,
    LeaseLostError,
    MistifyError,
    TooLargeError,
    UnavailableError,
)

INSPECTIONS_MAX = 16
"""At once, while bytes come in: a decoder may hold 128 MiB. Further images are read when they are stored."""

READS_MAX = 4
"""Stored images read again at once: more only fight for the disk and the processors."""

LOOK_TTL_S = 24 * 3600.0
"""How long a stored blob is protected while it is read again: 1 TiB at 13 MB/s."""

READ_BYTES = 1 << 20
"""Read at once from the store."""

log = logging.getLogger(__name__)


class Inspector:
    """See the module's docstring. Blocking; threads may share it."""

    def __init__(
        self,
        records: MetadataStore,
        blobs: BlobStore,
        admission: Admission,
        collector: Collector,
        *,
        limits: InspectionLimits = InspectionLimits(),  # noqa: B008 - immutable
        directory: Path | None = None,
    ) -> None:
        self._records = records
        self._blobs = blobs
        self.admission = admission
        self._collector = collector
        self._limits = limits
        self._directory = directory
        self._running: weakref.WeakSet[Inspection] = weakref.WeakSet()
        self._reads = threading.BoundedSemaphore(READS_MAX)

    def begin(self, image_type: ImageType) -> Inspection | None:
        """An inspection to be fed from the first byte on; None if enough are under way."""
        if len(self._running) >= INSPECTIONS_MAX:
            return None
        inspection = Inspection(image_type, self._limits)
        self._running.add(inspection)
        return inspection

    def publish(
        self,
        lease: str,
        image: Image,
        info: BlobInfo,
        inspection: Inspection | None,
        record: Callable[[Facts], None],
    ) -> None:
        """Look to the end at a blob committed under a lease, then let ``record`` name it.

        If either fails, the blob goes; but not if the turn was over, or something is down: then whoever tries again goes on with it.
        """
        try:
            self._blobs.lease(lease, ttl_s=LOOK_TTL_S)
            facts = self.conclude(image, info, inspection)
        except (LeaseLostError, UnavailableError):
            raise
        except MistifyError:
            self._collector.discard(lease, info.digest)
            raise
        self._collector.publish(lease, info.digest, lambda: record(facts))

    def unseen(self) -> Sequence[Image]:
        """Complete images nobody has looked at: taken over from the original service, or stored by an older version of this one."""
        complete = (image for image in self._records.iterate() if image.status is ImageStatus.COMPLETE)
        return [image for image in complete if not image.unpacked_sha512]

    def catch_up(self, image: Image) -> None:
        """Look at such an image now: its record gets the facts, or says why it is not offered any more."""
        try:
            facts = self.conclude(image, self._blobs.info(image.blob), None)
        except (BadDataError, TooLargeError) as err:
            reason = err.message
            log.warning("image is refused: %s", reason, extra={"image_id": image.id})
            self._records.update(image.id, lambda old: set_damaged(old, image.blob, reason))
        else:
            self._records.update(image.id, lambda old: set_seen(old, image.blob, facts))

    def conclude(self, image: Image, info: BlobInfo, inspection: Inspection | None) -> Facts:
        """What the image's stored bytes are; BadDataError or TooLargeError if it must not become complete."""
        facts = self._known(image, info.digest)
        if facts is None:
            with self._reads:
                facts = self._inspect(image, info, inspection)
        if image.expected_format and image.expected_format != facts.format:
            raise BadDataError(f"the image is {facts.format}, not {image.expected_format}")
        return self._described(image, info, facts)

    def _described(self, image: Image, info: BlobInfo, facts: Facts) -> Facts:
        """The facts with what a container image says about itself, as far as a record can hold it."""
        if image.type is not ImageType.CONTAINER or facts.format not in {ImageFormat.TAR, ImageFormat.RAW}:
            return facts
        said = describe(self._blobs, info.digest, facts.compression, lambda: self._unpacked(image, info, facts))
        labels = {key: value for key, value in said.labels.items() if fits(key, value)}
        return replace(facts, name=said.name, version=said.version, labels=labels)

    @contextmanager
    def _unpacked(self, image: Image, info: BlobInfo, facts: Facts) -> Iterator[int]:
        """All unpacked bytes in a file, for which there must be room."""
        with (
            self.admission.reserve(f"unpacked-{image.id}", 0) as room,
            diskfile.unpacked(
                self._blobs,
                info.digest,
                facts,
                self._directory,
                self._limits,
                lambda size, held: room.announce(size, received_bytes=held),
            ) as fd,
        ):
            yield fd

    def _known(self, image: Image, digest: Digest) -> Facts | None:
        """What was found when the same bytes were looked at before."""
        for image_id in self._records.ids_by_digest(digest):
            other = self._records.find_by_id(image_id)
            if other is not None and other.type is image.type and other.unpacked_sha512:
                return facts_of(other)
        return None

    def _inspect(self, image: Image, info: BlobInfo, inspection: Inspection | None) -> Facts:
        if inspection is None or inspection.fed_bytes != info.size_bytes:
            inspection = Inspection(image.type, self._limits)
            with self._blobs.open(info.digest, verify=True) as stored:
                while piece := stored.read(READ_BYTES):
                    inspection.feed(piece)
        facts = inspection.finish(info.digest)
        if not diskfile.needs_look(facts):
            return facts
        with self.admission.reserve(f"unpacked-{image.id}", 0) as room:
            return diskfile.look(
                self._blobs,
                info.digest,
                facts,
                directory=self._directory,
                limits=self._limits,
                room=lambda size, held: room.announce(size, received_bytes=held),
            )


def fits(key: str, value: str) -> bool:
    """Whether a record may have this label."""
    try:
        Details(labels={key: value}).check()
    except InvalidArgumentError:
        return False
    return True
