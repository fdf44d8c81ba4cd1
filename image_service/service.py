"""ImageService: what the image service does, without HTTP, JSON or SQL.

The service owns id, status, sizes and times of every record; callers choose source, type and comment. An image is seen as complete only
after its bytes are durable under their digest. What a call acknowledged survives a crash; what it did not is gone, or goes on by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime

import msgspec

from image_service.bodies import Piece
from image_service.collector import Collector, fetch_ref, upload_ref
from image_service.facts import Facts
from image_service.importer import Importer, utc_now
from image_service.inspector import Inspector
from image_service.lifecycle import (
    UNFINISHED,
    UNKNOWN_SIZE,
    Details,
    Expected,
    Image,
    ImageStatus,
    ImageType,
    new_fetch,
    new_upload,
    set_failed,
    set_finished,
    set_pending,
)
from image_service.metadata import MetadataStore
from image_service.news import LOOK_S, News
from image_service.sources import SourcePolicy
from image_service.spool import Pools, Spool, settled
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.digests import Digest
from imaging.errors import (
    BadDataError,
    ConflictError,
    InvalidArgumentError,
    LeaseLostError,
    NotFoundError,
    UnavailableError,
)
from imaging.kv.leases import Fence

TWINS_SINGLY_MAX = 50
"""Contents looked up one by one; beyond it reading the whole index takes fewer calls."""

OWED_MARK = "unfinished-1"
"""Every record is in the index of unfinished ones as it should be."""

WATCHERS_MAX = 500
"""Callers that wait at once: together they look 2,000 times a second."""

log = logging.getLogger(__name__)


class ImageService:
    """See the module's docstring. Lives on one event loop: ``start``, use, ``close``."""

    def __init__(
        self,
        records: MetadataStore,
        blobs: BlobStore,
        importer: Importer,
        collector: Collector,
        inspector: Inspector,
        *,
        policy: SourcePolicy,
        pools: Pools,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._records = records
        self._blobs = blobs
        self._importer = importer
        self._collector = collector
        self._admission = inspector.admission
        self._inspector = inspector
        self._policy = policy
        self._offload = pools.records
        self._data = pools.data
        self._now = now
        self._watchers = 0
        self._news = News(records.engine)
        self._news.on_deleted(importer.drop)
        self._parked = False

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Clear away what a crash left, and go on with every unfinished fetch that nobody is at."""
        await self._data(self._collector.recover)
        await self._offload(self._note_owed)
        self._news.start()
        await self._importer.take_over()

    def _note_owed(self) -> None:
        """Records of before there was an index of unfinished ones: once over, they are in it."""
        if self._records.is_marked(OWED_MARK):
            return
        for image in self._records.iterate():
            if image.status in UNFINISHED:
                self._records.update(image.id, (lambda same: same) if image.source else self._lost)
        self._records.mark(OWED_MARK)

    def _lost(self, image: Image) -> Image:
        return set_failed(image, "the upload was cut off by a restart of the service", now=self._now())

    async def close(self) -> None:
        """Park what is unfinished."""
        self._parked = True
        await self._news.close()
        await self._importer.park()

    # -- reading -----------------------------------------------------------------------------------------------------

    async def list(self, image_type: ImageType | None = None) -> Sequence[Image]:
        """Images (of one type), in id order."""
        return [self._live(image) for image in await self._offload(self._records.shown.list, image_type)]

    async def page(
        self, fits: Callable[[Image], bool], *, after_id: str = "", limit: int | None = None
    ) -> tuple[Sequence[Image], bool]:
        """Images that fit, in id order, those behind ``after_id``; and whether there are more than ``limit``."""
        found = await self._offload(self._select, fits, after_id, None if limit is None else limit + 1)
        more = limit is not None and len(found) > limit
        return [self._live(image) for image in (found[:limit] if more else found)], more

    def _select(self, fits: Callable[[Image], bool], after_id: str, limit: int | None) -> Sequence[Image]:
        return list(itertools.islice(filter(fits, self._records.shown.iterate(after_id)), limit))

    async def twins(self, images: Sequence[Image]) -> Mapping[str, Sequence[str]]:
        """For each image's id the ids of others with the same content."""
        return await self._offload(self._twins, images)

    def _twins(self, images: Sequence[Image]) -> Mapping[str, Sequence[str]]:
        digests = {image.content_digest for image in images if image.content_digest}
        if len(digests) > TWINS_SINGLY_MAX:
            known = self._records.shown.contents()
        else:
            shown = self._records.shown
            known = {digest: shown.ids_by_content(Digest.parse(digest)) for digest in digests}
        return {
            image.id: [other for other in known.get(image.content_digest, ()) if other != image.id] for image in images
        }

    async def get(self, image_id: str) -> Image:
        """The image; NotFoundError."""
        return self._live(await self._offload(self._records.shown.get_by_id, image_id))

    async def watch(self, image_id: str) -> AsyncGenerator[Image, None]:
        """The image as it is, then whenever it has changed, until nothing more will come; NotFoundError, also when it is deleted."""
        if self._watchers >= WATCHERS_MAX:
            raise UnavailableError("too many callers are waiting for images; try again later")
        self._watchers += 1
        try:
            shown: Image | None = None
            with self._news.listening(image_id) as changed:
                while not self._parked and (shown is None or shown.status in UNFINISHED):
                    changed.clear()
                    image = await self.get(image_id)
                    if image != shown:
                        yield image
                    shown = image
                    if image.status in UNFINISHED:
                        await self._wait(image, changed)
        finally:
            self._watchers -= 1

    async def _wait(self, image: Image, changed: asyncio.Event) -> None:
        """Until there is news. Of a fetch in this process there is some all the time: its size."""
        here = self._importer.received_bytes(image.id) is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S if here else self._news.look_s):
                await changed.wait()

    def _live(self, image: Image) -> Image:
        """The record with its size as of now, not as of the last checkpoint."""
        received = self._importer.received_bytes(image.id)
        if received is None or image.status is not ImageStatus.DOWNLOADING:
            return image
        return msgspec.structs.replace(image, size_bytes=received)

    async def get_blob(self, image_id: str) -> tuple[Image, BlobInfo]:
        """A complete image and its blob; NotFoundError (``incomplete image``)."""
        image = await self._offload(self._records.shown.get_by_id, image_id)
        if image.status is not ImageStatus.COMPLETE:
            raise NotFoundError("incomplete image")
        return image, await self._data(self._blobs.info, image.blob)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def create(
        self,
        source: str,
        image_type: ImageType,
        details: Details = Details(),  # noqa: B008 - immutable
        expected: Expected = Expected(),  # noqa: B008 - immutable
    ) -> Image:
        """Fetch a source in the background; the record as it is now.

        A source that is there already gives its record; one whose fetch failed is tried again. ConflictError if it is there
        with another type (or was asked for with another digest).
        """
        self._policy.check_url(source)
        check_expected(expected)
        self._importer.check_room()
        wanted = new_fetch(str(uuid.uuid4()), source, image_type, details, expected)
        image, added = await settled(self._offload(self._records.ensure, wanted))
        if not added:
            _check_same(image, wanted)
            image = await self._retry(image)
        if image.status in UNFINISHED:
            self._importer.start(image.id)
        return self._live(image)

    async def _retry(self, image: Image) -> Image:
        """Start a failed fetch anew, unless somebody else was faster."""
        if image.status is not ImageStatus.ERROR:
            return image
        try:
            return await settled(self._offload(self._records.update, image.id, set_pending))
        except ConflictError:
            return await self._offload(self._records.get_by_id, image.id)

    def check_upload(self, length_bytes: int) -> None:
        """TooLargeError if so long an upload is refused whatever else is stored."""
        self._admission.check_size(length_bytes)

    async def upload(
        self,
        image_type: ImageType,
        chunks: AsyncIterator[Piece],
        *,
        length_bytes: int = UNKNOWN_SIZE,
        details: Details = Details(),  # noqa: B008 - immutable
        expected: Expected = Expected(),  # noqa: B008 - immutable
    ) -> Image:
        """Store what ``chunks`` gives; the complete record. Whatever goes wrong leaves nothing."""
        size_bytes = _one_size(length_bytes, expected.size_bytes)
        image = new_upload(str(uuid.uuid4()), image_type, details, check_expected(expected), now=self._now())
        turn = await self._offload(self._records.replica.session)
        ref = upload_ref(image.id, turn.name)
        inspect = functools.partial(self._inspector.begin, image_type)
        try:
            with await self._offload(self._admission.reserve, ref, size_bytes) as room:
                limit = self._admission.size_max_bytes
                spool = await Spool.open(
                    self._blobs, self._data, room, max_bytes=limit, keep=False, inspect=inspect, turn=turn
                )
                async with spool:
                    async for chunk in chunks:
                        await spool.write(chunk)
                    return await settled(self._publish(image, turn, spool, expected.digest, size_bytes))
        except LeaseLostError as err:
            raise UnavailableError("the upload was paused for too long; send it again") from err
        finally:
            await settled(self._data(self._collector.clear, ref))

    async def _publish(self, image: Image, turn: Fence, spool: Spool, digest: Digest | None, size_bytes: int) -> Image:
        info = await spool.commit(digest=digest, size_bytes=None if size_bytes == UNKNOWN_SIZE else size_bytes)
        published: list[Image] = []

        def record(facts: Facts) -> None:
            published.append(set_finished(image, info.digest, info.size_bytes, facts, now=self._now()))
            self._records.put(published[-1], fence=turn)

        ref = upload_ref(image.id, turn.name)
        await self._data(self._inspector.publish, ref, image, info, spool.inspection, record)
        return published[-1]

    async def delete(self, image_id: str) -> Image:
        """Remove an image: its record first, so that nothing brings it back, then its fetch, then its bytes."""
        image = await settled(self._offload(self._records.delete, image_id))
        await settled(self._clear(image))
        return image

    async def _clear(self, image: Image) -> None:
        await self._importer.cancel(image.id)
        await self._data(self._collector.clear, fetch_ref(image.id), image.blob if image.digest else None)


def check_expected(expected: Expected) -> Expected:
    """InvalidArgumentError if what is expected can't be compared with what is computed."""
    if expected.digest and expected.digest.algorithm != "sha256":
        raise InvalidArgumentError("digest of an image must be sha256")
    return expected


def _one_size(length_bytes: int, said_bytes: int) -> int:
    """The length of an upload, from the request's and from what its bringer says."""
    if UNKNOWN_SIZE not in {length_bytes, said_bytes} and length_bytes != said_bytes:
        raise BadDataError(f"the upload has {length_bytes} bytes, not {said_bytes}")
    return said_bytes if length_bytes == UNKNOWN_SIZE else length_bytes


def _check_same(image: Image, wanted: Image) -> None:
    """The record that is there must be what was asked for."""
    if image.type is not wanted.type:
        raise ConflictError(f"source is there as type {image.type}, not {wanted.type} (image {image.id})")
    known = image.digest or image.expected_digest
    if wanted.expected_digest and known and known != wanted.expected_digest:
        raise ConflictError(f"source is there with digest {known} (image {image.id})")
