"""What a person calls an image, found among both kinds of images of a store."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from image_service.imagestore.infos import AciInfo
from image_service.imagestore.keys import PREFIX
from image_service.imagestore.oci_images import DIGEST_PREFIX, OciImage, OciImages
from image_service.imagestore.store import ImageStore
from imaging.aci import parse_app_string
from imaging.errors import InvalidArgumentError, NotFoundError

Found = AciInfo | OciImage


def find_image(store: ImageStore, reference: str) -> Found:
    """The image: ``sha512-<hex>`` and ``sha256:<hex>`` (or their beginnings), an app string, or ``name:tag``. NotFoundError."""
    if reference.startswith(PREFIX):
        return store.get_aci_info(store.resolve_key(reference))
    images = OciImages(store)
    if reference.startswith(DIGEST_PREFIX):
        return images.resolve(reference)
    try:
        app = parse_app_string(reference)
        return store.get_aci_info(store.get_aci(app.name, app.labels))
    except (NotFoundError, InvalidArgumentError) as err:
        try:
            return images.resolve(reference)
        except (NotFoundError, InvalidArgumentError):
            raise err from None


@dataclass(frozen=True, slots=True)
class Row:
    """An image as a list shows it."""

    id: str
    name: str
    size_bytes: int
    import_time_ns: int
    last_used_ns: int
    kind: str
    labels: dict[str, str]

    def to_wire(self) -> dict[str, Any]:
        """As programs read it."""
        return {
            "id": self.id,
            "name": self.name,
            "import_time": self.import_time_ns,
            "last_used_time": self.last_used_ns,
            "size": self.size_bytes,
            "kind": self.kind,
            "labels": self.labels,
        }


def to_rows(store: ImageStore, image: Found) -> list[Row]:
    """One row for an app container, one for each tag of an OCI image (or one without a name)."""
    if isinstance(image, OciImage):
        names = image.tags or ("",)
        tags = [{"tag": name.rpartition(":")[2]} if name else {} for name in names]
        return [
            Row(image.digest, name, image.size_bytes, image.import_time_ns, image.last_used_ns, "oci", tag)
            for name, tag in zip(names, tags, strict=True)
        ]
    labels = store.infos.labels(image.blob_key)
    name = f"{image.name}:{labels['version']}" if "version" in labels else image.name
    size = image.size_bytes + image.tree_store_size_bytes
    return [Row(image.blob_key, name, size, image.import_time_ns, image.last_used_ns, "aci", labels)]


def record_to_row(record: dict[str, Any]) -> Row:
    """A running service's record."""
    version = record.get("version", "")
    name = f"{record.get('name', '')}:{version}" if version else record.get("name", "")
    time_ns = int(datetime.fromisoformat(record["download_end"]).timestamp() * 1e9)
    kind = record.get("labels", {}).get("kind", record.get("format", ""))
    return Row(record["id"], name, record["size"], time_ns, time_ns, kind, record.get("labels", {}))


def list_rows(store: ImageStore) -> list[Row]:
    """Every image, by time of import."""
    found: list[Found] = [*store.list_aci_infos(["importtime"]), *OciImages(store).list()]
    rows = [row for image in found for row in to_rows(store, image)]
    return sorted(rows, key=lambda row: row.import_time_ns)


def manifest_of(store: ImageStore, image: Found) -> bytes:
    """The manifest of either kind."""
    if isinstance(image, OciImage):
        return OciImages(store).manifest_json(image)
    return store.get_image_manifest_json(image.blob_key)


def pretty(document: bytes) -> bytes:
    """A JSON document for people."""
    return msgspec.json.format(document, indent=2)


def show_time(time_ns: int) -> str:
    """A moment for people."""
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
