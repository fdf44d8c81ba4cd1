"""Looking after the store: what a crash, a disk or a person left behind is found, said and repaired; unused images are collected.

Everything is decided under the lock of the key it is about, so a check may run beside imports, readers and removals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from image_service.imagestore.index import back_up
from image_service.imagestore.infos import AciInfo
from image_service.imagestore.keys import hash_to_image_id, hash_to_key, is_key
from image_service.imagestore.layout import Layout, list_files
from image_service.imagestore.locks import directory_lock
from image_service.imagestore.spool import PIECE_BYTES
from imaging.aci import ImageManifest, canonical_json, parse_manifest
from imaging.aci_image import read_manifest
from imaging.digests import Digest, MultiHasher
from imaging.errors import BadDataError, StoreRemovalError, TooLargeError
from imaging.files import os_errors

if TYPE_CHECKING:
    from image_service.imagestore.store import ImageStore

LEAVE_TIMEOUT_S = 60.0
"""How long a rebuild waits for the other users of the store to leave."""

MANIFEST_MODE = 0o660


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, and what was done about it."""

    key: str
    problem: str
    repair: str = ""
    """Empty if nothing was done."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed or would remove."""

    key: str
    name: str
    size_bytes: int
    problem: str = ""


def hash_file(path: Path) -> Digest:
    """The sha512 of a file."""
    hasher = MultiHasher(["sha512"])
    with os_errors(f"cannot read {path}"), path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.digest("sha512")


class StoreCheck:
    """Checks over one open store."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._layout = store.layout

    # -- verify --------------------------------------------------------------------------------------------------------

    def verify(self, *, repair: bool = False, digests: bool = True) -> list[Finding]:
        """Compare index and files, both ways; with ``digests`` also every archive with its key."""
        findings = [*self._verify_temporaries(repair=repair)]
        for info in self._store.list_aci_infos():
            findings += self.verify_image(info.blob_key, repair=repair, digests=digests)
        for key in self._stray_keys():
            findings += self._verify_stray(key, repair=repair)
        return findings

    def _verify_temporaries(self, *, repair: bool) -> Iterator[Finding]:
        if repair:
            for name in self._store.temporaries.sweep():
                yield Finding("", f"temporary file of a dead process: {name}", "removed")

    def verify_image(self, key: str, *, repair: bool = False, digests: bool = True) -> list[Finding]:
        """One image of the index."""
        with self._store.locks.hold(key, exclusive=repair):
            info = self._store.infos.find(key)
            if info is None:  # removed meanwhile
                return []
            problem = self._archive_problem(info, digests=digests)
            if problem:
                return [Finding(key, problem, self._drop(key) if repair else "")]
            return self._verify_details(info, repair=repair)

    def _archive_problem(self, info: AciInfo, *, digests: bool) -> str:
        path = self._layout.blob(info.blob_key)
        if not path.exists():
            return "the image is missing"
        if path.stat().st_size != info.size_bytes:
            return f"the image has {path.stat().st_size} bytes instead of {info.size_bytes}"
        if digests and hash_to_key(hash_file(path)) != info.blob_key:
            return "the image is damaged: its digest is another"
        return ""

    def _drop(self, key: str) -> str:
        """Forget an image whose archive can't be used; what is left of it is put aside."""
        moved = self._quarantine(key)
        try:
            self._store.delete_locked(key)
        except StoreRemovalError:
            return f"removed from the index{moved}"  # that its archive is not there is why we are here
        return f"removed{moved}"

    def _quarantine(self, key: str) -> str:
        path = self._layout.blob(key)
        if not path.exists():
            return ""
        with os_errors(f"cannot put {key} aside"):
            path.rename(self._layout.quarantine / f"{key}.{time.time_ns()}")
        return ", its file is in quarantine"

    def _verify_details(self, info: AciInfo, *, repair: bool) -> list[Finding]:
        """Manifest and labels, both made from the archive if they are not what it says."""
        manifest = self._manifest_of(info.blob_key)
        findings = []
        path = self._layout.manifest(info.blob_key)
        document = canonical_json(manifest)
        if not path.exists() or path.read_bytes() != document:
            if repair:
                self._store.temporaries.publish_bytes(document, path, mode=MANIFEST_MODE)
            findings.append(
                Finding(info.blob_key, "the manifest is missing or not the image's", "written anew" if repair else "")
            )
        known = (info.name, self._store.infos.labels(info.blob_key))
        if known != (manifest.name, manifest.label_values):
            if repair:
                self._store.infos.save(_named(info, manifest), manifest.label_values)
            findings.append(
                Finding(info.blob_key, "the index has other labels than the image", "corrected" if repair else "")
            )
        return findings

    def _manifest_of(self, key: str) -> ImageManifest:
        fd = os.open(self._layout.blob(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_manifest(fd)
        finally:
            os.close(fd)

    def _stray_keys(self) -> list[str]:
        known = {info.blob_key for info in self._store.list_aci_infos()}
        return sorted({*list_files(self._layout.blobs), *list_files(self._layout.manifests)} - known)

    def _verify_stray(self, key: str, *, repair: bool) -> list[Finding]:
        """Files without a record: an import or removal that was cut off, never acknowledged or already so."""
        if not is_key(key):
            return [Finding(key, "a file that is not the store's")]
        with self._store.locks.hold(key, exclusive=True):
            if self._store.infos.find(key) is not None:  # imported meanwhile
                return []
            if not self._layout.blob(key).exists() and not self._layout.manifest(key).exists():
                return []
            if repair:
                self._store.erase(key)
            return [Finding(key, "files without a record", "removed" if repair else "")]

    # -- collect -------------------------------------------------------------------------------------------------------

    def collect(self, *, grace_s: float, keep: Collection[str] = (), dry_run: bool = False) -> list[Collected]:
        """Remove images nobody has used for longer than ``grace_s``, the longest unused first. ``keep``: keys in use."""
        before_ns = self._store.now_ns() - int(grace_s * 1e9)
        removed = []
        for info in self._store.list_aci_infos(["lastused"]):
            if info.last_used_ns < before_ns and info.blob_key not in keep:
                removed += self._collect_one(info, before_ns, dry_run=dry_run)
        return removed

    def _collect_one(self, info: AciInfo, before_ns: int, *, dry_run: bool) -> list[Collected]:
        """Look again under the lock: whoever used the image meanwhile keeps it."""
        with self._store.locks.hold(info.blob_key, exclusive=True):
            found = self._store.infos.find(info.blob_key)
            if found is None or found.last_used_ns >= before_ns:
                return []
            problem = ""
            if not dry_run:
                try:
                    self._store.delete_locked(info.blob_key)
                except StoreRemovalError as err:
                    problem = err.message
            return [Collected(info.blob_key, info.name, info.size_bytes, problem)]


def _named(info: AciInfo, manifest: ImageManifest) -> AciInfo:
    return AciInfo(
        blob_key=info.blob_key,
        name=manifest.name,
        import_time_ns=info.import_time_ns,
        last_used_ns=info.last_used_ns,
        latest=info.latest,
        size_bytes=info.size_bytes,
        tree_store_size_bytes=info.tree_store_size_bytes,
        image_id=info.image_id,
    )


# -- making an index from files ----------------------------------------------------------------------------------------


def move_index_aside(layout: Layout) -> None:
    """Put a lost, damaged or distrusted index among the backups; the next to open the store makes a new one."""
    with directory_lock(layout.root, exclusive=True, timeout_s=LEAVE_TIMEOUT_S):
        back_up(layout.index, layout.backups)
        with os_errors("cannot put the index aside"):
            for path in layout.index.iterdir():
                path.unlink()


def adopt_files(store: ImageStore) -> list[str]:
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


def _adopt(store: ImageStore, key: str) -> bool:
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


def _find_manifest(store: ImageStore, key: str) -> ImageManifest | None:
    """The stored manifest, or the archive's if there is none or it is damaged; None if neither can be read."""
    with suppress(OSError, BadDataError):
        return parse_manifest(store.layout.manifest(key).read_bytes())
    with suppress(BadDataError, TooLargeError), store.layout.blob(key).open("rb") as file:
        return read_manifest(file.fileno())
    return None
