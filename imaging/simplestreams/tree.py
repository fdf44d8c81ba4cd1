"""Catalogues of downloads: every document of a tree, verified, and its items with everything they inherit.

Signed documents are read in either form, ``.sjson`` or ``.json`` with ``.json.gpg``. Rules as in :mod:`imaging.simplestreams.reader`: only
the absence of a signed index leads to an unsigned one, and only if that is allowed.

An index may name further indexes; a document that several of them name is read once.

An item's attributes are those of its document, product and version with its own on top, as text; what is no text or number is left
out. Reading wants what Ubuntu, linuxcontainers.org and Juju publish: downloads and image ids alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError
from imaging.simplestreams.freshness import LastSeen
from imaging.simplestreams.model import Index, ResolveInfo, check_format, decode_document
from imaging.simplestreams.paths import (
    IMAGE_DOWNLOADS,
    IMAGE_IDS,
    INDEX_FORMAT,
    PRODUCTS_FORMAT,
    check_path,
    signed_path,
)
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import DataSource

INDEX_PATH = "streams/v1/index.json"
DATATYPES = frozenset({IMAGE_DOWNLOADS, IMAGE_IDS})

NESTING_MAX = 4
"""Indexes below indexes. Publishers have one level; without a bound a server could lead on for ever."""

_DIGESTS = ("sha512", "sha256", "md5")
"""Strongest first."""

_HEAD = frozenset({"format", "updated", "content_id", "datatype", "products"})
_FILTER = re.compile(r"([\w|-]+)\s*(!=|!~|=|~)\s*(.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One item of a catalogue."""

    content_id: str
    product: str
    version: str
    name: str
    attributes: Mapping[str, str]

    @property
    def ftype(self) -> str:
        """What kind of file it is."""
        return self.attributes.get("ftype", "")

    @property
    def path(self) -> str:
        """Where it is below the tree's base; empty for an id. BadDataError if it leaves the tree."""
        return check_path(self.attributes.get("path", ""))

    @property
    def aliases(self) -> list[str]:
        """Names of its product."""
        return [alias.strip() for alias in self.attributes.get("aliases", "").split(",") if alias.strip()]

    @property
    def size_bytes(self) -> int:
        """Its size; BadDataError if the catalogue does not say."""
        text = self.attributes.get("size", "")
        if not text.isdecimal():
            raise BadDataError(f"catalogue gives no size for {self}")
        return int(text)

    @property
    def digest(self) -> Digest:
        """The strongest digest given; BadDataError if there is none."""
        for algorithm in _DIGESTS:
            if algorithm in self.attributes:
                try:
                    return Digest.parse(f"{algorithm}:{self.attributes[algorithm].lower()}")
                except InvalidArgumentError as err:
                    raise BadDataError(f"catalogue gives a bad {algorithm} for {self}") from err
        raise BadDataError(f"catalogue gives no digest for {self}")

    def __str__(self) -> str:
        return f"{self.product} {self.version} {self.name}"


def _flat(level: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in level.items() if isinstance(value, (str, int, float))}


def _table(level: Any, key: str) -> Mapping[str, Any]:
    """A table below a level; what is something else counts as empty."""
    value = level.get(key) if isinstance(level, dict) else None
    return value if isinstance(value, dict) else {}


class ProductsDocument:
    """A products file as it was published."""

    def __init__(self, content_id: str, datatype: str, data: Mapping[str, Any]) -> None:
        self.content_id = content_id
        self.datatype = datatype
        self.data = data

    @property
    def products(self) -> Mapping[str, Any]:
        """Products by name."""
        return _table(self.data, "products")

    @property
    def extra(self) -> dict[str, Any]:
        """Attributes of the top level, those of the format left out."""
        return {key: value for key, value in self.data.items() if key not in _HEAD}

    def items(self, products: Collection[str] | None = None) -> Iterator[StreamItem]:
        """Every item (of some products), in document order."""
        top = _flat(self.extra)
        for product, content in self.products.items():
            if not isinstance(content, dict) or (products is not None and product not in products):
                continue
            common = top | _flat(content)
            for version, level in _table(content, "versions").items():
                yield from self._items(product, version, common | _flat(level or {}), _table(level, "items"))

    def _items(
        self, product: str, version: str, common: dict[str, str], items: Mapping[str, Any]
    ) -> Iterator[StreamItem]:
        for name, item in items.items():
            if isinstance(item, dict):
                yield StreamItem(self.content_id, product, version, name, common | _flat(item))


class Filter:
    """``key OP value`` with OP of ``=``, ``!=``, ``~`` (a regular expression that is found somewhere), ``!~``."""

    def __init__(self, text: str) -> None:
        match = _FILTER.match(text.strip())
        if match is None:
            raise InvalidArgumentError(
                f"not a filter: {text[:80]!r} (want key=value, key!=value, key~regex or key!~regex)"
            )
        self.key, self._operator, self._value = match[1], match[2], match[3]
        try:
            self._pattern = re.compile(self._value)
        except re.error as err:
            if "~" in self._operator:
                raise InvalidArgumentError(f"not a regular expression: {self._value[:80]!r}: {err}") from err

    def accepts(self, attributes: Mapping[str, str]) -> bool:
        """Whether it holds; an attribute that is missing counts as empty."""
        value = attributes.get(self.key, "")
        found = self._pattern.search(value) is not None if "~" in self._operator else value == self._value
        return found != self._operator.startswith("!")


def with_names(item: StreamItem) -> dict[str, str]:
    """The attributes a filter may ask for: the item's, and where it stands."""
    names = {"product_name": item.product, "version_name": item.version, "item_name": item.name}
    return {**item.attributes, **names, "content_id": item.content_id}


def resolve_work(
    source: Collection[str],
    target: Collection[str],
    *,
    maximum: int | None = None,
    keep: bool = False,
    accepts: Callable[[str], bool] | None = None,
) -> tuple[list[str], list[str]]:
    """What to add (newest first) and what to remove (oldest first) so that ``target`` follows ``source``.

    With ``maximum`` so many of the newest names remain. With ``keep``, which needs it, names that left the source stay among them.
    """
    if keep and maximum is None:
        raise InvalidArgumentError("to keep what left the source, say how many in all")
    wanted = {name for name in source if accepts is None or accepts(name)}
    gone = {name for name in target if name not in source}
    union = wanted | (set(target) if keep else set(target) - gone)
    newest = sorted(union, reverse=True)[:maximum]
    add = [name for name in sorted(wanted, reverse=True) if name not in target and name in newest]
    return add, sorted(name for name in target if name not in newest)


@dataclass(frozen=True, slots=True)
class StreamCatalogue:
    """Everything a tree publishes, of the kinds that were asked for."""

    info: ResolveInfo
    documents: Sequence[ProductsDocument]

    def items(self) -> Iterator[StreamItem]:
        """Every item of every document."""
        for document in self.documents:
            yield from document.items()


class TreeReader:
    """Reads one tree."""

    def __init__(
        self,
        source: DataSource,
        verifier: Verifier | None = None,
        *,
        only_signed: bool = False,
        last_seen: LastSeen | None = None,
    ) -> None:
        self._source = source
        self._verifier = verifier
        self._only_signed = only_signed or verifier is not None
        self._last_seen = last_seen
        self._seen: dict[str, str | None] = {}
        self._read_paths: set[str] = set()

    def read(self, datatypes: Collection[str] = DATATYPES) -> StreamCatalogue:
        """Every document of these kinds; NotFoundError, BadDataError. A tree with keys must be signed throughout."""
        self._seen, self._read_paths = {}, set()
        path, data, signed = self._index()
        self._read_paths.add(path)
        documents = self._documents(self._parse_index(path, data), datatypes, signed, depth=0)
        if self._last_seen is not None:
            self._last_seen.remember(self._seen)
        info = ResolveInfo(source=self._source.description, signed=bool(signed), index_url=self._source.url(path))
        return StreamCatalogue(info, documents)

    def _parse_index(self, path: str, data: bytes) -> Index:
        url = self._source.url(path)
        index = decode_document(data, Index, f'cannot unmarshal JSON index metadata at URL "{url}"')
        check_format(index.format, INDEX_FORMAT, url)
        self._fresh(url, index.updated)
        return index

    def _documents(
        self, index: Index, datatypes: Collection[str], signed: str, *, depth: int
    ) -> list[ProductsDocument]:
        """The products of an index, and of the indexes it names."""
        found: list[ProductsDocument] = []
        for content_id, entry in sorted(index.entries(), key=lambda pair: pair[0]):
            path, wanted = entry.path or "", entry.datatype in datatypes
            nested = entry.format == INDEX_FORMAT and (wanted or not entry.datatype)
            if path in self._read_paths or not (nested or (wanted and entry.products)):
                continue
            self._read_paths.add(path)
            if nested:
                found += self._nested(path, datatypes, signed, depth=depth + 1)
            else:
                found.append(self._document(content_id, entry.datatype or "", path, signed))
        return found

    def _nested(self, path: str, datatypes: Collection[str], signed: str, *, depth: int) -> list[ProductsDocument]:
        if depth > NESTING_MAX:
            raise BadDataError(f"indexes are nested more than {NESTING_MAX} deep")
        try:
            data = self._verify(check_path(path), signed)
        except NotFoundError as err:
            raise BadDataError(f"cannot read index data, {err.message}") from err
        return self._documents(self._parse_index(path, data), datatypes, signed, depth=depth)

    def _index(self) -> tuple[str, bytes, str]:
        """Path and text of the index, and how it was signed: ``sjson``, ``gpg``, or empty."""
        if self._verifier is None:
            if self._only_signed:
                raise InvalidArgumentError("only signed data counts, and there is no key to check it with")
            return INDEX_PATH, self._fetch(INDEX_PATH), ""
        clearsigned = signed_path(INDEX_PATH)
        try:
            return clearsigned, self._verify(clearsigned, "sjson"), "sjson"
        except NotFoundError:
            return INDEX_PATH, self._verify(INDEX_PATH, "gpg"), "gpg"

    def _fetch(self, path: str) -> bytes:
        try:
            return self._source.fetch(path).data
        except BadDataError:
            raise
        except MistifyError as err:
            raise NotFoundError(f'invalid URL "{self._source.url(path)}" not found') from err

    def _verify(self, path: str, signed: str) -> bytes:
        data = self._fetch(path)
        if not signed:
            return data
        assert self._verifier is not None
        try:
            if signed == "sjson":
                return self._verifier.verify_clearsigned(data).text
            return self._verifier.verify_detached(data, self._fetch(f"{path}.gpg")).text
        except BadDataError as err:
            raise BadDataError(f'cannot trust "{self._source.url(path)}": {err.message}') from err

    def _document(self, content_id: str, datatype: str, path: str, signed: str) -> ProductsDocument:
        url = self._source.url(check_path(path))
        try:
            data = self._verify(path, signed)
        except NotFoundError as err:
            raise BadDataError(f"cannot read product data, {err.message}") from err
        table = decode_products(data, url)
        self._fresh(url, table.get("updated"))
        return ProductsDocument(content_id, datatype, table)

    def _fresh(self, url: str, updated: Any) -> None:
        text = updated if isinstance(updated, str) else None
        if self._last_seen is not None:
            self._last_seen.check(url, text)
            self._seen[url] = text


def decode_products(data: bytes, url: str) -> dict[str, Any]:
    """A products file as plain tables; BadDataError."""
    try:
        table = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadDataError(f'cannot unmarshal JSON metadata at URL "{url}": {err}') from err
    found = table.get("format")
    check_format(found if isinstance(found, str) else None, PRODUCTS_FORMAT, url)
    return table
