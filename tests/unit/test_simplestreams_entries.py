"""How one image is offered: built once, the same bytes every time, and given up when the service ends."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from image_service.catalog_entries import CatalogLabels, EntryBuilder
from image_service.lifecycle import Image, ImageStatus, ImageType
from imaging.blobs.local import LocalBlobStore
from imaging.errors import UnavailableError
from tests.imagestore.images import PACKERS, aci, entry, tar
from tests.imagestore.test_oci_images import Layout
from tests.simplestreams.public import unified_tarball

WHEN = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


def stored(blobs: LocalBlobStore, data: bytes, kind: ImageType = ImageType.KVM) -> Image:
    with blobs.ingest("upload") as writer:
        writer.write(data)
        info = writer.commit()
    return Image(id="i", type=kind, status=ImageStatus.COMPLETE, digest=str(info.digest), download_end=WHEN)


def test_entry_is_the_same_whoever_builds_it(tmp_path: Path) -> None:
    entries, packed = [], b""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-work").mkdir()
        blobs = LocalBlobStore(tmp_path / name)
        image = stored(blobs, bytes(1 << 20) + b"x" * 512)
        entries.append(EntryBuilder(blobs, tmp_path / f"{name}-work").build(image, CatalogLabels(arch="amd64")))
        description = entries[-1].items["incus.tar.xz"]
        with blobs.open(next(d for d in entries[-1].digests() if d.hex == description["sha256"])) as file:
            packed = lzma.decompress(file.read())
        blobs.close()
    assert entries[0] == entries[1]
    assert entries[0].serial == "20240506_070809"
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        member = tar.extractfile("metadata.yaml")
        assert member is not None
        metadata = json.load(member)
    assert (metadata["architecture"], metadata["creation_date"]) == ("x86_64", int(WHEN.timestamp()))
    assert metadata["properties"]["serial"] == "20240506_070809"


def test_build_is_given_up_when_the_service_ends(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blobs = LocalBlobStore(tmp_path / "blobs")
    image = stored(blobs, bytes(1 << 20) + b"x" * 512)
    builder = EntryBuilder(blobs, tmp_path)
    builder.stop()
    with pytest.raises(UnavailableError, match="the service is ending"):
        builder.build(image, CatalogLabels())
    assert [info.digest for info in blobs.list()] == [image.blob], "nothing half-built became a blob"
    blobs.close()


def built(directory: Path, data: bytes) -> tuple[list[str], str]:
    """What a container image is offered as, or why it is not."""
    (directory / "blobs").mkdir()
    blobs = LocalBlobStore(directory / "blobs")
    made = EntryBuilder(blobs, directory).build(stored(blobs, data, ImageType.CONTAINER), CatalogLabels())
    blobs.close()
    return sorted(made.items), made.reason


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_unified_tarball_is_offered_as_such_under_both_names(tmp_path: Path, packing: str) -> None:
    data = PACKERS[packing](unified_tarball(mode="w"))
    assert built(tmp_path, data) == (["incus_combined.tar.gz", "lxd_combined.tar.gz"], "")


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_plain_root_file_system_is_offered_with_a_description(tmp_path: Path, packing: str) -> None:
    rootfs = tar(entry("./etc", None), entry("./etc/motd", b"hello"), entry("./big", bytes(20 << 20)))
    assert built(tmp_path, PACKERS[packing](rootfs)) == (["incus.tar.xz", "lxd.tar.xz", "root.tar.xz"], "")


def test_app_container_or_layout_is_not_offered_as_a_root_file_system(tmp_path: Path) -> None:
    layout = Layout()
    layout.tag(layout.image(b"layer"), "v1")
    for name, data in (("app container", aci()), ("OCI layout", layout.pack())):
        (tmp_path / name).mkdir()
        reason = f"an {name} is not offered: clients of this catalogue could not start it"
        assert built(tmp_path / name, data) == ([], reason)
