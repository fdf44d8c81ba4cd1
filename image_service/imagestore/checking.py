"""Looking after the store: what a crash, a disk or a person left behind is found, said and repaired; unused images are collected.

Everything is decided under the lock of the key it is about, so a check may run beside imports, readers and removals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from image_service.imagestore.infos import AciInfo
from image_service.imagestore.keys import hash_to_key, is_key
from image_service.imagestore.layout import list_files
from image_service.imagestore.parts import MANIFEST_MODE
from image_service.imagestore.spool import hash_file
from image_service.imagestore.store import ImageStore
from imaging.aci import ImageManifest, canonical_json
from imaging.aci_image import read_manifest
from imaging.errors import StoreRemovalError
from imaging.files import os_errors


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
