"""Finding images: over several sources, signed where it can be, with a note where the answer came from.

For each source in order a signed attempt (``.sjson`` names throughout) and, unless only signed data counts, an unsigned one. What is
*absent* from the signed side (no index, no products file, no match) leads to the unsigned side. What is *present and bad* never does.
The first source that has matching images answers. If none has, the answer is empty, or the first error that means something: bad data
before a missing index.

With ``compat`` a bad signature leads to the unsigned side too, and the error of the last source is the one that is raised.

Without keys nobody can tell a good signature from a bad one, so the signed side is then only looked at if nothing else counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from imaging.errors import BadDataError, MistifyError, NotFoundError, NotPermittedError
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.freshness import LastSeen
from imaging.simplestreams.mirrors import find_mirror, find_reference, parse_mirrors, parse_references
from imaging.simplestreams.model import (
    ImageMetadata,
    Index,
    MirrorInfo,
    MirrorReferences,
    Products,
    ResolveInfo,
    check_format,
    decode_document,
)
from imaging.simplestreams.paths import (
    IMAGE_IDS,
    INDEX_FILE_VERSION,
    INDEX_FORMAT,
    STREAMS_VERSION_V1,
    mirrors_path,
    unsigned_index,
)
from imaging.simplestreams.selecting import NoMatchError, choose_entry, parse_products, require_path, select_items
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import DataSource, HttpSource

NEWER_INDEX_VERSION = 2
"""``index2.json`` has what older clients could not read."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """How images are looked up: what makes the answer trustworthy."""

    only_signed: bool = False
    verifier: Verifier | None = None
    compat: bool = False
    last_seen: LastSeen | None = None
    mirror_content_id: str = ""
    """Whose mirrors to use; image lookups use none."""


@dataclass(slots=True)
class _Attempt:
    """One pass over one source, signed or not."""

    source: DataSource
    signed: bool
    lookup: Lookup
    index_url: str = ""
    mirror_url: str = ""
    seen: dict[str, str | None] = field(default_factory=dict)

    @property
    def info(self) -> ResolveInfo:
        """What an audit wants to know about it."""
        return ResolveInfo(
            source=self.source.description, signed=self.signed, index_url=self.index_url, mirror_url=self.mirror_url
        )

    def suffixed(self, path: str) -> str:
        """An unsigned document's path as this pass reads it."""
        return f"{path.removesuffix('.json')}.sjson" if self.signed else path

    # -- documents ---------------------------------------------------------------------------------------------------

    def read(self, source: DataSource, path: str) -> tuple[bytes, str]:
        """A document's text and URL. NotFoundError if it can't be had, BadDataError if nobody vouches for it."""
        try:
            fetched = source.fetch(path)
        except BadDataError:
            raise
        except MistifyError as err:
            raise NotFoundError(f'invalid URL "{source.url(path)}" not found') from err
        return self._plain(fetched.data), fetched.url

    def _plain(self, data: bytes) -> bytes:
        if not self.signed:
            return data
        if self.lookup.verifier is None:
            raise BadDataError("cannot read URL data, failed to parse public key: there is none")
        try:
            return self.lookup.verifier.verify_clearsigned(data).text
        except BadDataError as err:
            raise BadDataError(f"cannot read URL data, {err.message}") from err

    def _fresh(self, url: str, updated: str | None) -> None:
        if self.lookup.last_seen is not None:
            self.lookup.last_seen.check(url, updated)
            self.seen[url] = updated

    def index(self) -> Index:
        """The source's index: the newer one first, and only its absence leads to the older one."""
        try:
            data, url = self._read_index(NEWER_INDEX_VERSION)
        except NotFoundError:
            data, url = self._read_index(INDEX_FILE_VERSION)
        index = decode_document(data, Index, f'cannot unmarshal JSON index metadata at URL "{url}"')
        check_format(index.format, INDEX_FORMAT, url)
        self._fresh(url, index.updated)
        return index

    def _read_index(self, version: int) -> tuple[bytes, str]:
        path = self.suffixed(unsigned_index(STREAMS_VERSION_V1, version))
        self.index_url = self.source.url(path)
        try:
            return self.read(self.source, path)
        except BadDataError as err:
            raise BadDataError(f"cannot read index data, {err.message}") from err

    def mirror_references(self) -> MirrorReferences:
        """The source's mirrors; malformed ones are an error even if nobody asked for mirrors, as clients of old had it."""
        path = self.suffixed(f"{mirrors_path(STREAMS_VERSION_V1)}.json")
        try:
            data, url = self.read(self.source, path)
            return parse_references(data, url)
        except NotFoundError:
            return MirrorReferences()
        except BadDataError as err:
            raise BadDataError(f'cannot load mirror metadata at URL "{self.source.url(path)}": {err.message}') from err

    def products(self, index: Index, constraint: ImageConstraint, product_ids: Sequence[str]) -> Products:
        """The products document that answers the constraint."""
        mirror = self._find_mirror(self.mirror_references(), constraint)
        entry = choose_entry(index, IMAGE_IDS, constraint.cloud, product_ids, compat=self.lookup.compat)
        source, path = self.source, require_path(entry, self.index_url)
        if mirror is not None and mirror.mirror:
            source, path = HttpSource(mirror.mirror), mirror.path or path
            self.mirror_url = mirror.mirror
        try:
            data, url = self.read(source, path)
        except (NotFoundError, BadDataError) as err:
            raise BadDataError(f"cannot read product data, {err.message}") from err
        products = parse_products(data, url)
        self._fresh(url, products.updated)
        return products

    def _find_mirror(self, references: MirrorReferences, constraint: ImageConstraint) -> MirrorInfo | None:
        content_id = self.lookup.mirror_content_id
        if not content_id:
            return None
        try:
            reference = find_reference(references, content_id, IMAGE_IDS, constraint.cloud)
            data, url = self.read(self.source, reference.path or "")
            return find_mirror(parse_mirrors(data, url), content_id, constraint.cloud)
        except NotFoundError:
            return None

    def resolve(self, constraint: ImageConstraint) -> list[ImageMetadata]:
        """Images that answer the constraint; NoMatchError, or what is wrong with the source."""
        product_ids = constraint.product_ids()
        index = self.index()
        selected = select_items(self.products(index, constraint, product_ids), product_ids, constraint.region)
        if self.lookup.last_seen is not None:
            self.lookup.last_seen.remember(self.seen)
        return selected


def _is_absent(err: MistifyError) -> bool:
    """Whether something was not there, rather than there and bad; a server that fails has not said that nothing is there."""
    if isinstance(err, NoMatchError):
        return True
    cause: BaseException | None = err
    while cause is not None and isinstance(cause.__cause__, MistifyError):
        cause = cause.__cause__
    return isinstance(cause, (NotFoundError, NotPermittedError))


def _resolve_source(
    source: DataSource, constraint: ImageConstraint, lookup: Lookup
) -> tuple[list[ImageMetadata], ResolveInfo]:
    """What one source says: signed, then unsigned if it may."""
    if lookup.verifier is not None or lookup.only_signed:
        signed = _Attempt(source, signed=True, lookup=lookup)
        try:
            return signed.resolve(constraint), signed.info
        except MistifyError as err:
            if lookup.only_signed or not (lookup.compat or _is_absent(err)):
                raise _Failure(err, signed.info) from err
    unsigned = _Attempt(source, signed=False, lookup=lookup)
    try:
        return unsigned.resolve(constraint), unsigned.info
    except MistifyError as err:
        raise _Failure(err, unsigned.info) from err


class _Failure(Exception):  # noqa: N818 - carries an error and where it happened, is none itself
    def __init__(self, error: MistifyError, info: ResolveInfo) -> None:
        super().__init__(error)
        self.error = error
        self.info = info


def _verdict(failures: Sequence[_Failure], *, compat: bool) -> _Failure:
    """Which of the failures is told: the last, as the original had it, or the first of the most telling kind."""
    if compat:
        return failures[-1]
    bad = [one for one in failures if not isinstance(one.error, NotFoundError)]
    empty = [one for one in failures if isinstance(one.error, NoMatchError)]
    chosen = (bad or empty or list(failures))[0]
    for one in failures:
        if one is not chosen and not isinstance(chosen.error, NoMatchError):
            chosen.error.add_note(f"{one.info.source}: {one.error.message}")
    return chosen


def fetch(
    sources: Sequence[DataSource], constraint: ImageConstraint, lookup: Lookup | None = None
) -> tuple[list[ImageMetadata], ResolveInfo | None]:
    """Images that answer the constraint, sorted by id, and where they came from; see the module's docstring.

    Nothing that matches is an empty list. Without sources there is no info either. Raises NotFoundError or BadDataError.
    """
    lookup = lookup or Lookup()
    constraint.product_ids()  # an unknown series is an error whatever the sources say
    failures: list[_Failure] = []
    for source in sources:
        try:
            images, info = _resolve_source(source, constraint, lookup)
        except _Failure as failure:
            failures.append(failure)
        else:
            return sort_images(images), info
    if not failures:
        return [], None
    told = _verdict(failures, compat=lookup.compat)
    if isinstance(told.error, NoMatchError):
        return [], told.info
    raise told.error


def sort_images(images: Sequence[ImageMetadata]) -> list[ImageMetadata]:
    """Ascending by id, bytewise; equal ids keep their order."""
    return sorted(images, key=lambda image: image.id.encode())


def get_latest_image_id_metadata(
    data: bytes, constraint: ImageConstraint, url: str = "<unknown>"
) -> list[ImageMetadata]:
    """Images of a products document that is here already, unsorted; NotFoundError if none matches, BadDataError."""
    return select_items(parse_products(data, url), constraint.product_ids(), constraint.region)
