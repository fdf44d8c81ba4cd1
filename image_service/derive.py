"""Blobs made from blobs: volume streams, increments, raw disks and other packings, made on demand and kept as blobs.

A request names an image and a form (:class:`~image_service.derive_forms.Form`). The form becomes a recipe over stored blobs; the blob
a recipe made is looked up, or made once for everybody who asks meanwhile (:class:`~image_service.derive_work.SharedWork`). What is
being made is an ingest under a lease of its own; the lease ends when the index names the blob. Among the processes that share the
stores one makes it: the one that has the turn of the ingest's name. When that one dies, whoever is asked next goes on: what the dead one
stored counts if it is how the work begins now, so that only the rest is stored.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from image_service.admission import Admission, Reservation
from image_service.chunks import ChunkHasher, ChunkIndex, ChunkList, compute
from image_service.collector import Collector
from image_service.derive_cache import Derived, DerivedIndex
from image_service.derive_forms import Contents, Form, Recipe, make, resolve
from image_service.derive_work import DeriveLimits, SharedWork, Work
from image_service.lifecycle import Image
from imaging.blobs.base import BlobInfo, BlobStore, BlobWriter
from imaging.digests import Digest
from imaging.errors import LeaseLostError, NoSpaceError, NotFoundError, UnavailableError
from imaging.files import make_directory, remove_temporaries
from imaging.kv.base import KeyValue
from imaging.kv.leases import Fence
from imaging.threads import Offload

DERIVE_PREFIX = "derive-"

LEASE_TTL_S = 3600.0
"""How long a derivation is protected without a sign of life."""

LEASE_RENEW_S = 600.0
"""How often it gives one: six times within a lease's life."""

TURN_WAIT_S = 0.5
"""How often to look whether another process has made what is wanted, or died."""

FindBlob = Callable[[str], Awaitable[tuple[Image, BlobInfo]]]
"""A complete image and its blob by id; NotFoundError."""

log = logging.getLogger(__name__)


class DerivedStore:
    """Recipes to blobs, on the calling thread: the part of :class:`Deriver` that blocks. The collector knows of its blobs."""

    def __init__(
        self, blobs: BlobStore, store: KeyValue, collector: Collector, admission: Admission, limits: DeriveLimits
    ) -> None:
        self._blobs = blobs
        self._collector = collector
        self._admission = admission
        self.contents = Contents(blobs)
        self.index = DerivedIndex(store, limits)
        self.chunks = ChunkIndex(store)
        collector.add_cache(self)
        admission.add_reclaimer(self.make_room)

    @property
    def ref_prefix(self) -> str:
        """See BlobCache."""
        return DERIVE_PREFIX

    def find(self, recipe: Recipe) -> BlobInfo | None:
        """The blob a recipe made, if it is still there."""
        derived = self.index.find(recipe)
        return None if derived is None else self._check(recipe, derived)

    def _check(self, recipe: Recipe, derived: Derived) -> BlobInfo | None:
        try:
            return self._blobs.info(derived.blob)
        except NotFoundError:
            log.warning("a derived image is gone and will be made again", extra={"digest": derived.digest})
            self.index.forget(recipe)
            return None

    def derive(self, recipe: Recipe, work: Work) -> BlobInfo:
        """Make a recipe's blob, unless somebody else has; if there is no room, try again with older derived blobs gone."""
        while True:
            found = self.find(recipe)
            if found is not None:
                return found
            turn = self._collector.replica.find_turn(DERIVE_PREFIX + recipe.key)
            if turn is not None:
                with turn:
                    return self.find(recipe) or self._derive_here(recipe, work, turn)
            work.wait(TURN_WAIT_S)

    def _derive_here(self, recipe: Recipe, work: Work, turn: Fence) -> BlobInfo:
        try:
            return self._derive(recipe, work, turn)
        except NoSpaceError:
            if not self.make_room(work.done_bytes):
                raise
            return self._derive(recipe, work, turn)
        except LeaseLostError as err:
            raise UnavailableError("the image is being made by another replica; try again later") from err

    def _derive(self, recipe: Recipe, work: Work, turn: Fence) -> BlobInfo:
        ref = turn.name
        started_s = time.monotonic()
        self._blobs.lease(ref, [recipe.source, *([recipe.base] if recipe.base else [])], ttl_s=LEASE_TTL_S)
        try:
            info, chunks = self._write(recipe, work, turn)
            if chunks is not None:
                self.chunks.save(chunks)
            self.index.save(recipe, info, turn)
        finally:
            if not turn.is_lost:
                self._collector.forget(ref)
        seconds = round(time.monotonic() - started_s, 3)
        log.info("image derived", extra={"key": recipe.key, "size_bytes": info.size_bytes, "duration_s": seconds})
        return info

    def _write(self, recipe: Recipe, work: Work, turn: Fence) -> tuple[BlobInfo, ChunkList | None]:
        ref, limit = turn.name, self._admission.size_max_bytes
        with (
            self._admission.reserve(ref) as room,
            self._blobs.ingest(ref, lease=ref, max_bytes=limit) as writer,
        ):
            try:
                hasher = self._go_on(recipe, work, turn, room, writer)
                if hasher is None:
                    log.warning("what a dead replica stored is not how this begins", extra={"key": recipe.key})
                    writer.restart()
                    hasher = self._go_on(recipe, work, turn, room, writer) or ChunkHasher()
                turn.check()
                info = writer.commit()
            except LeaseLostError:
                writer.abandon()
                raise
            except BaseException:
                writer.abort()
                raise
        return info, hasher.finish(info.digest)

    def _go_on(
        self, recipe: Recipe, work: Work, turn: Fence, room: Reservation, writer: BlobWriter
    ) -> ChunkHasher | None:
        """Make everything and store what is not stored yet; None if what is stored is something else."""
        hasher, there = ChunkHasher(), _Beginning(writer)
        renew_at = time.monotonic() + LEASE_RENEW_S
        for piece in make(recipe, self._blobs, self.contents, work):
            turn.check()
            hasher.update(piece)
            rest = there.strip(piece)
            if rest is None:
                return None
            writer.write(rest)
            room.receive(writer.offset_bytes)
            if time.monotonic() > renew_at:
                renew_at = time.monotonic() + LEASE_RENEW_S
                self._blobs.lease(turn.name, ttl_s=LEASE_TTL_S)
        return hasher if there.is_passed else None

    def list_chunks(self, info: BlobInfo, work: Work) -> ChunkList:
        """A blob's chunks, computed if nobody has."""
        found = self.chunks.find(info)
        if found is None:
            found = compute(self._blobs, info, work)
            self.chunks.save(found)
        return found

    def make_room(self, wanted_bytes: int) -> bool:
        """Give up derived blobs of so many bytes, those used longest ago first; whether there were any."""
        gone = self.index.make_room(wanted_bytes)
        self._drop(gone)
        return bool(gone)

    # -- garbage -----------------------------------------------------------------------------------------------------

    def sweep(self, wanted: Callable[[Digest], bool]) -> None:
        """Forget what is stale, unneeded or too much. ``wanted``: whether a record names a blob."""
        self._drop(self.index.sweep(wanted))
        self.chunks.sweep(wanted, self.index.digests())

    def source_gone(self, digest: Digest) -> None:
        """Give up what was made from a blob that no record names any more."""
        self._drop(self.index.forget_source(digest))

    def digests(self) -> set[Digest]:
        """Blobs the index names."""
        return self.index.digests()

    def needs(self, digest: Digest) -> bool:
        """Whether the index names a blob."""
        return self.index.needs(digest)

    def _drop(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            self._collector.drop(digest)


class _Beginning:
    """What an ingest held when it was opened, to be compared with what is made."""

    def __init__(self, writer: BlobWriter) -> None:
        self._left_bytes = writer.offset_bytes
        self._digest = writer.digest()
        self._hasher = hashlib.sha256()

    @property
    def is_passed(self) -> bool:
        """Whether everything that was there was made again."""
        return self._left_bytes == 0

    def strip(self, piece: bytes | memoryview) -> memoryview | None:
        """The part of a piece that is not there yet; None if what is there turns out to be something else."""
        view = memoryview(piece)
        if self.is_passed:
            return view
        known = view[: self._left_bytes]
        self._hasher.update(known)
        self._left_bytes -= len(known)
        if self._left_bytes == 0 and self._hasher.hexdigest() != self._digest.hex:
            return None
        return view[len(known) :]


class Deriver:
    """See the module's docstring. Lives on one event loop: construct, ``recover``, use, ``close``."""

    def __init__(
        self,
        find_blob: FindBlob,
        store: DerivedStore,
        offload: Offload,
        directory: Path,
        *,
        limits: DeriveLimits,
    ) -> None:
        self._find_blob = find_blob
        self._store = store
        self._offload = offload
        make_directory(directory)
        remove_temporaries(directory)
        self._work = SharedWork(directory, limits)

    @property
    def running(self) -> int:
        """Derivations accepted and not ended."""
        return self._work.running

    @property
    def started(self) -> int:
        """Derivations begun since the start."""
        return self._work.started

    async def get_blob(self, image_id: str, form: Form) -> BlobInfo:
        """The blob with an image in a form, made if need be.

        NotFoundError (an image is absent or incomplete), WrongKindError or InvalidArgumentError (there is no such form of it),
        UnavailableError (still being made, or too much is), those of the formats.
        """
        image, info = await self._find_blob(image_id)
        if form.is_stored:
            return info
        recipe = await self._resolve(image, form)
        if recipe is None:
            return info
        found = await self._offload(self._store.find, recipe)
        if found is not None:
            return found
        return await self._work.run(recipe.key, lambda work: self._store.derive(recipe, work))

    async def _resolve(self, image: Image, form: Form) -> Recipe | None:
        base: Image | None = None
        if form.base_id:
            try:
                base, _ = await self._find_blob(form.base_id)
            except NotFoundError as err:
                raise NotFoundError(f"the image named by from: {err.message}") from err

        def look() -> Recipe | None:
            contents = self._store.contents
            older = (base.blob, contents.note(base)) if base is not None else None
            return resolve(form, image.blob, contents.note(image), older)

        return await self._offload(look)

    async def get_chunks(self, info: BlobInfo) -> ChunkList:
        """The chunks of a blob; UnavailableError while they are computed for longer than a request may wait."""
        found = await self._offload(self._store.chunks.find, info)
        key = f"chunks/{info.digest.hex}"
        if found is not None:
            return found
        return await self._work.run(key, lambda work: self._store.list_chunks(info, work))

    async def close(self) -> None:
        """End what is being made; it starts anew when somebody asks again."""
        await self._work.close()
