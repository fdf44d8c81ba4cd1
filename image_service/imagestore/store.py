"""ImageStore: app container images by key, name and labels.

The order of an import is archive, manifest, record: a crash leaves at most files nobody refers to, which a check clears away. That of a
removal is record, archive, manifest: whatever fails, nobody sees the image any more. Both hold the key's exclusive lock.

Errors are told in two parts, the step that failed and, as its cause, why. Docstrings begin with the names the original has for a call.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Self

from image_service.imagestore.adopting import adopt_files, adopt_oci_images, move_index_aside
from image_service.imagestore.infos import AciInfo, Remote
from image_service.imagestore.keys import KEY_CHARS, KEY_MIN_CHARS, PREFIX, hash_to_image_id, hash_to_key, is_key
from image_service.imagestore.layout import Layout, list_files
from image_service.imagestore.parts import MANIFEST_MODE, StoreParts
from image_service.imagestore.reading import VerifyingReader
from image_service.imagestore.spool import IMPORT_LIMITS, Temporary, fill, open_image
from image_service.imagestore.steps import step
from imaging.aci import ImageManifest, canonical_json, parse_manifest
from imaging.aci_image import read_manifest
from imaging.aci_types import shown
from imaging.compression import DecompressionLimits, Readable
from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError, StoreRemovalError
from imaging.files import os_errors, publish

BLOB_MODE = 0o600
DUMP_VALUE_BYTES = 128
"""How much of each value a dump shows."""


class ImageStore(StoreParts):
    """See the module's docstring. Threads and processes share a store; ``close`` releases it."""

    def __init__(
        self,
        directory: Path | str,
        *,
        limits: DecompressionLimits = IMPORT_LIMITS,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        super().__init__(directory, limits=limits, now_ns=now_ns)
        try:
            self._complete()
        except BaseException:
            self.close()
            raise

    def _complete(self) -> None:
        """After the index was made or migrated: read from the files what it does not know."""
        if not self.index.is_complete():
            adopt_files(self)
            adopt_oci_images(self)
            self.index.set_complete()

    @classmethod
    def rebuild(cls, directory: Path | str) -> Self:
        """Open a store after putting its index aside and making a new one from the files.

        What only the index knew is lost: remotes, which image is the latest, uses, tree sizes, tags of OCI images.
        """
        layout = Layout(Path(directory))
        layout.ensure()
        move_index_aside(layout)
        return cls(directory)

    # -- temporary files ---------------------------------------------------------------------------------------------

    def tmp_file(self) -> AbstractContextManager[Temporary]:
        """TmpFile: a fresh temporary file on the store's file system."""
        return self.temporaries.file()

    def tmp_dir(self) -> AbstractContextManager[Path]:
        """TmpDir: a fresh temporary directory."""
        return self.temporaries.folder()

    def tmp_named_file(self, name: str) -> AbstractContextManager[Temporary]:
        """TmpNamedFile: the temporary file of that name, with what it holds."""
        return self.temporaries.named(name)

    # -- writing -----------------------------------------------------------------------------------------------------

    def write_aci(self, source: Readable, *, latest: bool | None = None, name: str = "") -> str:
        """WriteACI: import an image, packed or not; its key. Importing it again renews its record.

        ``latest`` None leaves the mark as it is. With a ``name`` only an image of that name is taken. What is refused leaves nothing
        behind.
        """
        unpacked = open_image(source, self.limits)
        with contextlib.ExitStack() as stack:
            with step("error creating image"):
                temporary = stack.enter_context(self.temporaries.file())
            with step("error copying image"):
                digest, size_bytes = fill(temporary, unpacked)
            return self.publish_aci(temporary, digest, size_bytes, latest=latest, name=name)

    def publish_aci(
        self, temporary: Temporary, digest: Digest, size_bytes: int, *, latest: bool | None = None, name: str = ""
    ) -> str:
        """Import a complete unpacked archive of the store's own temporaries, whose sha512 is known; its key."""
        with step("error extracting image manifest"):
            manifest = read_manifest(temporary.fd)
            if name not in {"", manifest.name}:
                raise BadDataError(f"the image is called {shown(manifest.name)}, not {shown(name)}")
        with step("error closing image"):
            os.fsync(temporary.fd)
        key, now_ns = hash_to_key(digest), self.now_ns()
        info = AciInfo(
            blob_key=key,
            name=manifest.name,
            import_time_ns=now_ns,
            last_used_ns=now_ns,
            latest=False,
            size_bytes=size_bytes,
            image_id=hash_to_image_id(digest),
        )
        with contextlib.ExitStack() as stack:
            with step("error locking image"):
                stack.enter_context(self.locks.hold(key, exclusive=True))
            try:
                self._publish_locked(temporary, info, manifest, latest=latest)
            except BaseException:
                self._undo(key)
                raise
        return key

    def _publish_locked(
        self, temporary: Temporary, info: AciInfo, manifest: ImageManifest, *, latest: bool | None
    ) -> None:
        with step("error importing image"):
            os.fchmod(temporary.fd, BLOB_MODE)
            publish(temporary.path, self.layout.blob(info.blob_key))
        with step("error marshalling image manifest"):
            document = canonical_json(manifest)
        with step("error importing image manifest"):
            self.temporaries.publish_bytes(document, self.layout.manifest(info.blob_key), mode=MANIFEST_MODE)
        with step("error writing ACI Info"):
            self.infos.save(info, manifest.label_values, latest=latest)

    def _undo(self, key: str) -> None:
        """After a failed import, while its lock is held: no files without a record. What can't be done now, a check does."""
        with contextlib.suppress(MistifyError, OSError):
            if self.infos.find(key) is None:
                self.erase(key)

    def update_tree_store_size(self, key: str, size_bytes: int) -> None:
        """UpdateTreeStoreSize: note how much the rendered tree of an image takes."""
        self.infos.update_tree_store_size(key, size_bytes)

    # -- resolving ---------------------------------------------------------------------------------------------------

    def resolve_key(self, reference: str) -> str:
        """ResolveKey: the whole key that starts with ``reference``; a whole image id is cut to its key first."""
        if not reference.startswith(PREFIX):
            raise InvalidArgumentError("wrong key prefix")
        if len(reference) < KEY_MIN_CHARS:
            raise InvalidArgumentError("image ID too short")
        reference = reference[:KEY_CHARS]
        with step("error retrieving ACI Infos"):
            keys = self.infos.starting_with(reference)
        if not keys:
            raise NotFoundError("no image IDs found")
        if len(keys) > 1:
            raise InvalidArgumentError(f"ambiguous image ID: {shown(reference)}")
        return keys[0]

    def resolve_name(self, name: str) -> tuple[list[str], bool]:
        """ResolveName: all keys of a name, and whether there is one."""
        keys = self.infos.named(name)
        return keys, bool(keys)

    def has_full_key(self, key: str) -> bool:
        """HasFullKey: whether the manifest of exactly this key is stored."""
        return is_key(key) and self.layout.manifest(key).exists()

    def get_aci(self, name: str, labels: Mapping[str, str]) -> str:
        """GetACI: the key of the best image with that name and all those labels."""
        key = self.infos.best(name, labels)
        if key is None:
            wanted = " ".join(f"{{{shown(label)} {shown(value)}}}" for label, value in labels.items())
            raise NotFoundError(
                f"cannot find aci satisfying name: {shown(name)} and labels: [{wanted}] in the local store"
            )
        return key

    # -- reading -----------------------------------------------------------------------------------------------------

    def open_stream(self, reference: str, *, verify: bool = False) -> BinaryIO:
        """ReadStream: the unpacked archive; the image counts as used now. Who has it open reads on when it is removed.

        ``verify`` compares its digest on the way: BadDataError instead of the last piece of a damaged one.
        """
        with step("error resolving image ID"):
            key = self.resolve_key(reference)
        with contextlib.ExitStack() as stack:
            with step("error locking image"):
                stack.enter_context(self.locks.hold(key, exclusive=False))
            return self._open_locked(key, verify=verify)

    def _open_locked(self, key: str, *, verify: bool) -> BinaryIO:
        with step(f"cannot get image info for {shown(key)} from db"):
            if not self.infos.touch(key, self.now_ns()):
                raise NotFoundError(f"cannot find image with key: {key}")
        with os_errors(f"cannot open image {key}"):
            file = self.layout.blob(key).open("rb")
        return VerifyingReader.over(file, key) if verify else file

    def get_image_manifest_json(self, reference: str) -> bytes:
        """GetImageManifestJSON: the canonical manifest."""
        with step("error resolving image ID"):
            key = self.resolve_key(reference)
        with step("error retrieving image manifest"), self.locks.hold(key, exclusive=False):
            return self.layout.manifest(key).read_bytes()

    def get_image_manifest(self, reference: str) -> ImageManifest:
        """GetImageManifest: the manifest, parsed."""
        data = self.get_image_manifest_json(reference)
        with step("error unmarshalling image manifest"):
            return parse_manifest(data)

    def get_aci_info(self, key: str) -> AciInfo:
        """GetACIInfoWithBlobKey: the record of exactly this key."""
        info = self.infos.find(key)
        if info is None:
            raise NotFoundError(f"ACI info not found with blob key {shown(key)}")
        return info

    def list_aci_infos(self, fields: Sequence[str] = (), *, ascending: bool = True) -> list[AciInfo]:
        """GetAllACIInfos: all records, sorted by fields."""
        return self.infos.list(fields, ascending=ascending)

    def dump(self, *, as_hex: bool = False) -> Iterator[str]:
        """Dump: the beginning of everything that is stored, one line each."""
        total = 0
        for base, parent in (("blob", self.layout.blobs), ("imageManifest", self.layout.manifests)):
            for key in list_files(parent):
                total += base == "blob"
                with os_errors(f"cannot read {base} {key}"), (parent / key[7:9] / key).open("rb") as file:
                    value = file.read(DUMP_VALUE_BYTES)
                yield f"{base}/{key}: {value.hex() if as_hex else value.decode('utf-8', 'backslashreplace')}"
        yield f"{total} total image ID(s)"

    # -- remotes -----------------------------------------------------------------------------------------------------

    def get_remote(self, aci_url: str) -> Remote:
        """GetRemote: what is known of a URL."""
        remote = self.infos.find_remote(aci_url)
        if remote is None:
            raise NotFoundError("remote target not found")
        return remote

    def save_remote(self, remote: Remote) -> None:
        """WriteRemote: record what a URL gave."""
        self.infos.save_remote(remote)

    def list_remotes(self) -> Sequence[Remote]:
        """GetAllRemotes: all remotes."""
        return self.infos.list_remotes()

    # -- removing ----------------------------------------------------------------------------------------------------

    def delete_aci(self, key: str) -> None:
        """RemoveACI: remove the image of a whole key: the record and its remotes, then the files.

        StoreRemovalError if files were not as they should be or stay: the image is gone all the same. Files without a record, as a crash
        leaves them, are removed as well.
        """
        if not is_key(key):
            self._unknown(key)
        with self.locks.hold(key, exclusive=True):
            self.delete_locked(key)

    def delete_locked(self, key: str) -> None:
        """The same for who holds the key's exclusive lock."""
        with step(f"cannot remove image with ID: {key} from db"):
            found = self.infos.delete(key)
        if not found and not (self.layout.blob(key).exists() or self.layout.manifest(key).exists()):
            self._unknown(key)
        failed = self.erase(key)
        if found and failed:
            raise StoreRemovalError(
                "some aci disk entries cannot be removed: " + "".join(f"[{text}]" for text in failed)
            )

    def _unknown(self, key: str) -> None:
        with step(f"cannot remove image with ID: {key[:KEY_CHARS]} from db"):
            raise NotFoundError(f"cannot find image with key: {key[:KEY_CHARS]}")

    def erase(self, key: str) -> list[str]:
        """Remove an image's files, each whatever happens to the other; what went wrong."""
        failed = []
        for path in (self.layout.blob(key), self.layout.manifest(key)):
            try:
                path.unlink()
            except OSError as err:
                failed.append(f"{path}: {err.strerror}")
        return failed
