"""Looking after OCI images: rows, tags' files and parts agree afterwards, and it is said what was done."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from image_service.imagestore.checking import Collected, Finding
from image_service.imagestore.layout import list_files
from image_service.imagestore.oci_images import LOCK, OciImage, OciImages
from image_service.imagestore.parts import StoreParts
from imaging.digests import Digest, MultiHasher
from imaging.files import TEMPORARY_PREFIX, os_errors
from imaging.oci import Descriptor, ImageReference

PIECE_BYTES = 1 << 20


def _hash(path: Path) -> Digest:
    hasher = MultiHasher()
    with os_errors(f"cannot read {path}"), path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.digest()


class OciCheck:
    """Checks over the OCI images of an open store. Each holds the lock that imports and removals hold."""

    def __init__(self, images: OciImages, store: StoreParts) -> None:
        self._images = images
        self._store = store

    def verify(self, *, repair: bool = False, digests: bool = True) -> list[Finding]:
        """Compare rows and files, both ways; with ``digests`` also every part with its name."""
        with self._store.locks.hold(LOCK, exclusive=True):
            findings = [*self._sweep(repair=repair)]
            for image in self._images.list():
                findings += self._verify_image(image, repair=repair, digests=digests)
            findings += self._verify_tags(repair=repair)
            return findings + self._verify_strays(repair=repair)

    def _sweep(self, *, repair: bool) -> Iterator[Finding]:
        """Files being written by who holds the lock we hold: by nobody, that is."""
        folders = [self._store.layout.oci_blobs.glob(f"*/{TEMPORARY_PREFIX}*")]
        folders.append(self._images.tag_files.directory.glob(f"{TEMPORARY_PREFIX}*"))
        for path in [path for found in folders for path in sorted(found)]:
            if repair:
                path.unlink(missing_ok=True)
            yield Finding("", f"temporary file of a dead process: {path.name}", "removed" if repair else "")

    def verify_image(self, image: OciImage, *, repair: bool = False, digests: bool = True) -> list[Finding]:
        """One image."""
        with self._store.locks.hold(LOCK, exclusive=True):
            return self._verify_image(image, repair=repair, digests=digests)

    def _verify_image(self, image: OciImage, *, repair: bool, digests: bool) -> list[Finding]:
        rows = self._store.index.query(
            "SELECT digest, size FROM ocipart WHERE image = ? ORDER BY digest", (image.digest,)
        )
        findings = []
        for digest, size in rows:
            problem = self._problem(Digest.parse(digest), int(size), digests=digests)
            if problem:
                findings.append(Finding(image.digest, f"{digest} {problem}", "image removed" if repair else ""))
        if findings and repair:
            self._images.delete_locked(image, image.tags)
        return findings

    def _problem(self, digest: Digest, size_bytes: int, *, digests: bool) -> str:
        path = self._store.layout.oci_blob(digest)
        if not path.exists():
            return "is missing"
        if path.stat().st_size != size_bytes or (digests and not _hash(path).matches(digest)):
            return "is damaged"
        return ""

    def _verify_tags(self, *, repair: bool) -> list[Finding]:
        """The rows are right: a file that says something else is from a change that was cut off."""
        told = dict(self._images.tag_files.list())
        rows = self._store.index.query(
            "SELECT name, tag, t.digest, mediatype FROM ocitag t JOIN ociimage i ON i.digest = t.digest"
        )
        right = {ImageReference(name, tag): (digest, media_type) for name, tag, digest, media_type in rows}
        findings = []
        for reference in sorted({*told, *right}):
            wanted, found = right.get(reference), told.get(reference)
            if wanted is not None and found is not None and found.digest == wanted[0]:
                continue
            repaired = self._mend_tag(reference, wanted) if repair else ""
            findings.append(Finding(str(reference), "a tag's file is not what the index says", repaired))
        return findings

    def _mend_tag(self, reference: ImageReference, wanted: tuple[str, str] | None) -> str:
        if wanted is None:
            self._images.tag_files.delete(reference)
            return "removed"
        digest, media_type = wanted
        size_bytes = self._store.layout.oci_blob(Digest.parse(digest)).stat().st_size
        self._images.tag_files.save(reference, Descriptor(media_type, digest, size_bytes))
        return "written anew"

    def _verify_strays(self, *, repair: bool) -> list[Finding]:
        """Parts of no image: an import or removal that was cut off."""
        findings = []
        for name in list_files(self._store.layout.oci_blobs):
            digest = Digest.parse(f"sha256:{name}")
            if self._store.index.query("SELECT 1 FROM ocipart WHERE digest = ? LIMIT 1", (str(digest),)):
                continue
            if repair:
                self._store.layout.oci_blob(digest).unlink(missing_ok=True)
            findings.append(Finding(str(digest), "a part of no image", "removed" if repair else ""))
        return findings

    # -- collect -------------------------------------------------------------------------------------------------------

    def collect(self, *, grace_s: float, keep: Collection[str] = (), dry_run: bool = False) -> list[Collected]:
        """Remove images nobody has used for longer than ``grace_s``, the longest unused first. ``keep``: digests in use."""
        before_ns = self._store.now_ns() - int(grace_s * 1e9)
        removed = []
        with self._store.locks.hold(LOCK, exclusive=True):
            for image in sorted(self._images.list(), key=lambda image: image.last_used_ns):
                if image.last_used_ns >= before_ns or image.digest in keep:
                    continue
                if not dry_run:
                    self._images.delete_locked(image, image.tags)
                removed.append(Collected(image.digest, ", ".join(image.tags), image.size_bytes))
        return removed
