"""Which products file, and which items of it, answer a constraint. Pure functions of documents."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from imaging.errors import BadDataError, NotFoundError
from imaging.simplestreams.model import (
    CloudSpec,
    ImageMetadata,
    Index,
    IndexEntry,
    Product,
    Products,
    check_format,
    decode_document,
    to_metadata,
)
from imaging.simplestreams.paths import PRODUCTS_FORMAT


class NoMatchError(NotFoundError):
    """Documents are fine and have nothing that was asked for. Stays inside: a lookup answers with an empty list."""


def choose_entry(
    index: Index, datatype: str, cloud: CloudSpec, product_ids: Collection[str], *, compat: bool = False
) -> IndexEntry:
    """The entry of the products file to read; NotFoundError (nothing of that kind or cloud), NoMatchError (none of the products).

    Of several the first by content id is taken; ``compat`` takes the first of the document, where the original took any.
    """
    entries = [(name, entry) for name, entry in index.entries() if entry.datatype == datatype]
    if not entries:
        raise NotFoundError(f'"{datatype}" data not found')
    if not cloud.is_empty:
        entries = [(name, entry) for name, entry in entries if entry.serves(cloud)]
    if not entries:
        raise NotFoundError(f"index file has no data for cloud {cloud} not found")
    wanted = frozenset(product_ids)
    entries = [(name, entry) for name, entry in entries if wanted & entry.product_ids()]
    if not entries:
        names = " ".join(f'"{name}"' for name in product_ids)
        raise NoMatchError(f"index file has no data for product name(s) [{names}]")
    return entries[0][1] if compat else min(entries, key=lambda pair: pair[0])[1]


def parse_products(data: bytes, url: str) -> Products:
    """A products document; BadDataError."""
    products = decode_document(data, Products, f'cannot unmarshal JSON metadata at URL "{url}"')
    check_format(products.format, PRODUCTS_FORMAT, url)
    return products


def select_items(products: Products, product_ids: Sequence[str], region: str) -> list[ImageMetadata]:
    """Items of the wanted products in their order, newest versions first; NoMatchError.

    An item is left out if a newer version had one with the same key. Items of one version never hide each other.
    """
    found = [product for product in map(products.find, product_ids) if product is not None]
    if not found:
        has = " ".join(products.product_ids())
        raise NoMatchError(
            f"index has no records for product ids [{' '.join(product_ids)}]; it does have product ids [{has}]"
        )
    selected = [metadata for product in found for metadata in _latest(product, region)]
    if not selected:
        raise NoMatchError("index has no matching records")
    return selected


def _latest(product: Product, region: str) -> list[ImageMetadata]:
    taken: set[tuple[str, ...]] = set()
    selected: list[ImageMetadata] = []
    for _, version in sorted((product.versions or {}).items(), key=lambda pair: pair[0], reverse=True):
        items = (item for item in ((version.items if version else None) or {}).values() if item is not None)
        fitting = [one for one in map(to_metadata, items) if not region or one.region_name == region]
        fresh = [one for one in fitting if _key(one) not in taken]
        taken.update(map(_key, fresh))
        selected += fresh
    return selected


def _key(item: ImageMetadata) -> tuple[str, ...]:
    return (item.virt_type, item.arch, item.version, item.region_name, item.storage)


def require_path(entry: IndexEntry, url: str) -> str:
    """The entry's path; BadDataError without one."""
    if not entry.path:
        raise BadDataError(f'index at URL "{url}" names no products file')
    return entry.path
