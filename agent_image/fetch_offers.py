"""In which forms an image can be had, the best first.

From the image service: an increment onto an older version that is here, then the full volume stream, then the bytes as they are stored;
all by chunks that are verified before they are used. A raw disk that is stored packed is taken as it is, because its volume gets the
same guid here as in the service's stream: then nobody has to wait until the service has made one. From anywhere else, and where the
service knows no chunks: the bytes as they come, verified as a whole.

An older version is an image here that has the same name (or that the service names as the origin). Whether it fits is not guessed: the
stream says the guid it builds on, and the driver refuses another one before anything is written.

Whoever asks for a digest gets exactly the bytes that have it: then nothing is derived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from agent_image.fetch_chunks import ChunkedBody, RangeBudget
from agent_image.fetch_http import CancelToken, FetchLimits, HttpBody
from agent_image.fetch_raw import guid_of_disk
from agent_image.fetch_server import ImageServer
from agent_image.fetch_service import Form, ServiceImage, ServiceQuestions
from agent_image.fetch_spool import Spool
from agent_image.store_images import PROPERTY_IMAGE, PROPERTY_SNAPSHOT, Images
from imaging.digests import Digest
from imaging.errors import ConflictError, TooLargeError
from imaging.names import SnapshotName

PROPERTY_NAME = "mistify:name"
"""What the image service calls an image; its versions share it."""

BASES_MAX = 2
"""Older versions that are tried before the full stream is taken: each costs a round trip and a derivation."""

_RAW = "raw"

NAME_MAX_BYTES = 1024
"""What every version of ZFS takes as the value of a user property."""


class Body(Protocol):
    """The bytes of one form."""

    url: str
    expected_bytes: int | None
    digest: Digest | None
    """What they are as a whole."""
    type: str
    """What the server says the image is for."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; empty at the end."""

    def wake(self) -> None:
        """From another thread: no more bytes are wanted."""


class Wanted(Protocol):
    """What the offers need to know of an order."""

    @property
    def id(self) -> str:
        """The image."""

    @property
    def source(self) -> str:
        """Where it is; empty for the image service's own."""

    @property
    def digest(self) -> str:
        """What its bytes must be; empty if any will do."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One form: how to open its bytes, and what is known of the image then."""

    url: str
    open: Callable[[], AbstractContextManager[Body]]
    origin: SnapshotName | None = None
    """The snapshot an increment is received onto."""
    digest: str = ""
    """Of the image as the service stores it, if these bytes are made from it."""
    kind: str = ""
    guid: int | None = None
    """Of the volume that a raw disk becomes, as the service's own stream of it has it."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Properties of the image's dataset."""
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What the offers for one attempt share."""

    questions: ServiceQuestions
    cancel: CancelToken
    spool: Spool


class Offers:
    """See the module's docstring; blocking."""

    def __init__(self, images: Images, server: ImageServer, limits: FetchLimits) -> None:
        self._images = images
        self._driver = images.pool.driver
        self._server = server
        self._limits = limits
        self._budget = RangeBudget()

    def of(self, order: Wanted, cancel: CancelToken, spool: Spool) -> Iterator[Offer]:
        """The offers for an order, the last of which is always the bytes as they come. What arrives is kept in ``spool``."""
        url = self._server.url(order.id, order.source)
        attempt = _Attempt(ServiceQuestions(self._server, self._limits, cancel), cancel, spool)
        found = attempt.questions.find_image(url)
        facts: Mapping[str, str] = {}
        kind = ""
        if found is not None:
            base_url, image = found
            facts, kind = _facts(image), image.type
            if not order.digest:
                for base_id, origin in self._bases(order.id, image):
                    form = Form(base_url, image.id, {"format": "zvol", "from": base_id})
                    yield self._derived(form, image, attempt, origin)
                if not _is_packed_raw(image):
                    yield self._derived(Form(base_url, image.id, {"format": "zvol"}), image, attempt)
            yield self._chunked(Form(base_url, image.id, {}), image, attempt)
        headers = self._server.headers_for(url)

        def open_body() -> AbstractContextManager[Body]:
            return HttpBody(url, self._limits, cancel, headers, spool)

        yield Offer(url, open_body, kind=kind, facts=facts, is_last=True)

    def _chunked(self, form: Form, image: ServiceImage, attempt: _Attempt) -> Offer:
        headers = self._server.headers_for(form.download_url)

        def open_body() -> AbstractContextManager[Body]:
            try:
                chunks = attempt.questions.get_chunks(form)
            except TooLargeError:  # too long a list to hold: then these bytes are verified as a whole
                return HttpBody(form.download_url, self._limits, attempt.cancel, headers, attempt.spool)
            if not form.query and str(chunks.digest) != image.digest:
                raise ConflictError(
                    f"the chunks are of {chunks.digest}, the image is {image.digest}: {form.chunks_url}"
                )
            return ChunkedBody(
                form.download_url, chunks, self._limits, attempt.cancel, headers, self._budget, attempt.spool
            )

        guid = guid_of_disk(image.content_digest, image.virtual_size_bytes) if image.format == _RAW else None
        return Offer(form.image_url, open_body, kind=image.type, facts=_facts(image), guid=guid)

    def _derived(self, form: Form, image: ServiceImage, attempt: _Attempt, origin: SnapshotName | None = None) -> Offer:
        stored = self._chunked(form, image, attempt)
        return replace(stored, origin=origin, digest=image.digest, guid=None)

    def _bases(self, image_id: str, image: ServiceImage) -> Sequence[tuple[str, SnapshotName]]:
        """Older versions that are here: ids and snapshots, the most promising first."""
        found: list[tuple[bool, int, str, SnapshotName]] = []
        for info in self._driver.list(self._images.pool.images):
            own_id, part = info.properties.get(PROPERTY_IMAGE, ""), info.properties.get(PROPERTY_SNAPSHOT)
            if not own_id or part is None or own_id == image_id or info.name != self._images.dataset(own_id):
                continue
            same_name = bool(image.name) and info.properties.get(PROPERTY_NAME) == image.name
            if same_name or own_id == image.origin:
                found.append((own_id == image.origin, info.createtxg, own_id, info.name @ part))
        found.sort(key=lambda one: one[:2], reverse=True)
        return [(own_id, snapshot) for _, _, own_id, snapshot in found[:BASES_MAX]]


def _is_packed_raw(image: ServiceImage) -> bool:
    """Whether the stored bytes are as good as a stream: a disk without its zeros' bulk, of known content."""
    known = guid_of_disk(image.content_digest, image.virtual_size_bytes) is not None
    return image.format == _RAW and image.compression not in {"", "none"} and known


def _facts(image: ServiceImage) -> Mapping[str, str]:
    name = image.name
    return {PROPERTY_NAME: name} if 0 < len(name.encode()) < NAME_MAX_BYTES else {}
