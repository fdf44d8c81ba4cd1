"""One import for every kind of container image: recognised by content, told in one shape."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from image_service.imagestore.oci_images import OciImages
from image_service.imagestore.oci_reading import is_layout
from image_service.imagestore.spool import fill, open_image
from image_service.imagestore.steps import step
from image_service.imagestore.store import ImageStore
from imaging.compression import Readable

DEFAULT_NAME = "image"
"""The name of OCI images whose layout gives none."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import brought."""

    key: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    kind: str = "aci"

    def to_wire(self) -> dict[str, Any]:
        """As programs read it."""
        return {
            "key": self.key,
            "name": self.name,
            "labels": dict(self.labels),
            "size": self.size_bytes,
            "kind": self.kind,
        }


def import_image(
    store: ImageStore, source: Readable, *, name: str = DEFAULT_NAME, latest: bool | None = None
) -> list[Imported]:
    """Import an app container image or an OCI layout's images, packed or not. ``name`` is for OCI tags without one."""
    unpacked = open_image(source, store.limits)
    with contextlib.ExitStack() as stack:
        with step("error creating image"):
            temporary = stack.enter_context(store.tmp_file())
        with step("error copying image"):
            digest, size_bytes = fill(temporary, unpacked)
        with step("error extracting image manifest"):
            is_oci = is_layout(temporary.fd)
        if not is_oci:
            return [_aci(store, store.publish_aci(temporary, digest, size_bytes, latest=latest))]
        with step("error importing image layout"):
            images = OciImages(store).import_layout(temporary.fd, name)
    return [
        Imported(image.digest, reference.name, {"tag": reference.tag}, image.size_bytes, "oci")
        for reference, image in images
    ]


def _aci(store: ImageStore, key: str) -> Imported:
    info = store.get_aci_info(key)
    return Imported(key, info.name, store.infos.labels(key), info.size_bytes)
