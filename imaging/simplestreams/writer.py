"""Image-ids documents, written byte for byte as clients of old write them.

Four spaces of indentation, no newline at the end, keys in a fixed order, names of products and items sorted bytewise, and every
character escaped that would matter inside HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from imaging.simplestreams.constraint import product_id
from imaging.simplestreams.model import CloudSpec, ImageMetadata
from imaging.simplestreams.paths import (
    IMAGE_CONTENT_ID,
    IMAGE_IDS,
    INDEX_FORMAT,
    PRODUCT_METADATA_PATH,
    PRODUCTS_FORMAT,
)

_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
    "\\b": "\\u0008",
    "\\f": "\\u000c",
}
_TO_ESCAPE = re.compile(r"[<>&\u2028\u2029]|\\[bf]|\\.")
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What may differ from the original's documents."""

    compat: bool = False
    storage: bool = False
    """Also write ``root_store``, as later versions do: a merge would lose it otherwise."""


def format_date(moment: datetime) -> str:
    """RFC 1123 with a numeric zone, in the time's own zone, in English whatever the locale."""
    day, month = _WEEKDAYS[moment.weekday()], _MONTHS[moment.month - 1]
    return moment.strftime(f"{day}, %d {month} {moment.year:04} %H:%M:%S %z")


def marshal_json(value: Any) -> bytes:
    """A document as bytes; see the module's docstring."""
    text = json.dumps(value, indent=4, ensure_ascii=False)
    return _TO_ESCAPE.sub(lambda found: _ESCAPES.get(found[0], found[0]), text).encode("utf-8", "replace")


def image_product_id(image: ImageMetadata) -> str:
    """The product an image belongs to."""
    return product_id(image.version, image.arch, image.stream)


def _index(images: Sequence[ImageMetadata], clouds: Sequence[CloudSpec], updated: datetime) -> dict[str, Any]:
    date = format_date(updated)
    entry: dict[str, Any] = {"updated": date, "format": PRODUCTS_FORMAT, "datatype": IMAGE_IDS, "cloudname": "custom"}
    if clouds:
        entry["clouds"] = [{"region": cloud.region or "", "endpoint": cloud.endpoint or ""} for cloud in clouds]
    entry["path"] = PRODUCT_METADATA_PATH
    entry["products"] = sorted({image_product_id(image) for image in images}, key=str.encode)
    return {"index": {IMAGE_CONTENT_ID: entry}, "updated": date, "format": INDEX_FORMAT}


def _item(image: ImageMetadata, options: WriteOptions) -> dict[str, str]:
    pairs = {
        "root_store": image.storage if options.storage else "",
        "virt": image.virt_type,
        "region": image.region_name,
        "endpoint": image.endpoint,
    }
    return {"id": image.id} | {key: value for key, value in pairs.items() if value}


def _add_item(items: dict[str, Any], image: ImageMetadata, options: WriteOptions) -> None:
    """Items are named by image id; the same id in another region gets the region behind it (the original lost one)."""
    item, name = _item(image, options), image.id
    if not options.compat and name in items and items[name] != item:
        name = "-".join(part for part in (image.id, image.region_name, image.virt_type, image.storage) if part)
    items[name] = item


def _products(images: Sequence[ImageMetadata], updated: datetime, options: WriteOptions) -> dict[str, Any]:
    # The original wrote year, day, month; such names do not sort by age.
    version = updated.strftime("%Y%d%m" if options.compat else "%Y%m%d")
    products: dict[str, Any] = {}
    for image in images:
        fresh = _without_blanks({"version": image.version, "arch": image.arch}) | {"versions": {version: {"items": {}}}}
        product = products.setdefault(image_product_id(image), fresh)
        _add_item(product["versions"][version]["items"], image, options)
    for product in products.values():
        product["versions"][version]["items"] = _sorted(product["versions"][version]["items"])
    return {
        "products": _sorted(products),
        "updated": format_date(updated),
        "format": PRODUCTS_FORMAT,
        "content_id": IMAGE_CONTENT_ID,
    }


def _without_blanks(values: Mapping[str, str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def _sorted(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items(), key=lambda pair: pair[0].encode()))


def marshal_index(images: Sequence[ImageMetadata], clouds: Sequence[CloudSpec], updated: datetime) -> bytes:
    """The index of these images."""
    return marshal_json(_index(images, clouds, updated))


def marshal_products(images: Sequence[ImageMetadata], updated: datetime, options: WriteOptions | None = None) -> bytes:
    """The products file of these images, all under one version: the day of ``updated``."""
    return marshal_json(_products(images, updated, options or WriteOptions()))


def marshal_image_metadata(
    images: Sequence[ImageMetadata],
    clouds: Sequence[CloudSpec],
    updated: datetime,
    options: WriteOptions | None = None,
) -> tuple[bytes, bytes]:
    """Index and products of these images."""
    return marshal_index(images, clouds, updated), marshal_products(images, updated, options)
