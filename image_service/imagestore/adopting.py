"""Making an index anew from the files of a store."""

from __future__ import annotations

from contextlib import suppress

from image_service.imagestore.index import back_up
from image_service.imagestore.infos import AciInfo
from image_service.imagestore.keys import hash_to_image_id, hash_to_key, is_key
from image_service.imagestore.layout import Layout, list_files
from image_service.imagestore.locks import directory_lock
from image_service.imagestore.oci_images import LOCK, OciImages, save_image, save_tag
from image_service.imagestore.oci_reading import collect_parts
from image_service.imagestore.parts import LEAVE_TIMEOUT_S, MANIFEST_MODE, StoreParts
from image_service.imagestore.spool import hash_file
from imaging.aci import ImageManifest, canonical_json, parse_manifest
from imaging.aci_image import read_manifest
from imaging.errors import BadDataError, TooLargeError
from imaging.files import os_errors
from imaging.oci import Descriptor, check_content


def move_index_aside(layout: Layout) -> None:
    """Put a lost, damaged or distrusted index among the backups; the next to open the store makes a new one."""
    with directory_lock(layout.root, exclusive=True, timeout_s=LEAVE_TIMEOUT_S):
        back_up(layout.index, layout.backups)
        with os_errors("cannot put the index aside"):
            for path in layout.index.iterdir():
                path.unlink()


def adopt_files(store: StoreParts) -> list[str]:
    """Record every sound image among the files that the index does not know or knows less of; their keys.

    An image counts as imported when its file was last written, and as used now, so that a collection does not take what was
    only forgotten.
    """
    adopted = []
    for key in filter(is_key, list_files(store.layout.blobs)):
        with store.locks.hold(key, exclusive=True):
            if _adopt(store, key):
                adopted.append(key)
    return adopted


def _adopt(store: StoreParts, key: str) -> bool:
    path = store.layout.blob(key)
    known = store.infos.find(key)
    digest = hash_file(path)
    manifest = _find_manifest(store, key)
    if manifest is None or hash_to_key(digest) != key:
        return False  # not an image any more; verify says so
    stat, document = path.stat(), canonical_json(manifest)
    store.temporaries.publish_bytes(document, store.layout.manifest(key), mode=MANIFEST_MODE)
    fresh = AciInfo(
        blob_key=key,
        name=manifest.name,
        import_time_ns=known.import_time_ns if known else stat.st_mtime_ns,
        last_used_ns=known.last_used_ns if known else store.now_ns(),
        latest=known.latest if known else False,
        size_bytes=stat.st_size,
        image_id=hash_to_image_id(digest),
    )
    store.infos.save(fresh, manifest.label_values)
    return True


def _find_manifest(store: StoreParts, key: str) -> ImageManifest | None:
    """The stored manifest, or the archive's if there is none or it is damaged; None if neither can be read."""
    with suppress(OSError, BadDataError):
        return parse_manifest(store.layout.manifest(key).read_bytes())
    with suppress(BadDataError, TooLargeError), store.layout.blob(key).open("rb") as file:
        return read_manifest(file.fileno())
    return None


def adopt_oci_images(store: StoreParts) -> None:
    """Record every tagged image whose parts are all there. Tags of images that are not whole any more are left to verify."""
    images = OciImages(store)
    with store.locks.hold(LOCK, exclusive=True):
        known = {image.digest for image in images.list()}
        for reference, descriptor in images.tag_files.list():
            parts = _find_parts(store, descriptor)
            if parts is None:
                continue
            with store.index.change() as cursor:
                if descriptor.digest not in known:
                    save_image(cursor, descriptor, parts, store.now_ns())
                save_tag(cursor, reference, descriptor.digest)


def _find_parts(store: StoreParts, image: Descriptor) -> dict[str, Descriptor] | None:
    def read(descriptor: Descriptor) -> bytes:
        path = store.layout.oci_blob(descriptor.parsed_digest)
        if not path.exists() or path.stat().st_size != descriptor.size:
            raise BadDataError(f"{descriptor.digest} is missing")
        if descriptor.is_index or descriptor.is_manifest:
            return check_content(descriptor, path.read_bytes())
        return b""

    try:
        return collect_parts(image, read)
    except BadDataError:
        return None
