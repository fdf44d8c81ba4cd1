"""What a stored container image says about itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from image_service.imagestore.describing import Description, describe
from imaging.blobs.local import LocalBlobStore
from imaging.compression import Compression, open_decompressed
from imaging.errors import BadDataError
from tests.imagestore.images import PACKERS, aci, entry, manifest, tar
from tests.imagestore.test_oci_images import Layout

LABELS = {"version": "1.0", "os": "linux", "arch": "amd64"}


def _describe(directory: Path, data: bytes, compression: Compression = Compression.NONE) -> Description:
    with contextlib.closing(LocalBlobStore(directory / "blobs", reserve_free_bytes=0)) as blobs:
        with blobs.ingest("x") as writer:
            writer.write(data)
            info = writer.commit()

        @contextlib.contextmanager
        def whole() -> Iterator[int]:
            with blobs.open(info.digest) as stored, tempfile.TemporaryFile() as file:
                file.write(open_decompressed(stored, compression=compression).read())
                file.flush()
                yield file.fileno()

        return describe(blobs, info.digest, compression, whole)


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


@pytest.fixture
def short_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so much is looked at before it shows whether all must be."""
    monkeypatch.setattr("image_service.imagestore.describing.BEGINNING_BYTES", 100_000)
    monkeypatch.setattr("image_service.imagestore.describing.PIECE_BYTES", 50_000)


@pytest.mark.usefixtures("short_beginning")
@pytest.mark.parametrize("packing", ["gzip", "xz", "zstd"])
@pytest.mark.parametrize("damaged", [False, True])
def test_large_packed_layout_is_looked_at_whole(tmp_path: Path, packing: str, *, damaged: bool) -> None:
    """As skopeo writes them: layers first, the documents that say what they are at the end."""
    pack, compression = _pack(packing)
    layout, layer = Layout(), random.Random(1).randbytes(300_000)
    layout.tag(layout.image(layer), "example.com/app:v1")
    layout.files = dict(sorted(layout.files.items()))
    if damaged:
        layout.files = {name: layer[::-1] if data == layer else data for name, data in layout.files.items()}
        with pytest.raises(BadDataError, match="has another digest"):
            _describe(tmp_path, pack(layout.pack()), compression)
        return
    said = _describe(tmp_path, pack(layout.pack()), compression)
    assert (said.name, said.version, said.labels) == ("example.com/app", "v1", {"tag": "v1", "kind": "oci"})


@pytest.mark.usefixtures("short_beginning")
def test_large_packed_app_container_with_its_manifest_last_is_looked_at_whole(tmp_path: Path) -> None:
    pack, compression = _pack("gzip")
    document = json.dumps(manifest(labels=LABELS)).encode()
    image = tar(entry("rootfs", None), entry("rootfs/big", bytes(300_000)), entry("manifest", document))
    assert _describe(tmp_path, pack(image), compression).name == "example.com/app"


@pytest.mark.usefixtures("short_beginning")
def test_large_packed_root_file_system_is_not_unpacked_whole(tmp_path: Path) -> None:
    rootfs = tar(entry("etc", None), entry("etc/big", bytes(300_000)), entry("manifest", b"{"))
    with contextlib.closing(LocalBlobStore(tmp_path, reserve_free_bytes=0)) as blobs, blobs.ingest("x") as writer:
        writer.write(PACKERS["gzip"](rootfs))
        info = writer.commit()

        def whole() -> contextlib.AbstractContextManager[int]:
            raise AssertionError("its names show that it is neither")

        assert describe(blobs, info.digest, Compression.GZIP, whole) == Description()


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
