"""One image as clients of a catalogue want it: which files, with which digests, under which names.

Virtual machines are offered as qcow2 (a raw disk is converted, a compressed one unpacked), containers as squashfs or tarball, and
volume streams as ``volume.zfs``, which other clients skip. Incus and LXD also want a small tarball that describes the image, and the
digest of that tarball followed by the root file; a unified tarball describes itself. Whatever is made here is stored as a blob:
building twice gives the same bytes once.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import platform
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from image_service.catalog_tarballs import TarballKind, find_tarball_kind
from image_service.lifecycle import Image, ImageType
from imaging.blobs.base import BlobInfo, BlobStore
from imaging.compression import Compression, Readable, open_decompressed, sniff
from imaging.digests import Digest
from imaging.diskimage.base import Disk, DiskFormat, Extent
from imaging.diskimage.probe import open_disk, sniff_disk
from imaging.diskimage.qcow2_writer import write_qcow2
from imaging.errors import UnavailableError, UnsupportedError
from imaging.files import os_errors

PIECE_BYTES = 1 << 20
HEAD_BYTES = 4096
"""Where every format we know shows itself; a tar's magic is at byte 257."""

RULES = 2
"""Entries that were built by older rules are built anew."""

BUILD_LEASE = "catalog-build"
LEASE_TTL_S = 2 * 3600.0
"""How long the files of a catalogue outlive it: a client may use an index for an hour, and then download for another."""

_KERNEL_ARCHES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "armhf", "ppc64le": "ppc64el", "i686": "i386"}
_STREAM_MAGICS = ((0x2F5BACBAC).to_bytes(8, "little"), (0x2F5BACBAC).to_bytes(8, "big"))


def machine_arch() -> str:
    """This machine's architecture, under Debian's name."""
    return _KERNEL_ARCHES.get(platform.machine(), platform.machine())


class CatalogLabels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an image appears in the catalogue. Empty texts have defaults that are made of its record."""

    published: bool = True
    os: str = ""
    release: str = ""
    release_title: str = ""
    version: str = ""
    """The release's version (``24.04``); with it the image is also offered to clients that deploy by id."""
    arch: str = ""
    variant: str = "default"
    aliases: list[str] = msgspec.field(default_factory=list)
    requirements: dict[str, str] = msgspec.field(default_factory=dict)
    support_eol: str = ""

    def filled(self, image: Image) -> CatalogLabels:
        """With the defaults for that image."""
        title = self.release_title or " ".join(image.comment.split())[:80] or self.release or image.id
        return msgspec.structs.replace(
            self,
            os=self.os or "mistify",
            release=self.release or image.id,
            release_title=title,
            arch=self.arch or machine_arch(),
            aliases=self.aliases or [image.id],
        )


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One image in the catalogue; without items it is not offered, and ``reason`` says why."""

    image_id: str
    labels: CatalogLabels
    serial: str
    key: str
    items: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    reason: str = ""

    def digests(self) -> set[Digest]:
        """The blobs its items are."""
        return {Digest("sha256", item["sha256"]) for item in self.items.values()}


def entry_key(image: Image, labels: CatalogLabels) -> str:
    """Changes when the entry must be built anew."""
    return hashlib.sha256(
        msgspec.json.encode([RULES, image.digest, image.type, labels], order="deterministic")
    ).hexdigest()


def item_path(sha256: str, name: str) -> str:
    """Where clients get a file: its content never changes, so its address is its digest."""
    return f"files/{sha256}/{name}"


@dataclass(frozen=True, slots=True)
class _Root:
    """The file an image's guests run from."""

    ftype: str
    combined: tuple[str, ...]
    """Attributes of the description that hold the digest of both; none: clients of containers do not know such files."""
    info: BlobInfo
    names: tuple[str, ...] = ()
    """What else the same file is called: it is offered once under each name."""


class _Interruptible:
    """A disk that asks before every piece whether to go on."""

    def __init__(self, disk: Disk, check: Callable[[], None]) -> None:
        self._disk = disk
        self._check = check
        self.format = disk.format
        self.virtual_size_bytes = disk.virtual_size_bytes

    def extents(self) -> Iterator[Extent]:
        """As the disk."""
        return self._disk.extents()

    def read(self, extent: Extent) -> bytes:
        """As the disk, or UnavailableError."""
        self._check()
        return self._disk.read(extent)


class EntryBuilder:
    """Builds entries. Blocking; one thread at a time."""

    def __init__(self, blobs: BlobStore, workdir: Path, *, owner: str = "") -> None:
        self._blobs = blobs
        self._workdir = workdir
        self._owner = owner
        """Who builds: replicas build apart, under leases and in ingests of their own."""
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End what is being built, from another thread: it raises UnavailableError soon, and so does everything after it."""
        self._stopped.set()

    def _pieces(self, source: Readable) -> Iterator[bytes]:
        while piece := source.read(PIECE_BYTES):
            self._check_stopped()
            yield piece

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise UnavailableError("the catalogue is not built any more: the service is ending")

    def build(self, image: Image, labels: CatalogLabels) -> CatalogEntry:
        """The entry of a complete image. What can't be offered becomes an entry with a reason."""
        filled = labels.filled(image)
        serial = (image.download_end or datetime.fromtimestamp(0, UTC)).strftime("%Y%m%d_%H%M%S")
        entry = CatalogEntry(image_id=image.id, labels=filled, serial=serial, key=entry_key(image, labels))
        try:
            root = self._root(image)
        except UnsupportedError as err:
            return msgspec.structs.replace(entry, reason=err.message)
        items = {name: _item(name, root.info, name) for name in (root.ftype, *root.names)}
        if root.combined:
            items |= self._descriptions(entry, image, root)
        return msgspec.structs.replace(entry, items=items)

    # -- the root file -----------------------------------------------------------------------------------------------

    def _root(self, image: Image) -> _Root:
        info = self._blobs.info(image.blob)
        compression = sniff(self._head(info, Compression.NONE))
        head = self._head(info, compression)
        if head[8:16] in _STREAM_MAGICS or head[:8] in _STREAM_MAGICS:
            return _Root("volume.zfs", (), info)
        if image.type is ImageType.CONTAINER:
            return self._container_root(info, head)
        if compression is Compression.NONE and sniff_disk(head) is DiskFormat.QCOW2:
            return _Root("disk-kvm.img", ("combined_disk-kvm-img_sha256",), info)
        return _Root("disk-kvm.img", ("combined_disk-kvm-img_sha256",), self._converted(image, info))

    def _container_root(self, info: BlobInfo, head: bytes) -> _Root:
        if head.startswith(b"hsqs"):
            return _Root("squashfs", ("combined_squashfs_sha256",), info)
        if head[257:262] == b"ustar":
            return self._tarball_root(info)
        raise UnsupportedError("a container image must be a tarball, a squashfs or a volume stream to be offered")

    def _tarball_root(self, info: BlobInfo) -> _Root:
        kind = find_tarball_kind(self._blobs, info)
        if kind is TarballKind.UNIFIED:
            return _Root("incus_combined.tar.gz", (), info, names=("lxd_combined.tar.gz",))
        if kind is not TarballKind.ROOTFS:
            raise UnsupportedError(f"an {kind} is not offered: clients of this catalogue could not start it")
        return _Root("root.tar.xz", ("combined_rootxz_sha256", "combined_sha256"), info)

    def _head(self, info: BlobInfo, compression: Compression) -> bytes:
        """The first bytes, unpacked."""
        with self._blobs.open(info.digest) as file:
            reader = open_decompressed(file, compression=compression)
            head = b""
            while len(head) < HEAD_BYTES and (piece := reader.read(HEAD_BYTES - len(head))):
                head += piece
            return head

    def _converted(self, image: Image, info: BlobInfo) -> BlobInfo:
        """The disk as qcow2."""
        with self._plain_file(info) as source, tempfile.TemporaryFile(dir=self._workdir) as target:
            write_qcow2(_Interruptible(open_disk(source.fileno()), self._check_stopped), target.fileno())
            target.seek(0)
            return self._store(f"catalog-{image.id}-{self._owner}", target)

    @contextmanager
    def _plain_file(self, info: BlobInfo) -> Iterator[BinaryIO]:
        """The blob's content, unpacked, as a file that can be read at any place."""
        with self._blobs.open(info.digest) as blob, tempfile.TemporaryFile(dir=self._workdir) as file:
            with os_errors("cannot unpack a disk image"):
                reader = open_decompressed(blob)
                for piece in self._pieces(reader):
                    _write_sparse(file, piece)
                file.truncate()
            yield file

    def _store(self, ref: str, source: BinaryIO) -> BlobInfo:
        self.hold([])
        with self._blobs.ingest(ref, lease=self._lease) as writer:
            writer.restart()
            for piece in self._pieces(source):
                writer.write(piece)
            info = writer.commit()
        self.hold([info.digest])
        return info

    @property
    def _lease(self) -> str:
        return f"{BUILD_LEASE}-{self._owner}"

    def hold(self, digests: Iterable[Digest]) -> None:
        """Protect blobs until they are in a published catalogue, which has a lease of its own."""
        self._blobs.lease(self._lease, set(digests), ttl_s=LEASE_TTL_S)

    # -- the description ---------------------------------------------------------------------------------------------

    def _descriptions(self, entry: CatalogEntry, image: Image, root: _Root) -> dict[str, dict[str, Any]]:
        """The same small tarball for Incus and LXD, each under the name it looks for."""
        packed = describe(entry, image)
        info = self._store(f"catalog-{image.id}-{self._owner}", io.BytesIO(packed))
        combined = dict.fromkeys(root.combined, self._combined(packed, root.info))
        return {name: _item(name, info, name) | combined for name in ("incus.tar.xz", "lxd.tar.xz")}

    def _combined(self, packed: bytes, root: BlobInfo) -> str:
        hasher = hashlib.sha256(packed)
        with self._blobs.open(root.digest) as file:
            for piece in self._pieces(file):
                hasher.update(piece)
        return hasher.hexdigest()


def _write_sparse(file: BinaryIO, piece: bytes) -> None:
    """Leave a hole for zeros: disks are mostly that."""
    if piece.count(0) == len(piece):
        file.seek(len(piece), io.SEEK_CUR)
    else:
        file.write(piece)


def _item(ftype: str, info: BlobInfo, name: str) -> dict[str, Any]:
    return {
        "ftype": ftype,
        "path": item_path(info.digest.hex, name),
        "size": info.size_bytes,
        "sha256": info.digest.hex,
    }


def describe(entry: CatalogEntry, image: Image) -> bytes:
    """``metadata.yaml`` in a tarball, the same bytes for the same image whenever it is made."""
    labels = entry.labels
    names = {"os": labels.os, "release": labels.release, "variant": labels.variant, "architecture": labels.arch}
    created = image.download_end or datetime.fromtimestamp(0, UTC)
    metadata = {
        "architecture": next((k for k, v in _KERNEL_ARCHES.items() if v == labels.arch), labels.arch),
        "creation_date": int(created.timestamp()),
        "properties": names | {"serial": entry.serial, "description": f"{labels.os} {labels.release_title}"},
        "templates": {},
    }
    text = msgspec.json.format(msgspec.json.encode(metadata, order="deterministic"), indent=1) + b"\n"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("metadata.yaml")  # JSON is YAML, too
        member.size, member.mode = len(text), 0o644
        tar.addfile(member, io.BytesIO(text))
    return lzma.compress(packed.getvalue(), preset=6)
