"""One image, fetched: download, decompress, receive into a hidden dataset, verify, mark complete.

The stages overlap: one thread reads the network and computes the digest, one decompresses, and the caller's writes.
Nothing is visible before :meth:`agent_image.store_images.Images.publish`; the mark is put after the digest, the length and the
stream's own END were found right, so a marked incoming dataset is never fetched again. Until then what has arrived is kept
(:mod:`agent_image.fetch_spool`): another attempt, also after a restart, asks only for what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec

from agent_image.drivers.base import Readable
from agent_image.fetch_content import HEAD_BYTES, check_raw, decompressed, is_qcow2, stream_snapshot
from agent_image.fetch_http import CancelToken, FetchLimits, shown_url
from agent_image.fetch_offers import Body, Offer, Offers
from agent_image.fetch_pipe import ReadAhead, first_failure
from agent_image.fetch_qcow2 import first_bytes
from agent_image.fetch_raw import stream_of_disk, stream_of_raw
from agent_image.fetch_server import ImageServer, check_source
from agent_image.fetch_spool import Spool, Spools
from agent_image.guests_space import SpaceLedger
from agent_image.store_images import PROPERTY_IMAGE, Images, mark, parse_image_id
from imaging.digests import Digest, MultiHasher
from imaging.errors import (
    BadDataError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)
from imaging.names import DatasetName, SnapshotName

RAW_SNAPSHOT = "image"
"""Snapshot of an image that came as a raw disk; a stream brings its own name."""

KIND_MAX_CHARS = 64
"""Of an image's type: ``kvm`` and ``container`` are those in use, and the pool keeps it with the image."""

log = logging.getLogger(__name__)


class FetchOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted; the payload of a job."""

    id: str
    type: str = ""
    source: str = ""
    digest: str = ""

    @classmethod
    def checked(cls, image_id: str, *, kind: str = "", source: str = "", digest: str = "") -> FetchOrder:
        """From a request: InvalidArgumentError, InvalidNameError."""
        expected = str(Digest.parse(digest)) if digest else ""
        if kind and not _is_kind(kind):
            raise InvalidArgumentError(f"not a type of image: {kind[:80]!r}")
        return cls(id=parse_image_id(image_id), type=kind, source=check_source(source), digest=expected)

    @property
    def key(self) -> str:
        """The job's key: one image, one job."""
        return f"image/{self.id}"


@dataclass(slots=True)
class FetchProgress:
    """How far a fetch is; written by its threads, read by the event loop."""

    received_bytes: int = 0
    expected_bytes: int | None = None

    def to_job(self) -> dict[str, Any]:
        """What is stored with the job."""
        return {"received_bytes": self.received_bytes, "expected_bytes": self.expected_bytes}


class Fetcher:
    """Fetches images; blocking."""

    def __init__(
        self,
        images: Images,
        server: ImageServer,
        limits: FetchLimits,
        ledger: SpaceLedger,
        spools: Spools,
        *,
        count_bytes: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        self._images = images
        self._driver = images.pool.driver
        self._offers = Offers(images, server, limits)
        self._limits = limits
        self._ledger = ledger
        self._spools = spools
        self._count_bytes = count_bytes

    def fetch(self, order: FetchOrder, cancel: CancelToken, progress: FetchProgress) -> None:
        """Leave the image complete and marked in its incoming dataset, or nothing at all.

        ConflictError if it was cancelled; UnavailableError if another attempt may succeed.
        """
        incoming = self._images.pool.incoming(order.id)
        self._images.check_free(order.id)
        with self._spools.of(order.id) as spool:
            if self._is_complete(incoming, order.id):
                log.info("an image had arrived before the last stop", extra={"image_id": order.id})
            else:
                self._arrive(order, incoming, cancel, progress, spool)
            spool.discard()

    def forget(self, image_id: str) -> None:
        """Leave nothing of a fetch that will not go on."""
        self._clear(self._images.pool.incoming(image_id))
        with self._spools.of(image_id) as spool:
            spool.discard()

    def forget_others(self, unfinished: Collection[str]) -> None:
        """At start: keep only what belongs to fetches that will go on."""
        self._spools.keep_only(unfinished)

    def _arrive(
        self, order: FetchOrder, incoming: DatasetName, cancel: CancelToken, progress: FetchProgress, spool: Spool
    ) -> None:
        """From nothing to a marked dataset; an error leaves what was kept only if another attempt may use it."""
        self._clear(incoming)
        try:
            try:
                self._download(order, incoming, cancel, progress, spool)
            except BadDataError as err:
                if not spool.was_used:
                    raise
                log.warning("what was kept of an image is of no use", extra={"image_id": order.id, "why": err.message})
                self._clear(incoming)
                spool.discard()
                self._download(order, incoming, cancel, progress, spool)
        except BaseException as err:
            self._clear(incoming)
            if not cancel.cancelled and not (isinstance(err, MistifyError) and err.retryable):
                spool.discard()
            raise

    def _is_complete(self, incoming: DatasetName, image_id: str) -> bool:
        try:
            return self._driver.get(incoming).properties.get(PROPERTY_IMAGE) == image_id
        except NotFoundError:
            return False

    def _clear(self, incoming: DatasetName) -> None:
        try:
            self._driver.destroy(incoming, recursive=True)
        except NotFoundError:
            return  # nothing was left

    def _download(
        self, order: FetchOrder, incoming: DatasetName, cancel: CancelToken, progress: FetchProgress, spool: Spool
    ) -> None:
        """In the best form the source has; a form that is refused, or does not fit what is here, is followed by the next."""
        for offer in self._offers.of(order, cancel, spool):
            try:
                self._take(order, offer, incoming, cancel, progress)
            except (UnavailableError, NoSpaceError):
                raise
            except MistifyError as err:
                cancel.check()
                if offer.is_last:
                    raise
                log.info("a form of an image is passed over", extra={"image_id": order.id, "why": err.message})
                self._clear(incoming)
            else:
                return

    def _take(
        self, order: FetchOrder, offer: Offer, incoming: DatasetName, cancel: CancelToken, progress: FetchProgress
    ) -> None:
        with ExitStack() as stack:
            body = stack.enter_context(offer.open())
            # What is announced must fit now. Zeros and packed data make it more or less; the pool itself has the last word.
            promise = stack.enter_context(self._ledger.promise(body.expected_bytes or 0))
            progress.received_bytes, progress.expected_bytes = 0, body.expected_bytes
            wanted = Digest.parse(order.digest) if order.digest else None
            hasher = MultiHasher({"sha256", wanted.algorithm if wanted is not None else "sha256"})

            def watch(piece: bytes) -> None:
                hasher.update(piece)
                progress.received_bytes = hasher.size_bytes
                promise.taken(len(piece))
                self._count_bytes(len(piece))

            snapshot = self._store(body, incoming, watch, offer)
            for expected in (wanted, body.digest):
                _check_digest(body.url, hasher, expected)
            cancel.check()
            facts = mark(
                order.id,
                snapshot,
                kind=next(filter(_is_kind, (order.type, body.type, offer.kind)), ""),
                source=order.source and shown_url(offer.url),
                digest=offer.digest or str(hasher.digest()),
            )
            self._driver.set_properties(incoming, {**facts, **offer.facts})

    def _store(self, body: Body, incoming: DatasetName, watch: Callable[[bytes], None], offer: Offer) -> str:
        """Everything up to the end of the body; the snapshot's name."""
        stages: list[ReadAhead] = []
        with ExitStack() as stack:
            # Registered first, so done last: the threads end when their source does, and closing wakes them.
            network = stack.enter_context(ReadAhead(body, "fetch-network", watch=watch))
            stages.append(network)
            stack.callback(body.wake)
            try:
                plain = self._unpack(network, stages, stack)
                size_bytes = body.expected_bytes if plain is network else None
                snapshot = self._write(plain, incoming, size_bytes, offer)
                _drain(network)
            except MistifyError as err:
                failure = first_failure(stages, err)
                raise failure from (err if failure is not err else err.__cause__)
        return snapshot

    def _unpack(self, network: ReadAhead, stages: list[ReadAhead], stack: ExitStack) -> ReadAhead:
        """The stage that has the image's own bytes: the network's, or one more that decompresses."""
        # Room for the framing of a stream around the largest volume.
        unpacked = decompressed(network, size_max_bytes=2 * self._limits.image_max_bytes)
        if unpacked is None:
            return network
        stages.append(ReadAhead(unpacked, "fetch-decompress"))
        return stack.enter_context(stages[-1])

    def _write(self, plain: ReadAhead, incoming: DatasetName, size_bytes: int | None, offer: Offer) -> str:
        snapshot = stream_snapshot(plain)
        if snapshot is not None:
            self._receive(plain, incoming, snapshot, offer.origin)
            return snapshot
        toname = f"{incoming}@{RAW_SNAPSHOT}"
        if is_qcow2(head := plain.peek(HEAD_BYTES)):
            self._write_qcow2(plain, incoming, toname, offer)
            return RAW_SNAPSHOT
        check_raw(head)
        stream = stream_of_raw(
            plain,
            toname,
            size_bytes=size_bytes,
            size_max_bytes=self._limits.image_max_bytes,
            guid=offer.guid,
        )
        self._receive(stream, incoming, RAW_SNAPSHOT)
        return RAW_SNAPSHOT

    def _write_qcow2(self, plain: ReadAhead, incoming: DatasetName, toname: str, offer: Offer) -> None:
        size_max_bytes = self._limits.image_max_bytes
        with self._spools.disk_of_qcow2(plain, size_max_bytes=size_max_bytes) as disk:
            check_raw(first_bytes(disk, HEAD_BYTES))
            self._receive(stream_of_disk(disk, toname, guid=offer.guid), incoming, RAW_SNAPSHOT)

    def _receive(
        self, stream: Readable, incoming: DatasetName, snapshot: str, origin: SnapshotName | None = None
    ) -> None:
        info = self._driver.receive(incoming @ snapshot, stream, origin=origin)
        if info.volsize_bytes is None:
            raise BadDataError("the image is the stream of a filesystem, not of a volume")


def _is_kind(text: str) -> bool:
    """Whether a text can be what an image is for; servers say all kinds of things."""
    return 0 < len(text) <= KIND_MAX_CHARS and text.isprintable()


def _check_digest(url: str, hasher: MultiHasher, expected: Digest | None) -> None:
    if expected is None:
        return
    found = hasher.digest(expected.algorithm)
    if not expected.matches(found):
        raise BadDataError(f"{url} is not the image that was asked for: want {expected}, got {found}")


def _drain(network: ReadAhead) -> None:
    """BadDataError if the body goes on after the image has ended."""
    if network.read(1):
        raise BadDataError("bytes after the end of the image")
