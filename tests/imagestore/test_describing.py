"""What a stored container image says about itself."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from image_service.imagestore.describing import Description, describe
from imaging.blobs.local import LocalBlobStore
from imaging.compression import Compression
from imaging.errors import BadDataError
from tests.imagestore.images import PACKERS, aci, entry, tar
from tests.imagestore.test_oci_images import Layout

LABELS = {"version": "1.0", "os": "linux", "arch": "amd64"}


def _describe(directory: Path, data: bytes, compression: Compression = Compression.NONE) -> Description:
    with contextlib.closing(LocalBlobStore(directory / "blobs", reserve_free_bytes=0)) as blobs:
        with blobs.ingest("x") as writer:
            writer.write(data)
            info = writer.commit()
        return describe(blobs, info.digest, compression)


def _pack(packing: str) -> tuple[Callable[[bytes], bytes], Compression]:
    return PACKERS[packing], Compression.NONE if packing == "plain" else Compression(packing)


@pytest.mark.parametrize("packing", sorted(PACKERS))
def test_app_container_says_name_version_and_labels(tmp_path: Path, packing: str) -> None:
    pack, compression = _pack(packing)
    said = _describe(tmp_path, pack(aci(labels=LABELS)), compression)
    assert (said.name, said.version, said.labels) == ("example.com/app", "1.0", LABELS | {"kind": "aci"})


@pytest.mark.parametrize("packing", ["plain", "gzip"])
def test_layout_says_name_and_tag(tmp_path: Path, packing: str) -> None:
    pack, compression = _pack(packing)
    layout = Layout()
    layout.tag(layout.image(b"layer"), "example.com/app:v1")
    said = _describe(tmp_path, pack(layout.pack()), compression)
    assert (said.name, said.version, said.labels) == ("example.com/app", "v1", {"tag": "v1", "kind": "oci"})


def test_layout_with_a_damaged_layer_is_refused(tmp_path: Path) -> None:
    layout = Layout()
    layout.tag(layout.image(b"layer"), "v1")
    layout.files = {name: b"LAYER" if data == b"layer" else data for name, data in layout.files.items()}
    with pytest.raises(BadDataError, match="has another digest"):
        _describe(tmp_path, layout.pack())


def test_app_container_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match='duplicate labels of name "a"'):
        _describe(tmp_path, aci(labels=[{"name": "a", "value": "1"}, {"name": "a", "value": "2"}]))


@pytest.mark.parametrize(
    "data",
    [
        tar(entry("etc", None), entry("etc/passwd", b"x")),
        tar(entry("manifest", b"a file of somebody's")),
        tar(entry("manifest", b'{"not": "ours"}')),
        tar(entry("/etc/passwd", b"absolute, as old programs write it")),
        hashlib.sha512(b"noise").digest() * 100,
        b"",
    ],
)
def test_what_says_nothing_is_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    assert _describe(tmp_path, data) == Description()


def test_squashfs_is_known_by_its_magic(tmp_path: Path) -> None:
    assert _describe(tmp_path, b"hsqs" + bytes(8192)).labels == {"kind": "squashfs"}
