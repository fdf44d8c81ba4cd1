"""Documents and records, parsed tolerantly: what is unknown is ignored, what is known must have its type.

``null`` is the same as absent. A number where a text is known (``id: 5``) makes the document malformed. Dates are kept as text.

Inheritance: a blank attribute of a product is taken from the top, of a version from its product, of an item from its version, for the
attributes both levels know. Aliases come first: an item whose ``attribute`` has ``value`` gains what ``_aliases`` says, over its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from imaging.errors import BadDataError

S = TypeVar("S", bound=msgspec.Struct)
Text = str | None


class ImageMetadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image as a cloud knows it. ``stream`` never goes to the wire."""

    id: str = msgspec.field(default_factory=str)
    storage: str = msgspec.field(default="", name="root_store")
    virt_type: str = msgspec.field(default="", name="virt")
    arch: str = ""
    version: str = ""
    region_alias: str = msgspec.field(default="", name="crsn")
    region_name: str = msgspec.field(default="", name="region")
    endpoint: str = ""
    stream: str = ""

    def to_wire(self) -> dict[str, str]:
        """The record's JSON object: ``id`` always, the rest if it is not empty."""
        wire: dict[str, str] = {"id": self.id, **msgspec.to_builtins(self)}
        wire.pop("stream", None)
        return wire


class CloudSpec(msgspec.Struct, frozen=True):
    """A region of a cloud, and where its API is."""

    region: Text = ""
    endpoint: Text = ""

    @property
    def is_empty(self) -> bool:
        """Whether it names no cloud at all."""
        return not self.region and not self.endpoint

    def matches(self, other: CloudSpec) -> bool:
        """Equal regions, and endpoints that differ at most in a final slash."""
        return (self.region or "") == (other.region or "") and _slashed(self.endpoint) == _slashed(other.endpoint)

    def __str__(self) -> str:
        return f"{{{self.region or ''} {self.endpoint or ''}}}"


def _slashed(url: Text) -> str:
    url = url or ""
    return url if url.endswith("/") else f"{url}/"


class ResolveInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer came from: what an audit wants to know."""

    source: str
    signed: bool
    index_url: str = msgspec.field(name="indexURL")
    mirror_url: str = msgspec.field(default="", name="mirrorURL")

    def to_wire(self) -> dict[str, Any]:
        """The JSON object; ``mirrorURL`` only if a mirror was used."""
        wire: dict[str, Any] = msgspec.to_builtins(self)
        if not self.mirror_url:
            del wire["mirrorURL"]
        return wire


class IndexEntry(msgspec.Struct):
    """What an index says about one products file."""

    format: Text = None
    datatype: Text = None
    path: Text = None
    products: list[Text] | None = None
    updated: Text = None
    cloudname: Text = None
    clouds: list[CloudSpec | None] | None = None

    def product_ids(self) -> frozenset[str]:
        """The products it lists."""
        return frozenset(name for name in self.products or () if name)

    def serves(self, cloud: CloudSpec) -> bool:
        """Whether it holds for that cloud: it names none, or this one."""
        return not self.clouds or any(one is not None and one.matches(cloud) for one in self.clouds)


class Index(msgspec.Struct):
    """An ``index:1.0`` document."""

    format: Text = None
    updated: Text = None
    index: dict[str, IndexEntry | None] | None = None

    def entries(self) -> list[tuple[str, IndexEntry]]:
        """``(content_id, entry)`` in document order."""
        return [(name, entry) for name, entry in (self.index or {}).items() if entry is not None]


class Item(msgspec.Struct):
    """An item of an image-ids document."""

    id: Text = None
    root_store: Text = None
    virt: Text = None
    arch: Text = None
    version: Text = None
    crsn: Text = None
    region: Text = None
    endpoint: Text = None


class Version(msgspec.Struct):
    """One version of a product."""

    release: Text = None
    version: Text = None
    arch: Text = None
    region: Text = None
    endpoint: Text = None
    items: dict[str, Item | None] | None = None


class Product(msgspec.Struct):
    """A product and its versions."""

    release: Text = None
    version: Text = None
    arch: Text = None
    region: Text = None
    endpoint: Text = None
    versions: dict[str, Version | None] | None = None


Aliases = dict[str, dict[str, dict[str, Text] | None] | None]


class Products(msgspec.Struct):
    """A ``products:1.0`` document of image ids."""

    format: Text = None
    updated: Text = None
    region: Text = None
    endpoint: Text = None
    aliases: Aliases | None = msgspec.field(default=None, name="_aliases")
    products: dict[str, Product | None] | None = None

    def product_ids(self) -> list[str]:
        """Names of the products, sorted."""
        return sorted(self.products or {})

    def find(self, product_id: str) -> Product | None:
        """A product with its aliases applied and its blanks filled, or None."""
        product = (self.products or {}).get(product_id)
        if product is None:
            return None
        _inherit(product, self, ("region", "endpoint"))
        for version in _present(product.versions):
            _inherit(version, product, ("release", "version", "arch", "region", "endpoint"))
            for item in _present(version.items):
                _apply_aliases(item, self.aliases or {})
                _inherit(item, version, ("version", "arch", "region", "endpoint"))
        return product


def _present(named: Mapping[str, S | None] | None) -> Iterator[S]:
    return (value for value in (named or {}).values() if value is not None)


def _inherit(child: msgspec.Struct, parent: msgspec.Struct, names: tuple[str, ...]) -> None:
    for name in names:
        if not getattr(child, name):
            setattr(child, name, getattr(parent, name))


def _apply_aliases(item: Item, aliases: Aliases) -> None:
    """Only fields of the item's own count; what an alias sets is not looked up again, so the order of fields can't matter."""
    own = {name: getattr(item, name) for name in item.__struct_fields__}
    for name, value in own.items():
        gained = (aliases.get(name) or {}).get(value) if value else None
        for attribute, text in (gained or {}).items():
            if attribute in own:
                setattr(item, attribute, text)


def to_metadata(item: Item) -> ImageMetadata:
    """An item as a record; blanks become empty texts."""
    return ImageMetadata(
        id=item.id or "",
        storage=item.root_store or "",
        virt_type=item.virt or "",
        arch=item.arch or "",
        version=item.version or "",
        region_alias=item.crsn or "",
        region_name=item.region or "",
        endpoint=item.endpoint or "",
    )


class MirrorReference(msgspec.Struct):
    """Which file lists the mirrors of a content id."""

    format: Text = None
    datatype: Text = None
    path: Text = None
    updated: Text = None
    clouds: list[CloudSpec | None] | None = None


class MirrorReferences(msgspec.Struct):
    """A site's ``mirrors.json``."""

    mirrors: dict[str, list[MirrorReference | None] | None] | None = None


class MirrorInfo(msgspec.Struct):
    """A mirror: its base URL and the products file there."""

    format: Text = None
    mirror: Text = None
    path: Text = None
    clouds: list[CloudSpec | None] | None = None


class Mirrors(msgspec.Struct):
    """A ``mirrors:1.0`` document."""

    format: Text = None
    updated: Text = None
    mirrors: dict[str, list[MirrorInfo | None] | None] | None = None


def decode_document(data: bytes, kind: type[S], what: str) -> S:
    """Parse a document; BadDataError begins with ``what`` and tells what is wrong in the JSON."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadDataError(f"{what}: {err}") from err


def check_format(found: Text, expected: str, url: str) -> None:
    """BadDataError unless the document says the format it must have; clients know these words for products too."""
    if found != expected:
        raise BadDataError(f'unexpected index file format "{found or ""}", expected "{expected}" at URL "{url}"')
