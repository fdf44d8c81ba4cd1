"""Importing app container images: what is accepted, what is refused and how that is told, and that nothing is left of it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.aci import canonical_json, parse_manifest
from imaging.compression import DecompressionLimits
from imaging.errors import MistifyError, NoSpaceError, TooLargeError
from tests.imagestore.conftest import Clock
from tests.imagestore.images import PACKERS, aci, blob_of, entry, files, files_of, key_of, manifest, put, read, tar

GOOD = json.dumps(manifest()).encode()


def test_import_of_every_packing_gives_one_key(store: ImageStore) -> None:
    image = aci()
    assert {put(store, pack(image)) for pack in PACKERS.values()} == {key_of(image)}
    assert files(store) == files_of(key_of(image))
    assert len(store.list_aci_infos()) == 1


def test_import_stores_archive_manifest_and_record(store: ImageStore, clock: Clock) -> None:
    image = aci(labels={"version": "1.0", "os": "linux", "arch": "amd64"}, zzz="unknown")
    key = put(store, gzip.compress(image), latest=True)
    assert blob_of(store, key).read_bytes() == image
    assert blob_of(store, key).stat().st_mode & 0o777 == 0o600
    assert store.get_image_manifest_json(key) == canonical_json(parse_manifest(store.get_image_manifest_json(key)))
    assert b"zzz" not in store.get_image_manifest_json(key)
    info = store.get_aci_info(key)
    assert (info.name, info.size_bytes, info.latest) == ("example.com/app", len(image), True)
    assert (info.import_time_ns, info.last_used_ns, info.tree_store_size_bytes) == (clock.now_ns, clock.now_ns, 0)
    assert info.image_id == f"sha512-{hashlib.sha512(image).hexdigest()}"


ACCEPTED = {
    "names that begin with ./": tar(entry("./manifest", GOOD), entry("./rootfs", None)),
    "manifest last": tar(entry("rootfs", None), entry("rootfs/x", b"1"), entry("manifest", GOOD)),
    "manifest twice, the first counts": tar(entry("manifest", GOOD), entry("manifest", b"junk")),
    "no rootfs": tar(entry("manifest", GOOD)),
    "more at the top": tar(entry("manifest", GOOD), entry("rootfs", None), entry("other", b"x")),
    "padding after the end": tar(entry("manifest", GOOD)) + bytes(5000),
    "a long name": tar(entry("manifest", GOOD), entry("rootfs/" + "d/" * 120 + "x", b"1")),
    "a long name as GNU tar writes it": tar(
        entry("manifest", GOOD), entry("rootfs/" + "d" * 200, b"1"), style=tarfile.GNU_FORMAT
    ),
    "an extended header before the manifest": tar(entry("manifest", GOOD, pax_headers={"comment": "x" * 3000})),
    "links inside": tar(
        entry("manifest", GOOD),
        entry("rootfs/a", b"1"),
        entry("rootfs/hard", b"", type=tarfile.LNKTYPE, linkname="rootfs/a"),
        entry("rootfs/soft", b"", type=tarfile.SYMTYPE, linkname="../../etc/passwd"),
    ),
}


@pytest.mark.parametrize("what", sorted(ACCEPTED))
def test_import_accepts(store: ImageStore, what: str) -> None:
    image = ACCEPTED[what]
    assert put(store, image) == key_of(image)
    assert store.get_image_manifest(key_of(image)).name == "example.com/app"


def _entries(*extra: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return tar(entry("manifest", GOOD), *extra)


def _cut(image: bytes, count: int) -> bytes:
    return image[:count]


def _damaged_sum(image: bytes) -> bytes:
    return image[:148] + b"000001" + image[154:]


LABELS = [{"name": "a", "value": "1"}, {"name": "a", "value": "2"}]
APP: dict[str, Any] = {"exec": ["/a"], "user": "0", "group": "0"}
EXTRACTING = "error extracting image manifest"
UNPACKING = "error decompressing image"
COPYING = "error copying image"
NOISE = hashlib.sha512(b"noise").digest() * 40
OUTSIDE = "the archive has a name that leads out of it"
BROKEN: dict[str, tuple[bytes, str, str]] = {
    "noise": (NOISE, UNPACKING, "error: unknown image filetype"),
    "an empty archive": (bytes(10240), UNPACKING, "error: unknown image filetype"),
    "text": (b"hello, world\n" * 50, UNPACKING, "no type returned from DetectFileType?"),
    "nothing": (b"", UNPACKING, "no type returned from DetectFileType?"),
    "an archive too short for its magic": (aci()[:260], UNPACKING, "error: unknown image filetype"),
    "cut off gzip": (gzip.compress(aci(content=NOISE))[:-20], COPYING, "unexpected EOF"),
    "cut off bzip2": (_cut(PACKERS["bzip2"](aci()), 100), COPYING, "unexpected EOF"),
    "cut off xz": (_cut(PACKERS["xz"](aci()), 100), COPYING, "unexpected EOF"),
    "cut off zstd": (_cut(PACKERS["zstd"](aci()), 100), COPYING, "unexpected EOF"),
    "gzip magic only": (b"\x1f\x8b", COPYING, "unexpected EOF"),
    "damaged gzip": (gzip.compress(aci())[:-8] + bytes(8), COPYING, "the gzip data is damaged"),
    "damaged xz": (b"\xfd7zXZ\0" + NOISE, COPYING, "the xz data is damaged"),
    "gzip of text": (gzip.compress(b"hello"), EXTRACTING, "unexpected EOF"),
    "gzip of gzip": (gzip.compress(gzip.compress(aci())), EXTRACTING, ""),
    "something after gzip": (gzip.compress(aci()) + NOISE, COPYING, "the gzip data is damaged"),
    "cut off in the manifest": (_cut(aci(), 600), EXTRACTING, "unexpected EOF"),
    "cut off in a header": (_cut(aci(), 1300), EXTRACTING, "unexpected EOF"),
    "cut off after the manifest": (_cut(aci(content=bytes(4096)), 3000), EXTRACTING, "unexpected EOF"),
    "a header with a wrong sum": (_damaged_sum(aci()), EXTRACTING, "archive/tar: invalid tar header"),
    "no manifest": (tar(entry("rootfs", None)), EXTRACTING, "missing manifest"),
    "a directory as manifest": (tar(entry("manifest", None)), EXTRACTING, "missing manifest"),
    "a link as manifest": (
        tar(entry("manifest", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        EXTRACTING,
        "missing manifest",
    ),
    "a manifest that is no JSON": (tar(entry("manifest", b"{")), EXTRACTING, "the manifest is not a JSON document"),
    "an empty manifest": (tar(entry("manifest", b"")), EXTRACTING, "the manifest is not a JSON document"),
    "a manifest over 1 MiB": (
        tar(entry("manifest", GOOD + b" " * (1 << 20))),
        EXTRACTING,
        "'manifest' of the archive is larger than 1048576 bytes",
    ),
    "wrong kind": (aci(acKind="Foo"), EXTRACTING, "bad ACKind: Foo"),
    "no kind": (aci(acKind=...), EXTRACTING, 'missing or bad ACKind (must be "ImageManifest")'),
    "no version": (aci(acVersion=...), EXTRACTING, "acVersion must be set"),
    "bad version": (aci(acVersion="1"), EXTRACTING, "SemVer is bad"),
    "no name": (aci(""), EXTRACTING, "name must be set"),
    "upper case": (aci("A"), EXTRACTING, "ACIdentifier must contain only lower case alphanumeric characters plus"),
    "an edge": (aci("a-"), EXTRACTING, "ACIdentifier must start and end with only lower case"),
    "a label twice": (aci(labels=LABELS), EXTRACTING, 'duplicate labels of name "a"'),
    "a label called name": (aci(labels={"name": "x"}), EXTRACTING, 'invalid label name: "name"'),
    "an unknown system": (aci(labels={"os": "plan9"}), EXTRACTING, 'bad os "plan9" (must be one of: [darwin freeb'),
    "an unknown architecture": (
        aci(labels={"os": "linux", "arch": "x86_64"}),
        EXTRACTING,
        'bad arch "x86_64" for linux',
    ),
    "a bad date": (aci(annotations=[{"name": "created", "value": "x"}]), EXTRACTING, "bad Date: x"),
    "a bad link": (aci(annotations=[{"name": "homepage", "value": "x:y"}]), EXTRACTING, "bad URL scheme, must be"),
    "no user": (aci(app=APP | {"user": ""}), EXTRACTING, "user is required"),
    "a relative directory": (aci(app=APP | {"workingDirectory": "x"}), EXTRACTING, "workingDirectory must be an"),
    "a nameless dependency": (aci(dependencies=[{"imageName": ""}]), EXTRACTING, "imageName cannot be empty"),
    "an unknown hash": (
        aci(dependencies=[{"imageName": "a", "imageID": "md5-1"}]),
        EXTRACTING,
        "unrecognized hash type: md5",
    ),
    "a name with ..": (_entries(entry("rootfs/../../x", b"1")), EXTRACTING, OUTSIDE),
    "an absolute name": (_entries(entry("/etc/passwd", b"1")), EXTRACTING, OUTSIDE),
    "a hard link to outside": (
        _entries(entry("rootfs/l", b"", type=tarfile.LNKTYPE, linkname="../secret")),
        EXTRACTING,
        OUTSIDE,
    ),
    "a name with .. in an extended header": (
        _entries(entry("x", b"1", pax_headers={"path": "../" + "x" * 200})),
        EXTRACTING,
        OUTSIDE,
    ),
    "a huge extended header": (
        _entries(entry("x", b"1", pax_headers={"comment": "x" * (2 << 20)})),
        EXTRACTING,
        "an extended header of the archive is larger than 1048576 bytes",
    ),
    "a size that is no number": (
        _entries(entry("x", b"1", pax_headers={"size": "many"})),
        EXTRACTING,
        "a size in the archive is not a number",
    ),
    "a negative size": (
        _entries(entry("x", b"1", pax_headers={"size": "-5"})),
        EXTRACTING,
        "a size in the archive is negative",
    ),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_import_refuses_and_leaves_nothing(store: ImageStore, what: str) -> None:
    image, outer, cause = BROKEN[what]
    with pytest.raises(MistifyError) as caught:
        put(store, image)
    assert caught.value.message == outer
    assert caught.value.code in {"bad_data", "too_large"}
    assert isinstance(caught.value.__cause__, MistifyError)
    assert caught.value.__cause__.message.startswith(cause)
    assert chain(caught.value).startswith(f"{outer}: {cause}")
    assert files(store) == set()
    assert store.list_aci_infos() == []


def test_broken_images_are_of_forty_kinds_and_more() -> None:
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz", "zstd"])
def test_import_of_a_bomb_is_refused_at_the_limit(tmp_path: Path, packing: str) -> None:
    limits = DecompressionLimits(output_max_bytes=64 << 20, ratio_max=20, ratio_floor_bytes=1 << 20)
    bomb = PACKERS[packing](aci(content=bytes(8 << 20)))
    with ImageStore(tmp_path / "store", limits=limits) as store:
        with pytest.raises(TooLargeError, match="error copying image") as caught:
            put(store, bomb)
        assert "grows to more than 20 times" in chain(caught.value)
        assert files(store) == set()


def test_import_over_the_size_limit_is_refused(tmp_path: Path) -> None:
    with ImageStore(tmp_path / "store", limits=DecompressionLimits(output_max_bytes=1 << 20)) as store:
        with pytest.raises(TooLargeError, match="error copying image"):
            put(store, aci(content=bytes(2 << 20)))
        assert files(store) == set()


class _Failing(io.RawIOBase):
    """A source that gives so much and then fails."""

    def __init__(self, data: bytes, error: OSError) -> None:
        super().__init__()
        self._data, self._error = io.BytesIO(data), error

    def read(self, size: int = -1, /) -> bytes:
        piece = self._data.read(size)
        if not piece:
            raise self._error
        return piece


def test_import_from_a_source_that_breaks_leaves_nothing(store: ImageStore) -> None:
    with pytest.raises(MistifyError, match="error copying image") as caught:
        store.write_aci(_Failing(aci()[:2048], OSError(5, "Input/output error")))
    assert chain(caught.value) == "error copying image: Input/output error"
    assert files(store) == set()


def test_import_onto_a_full_disk_is_told_as_the_step_and_leaves_nothing(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("image_service.imagestore.spool.write_all", full)
    with pytest.raises(NoSpaceError) as caught:
        put(store, aci())
    assert chain(caught.value) == "error copying image: No space left on device"
    assert files(store) == set()


FAILING_STEPS: list[tuple[str, str]] = [
    ("error importing image", "store.publish"),
    ("error importing image manifest", "spool.TemporaryFiles.publish_bytes"),
    ("error marshalling image manifest", "store.canonical_json"),
    ("error copying image", "store.fill"),
    ("error creating image", "spool.open_locked"),
    ("error closing image", "store.os.fsync"),
    ("error locking image", "locks.open_locked"),
]


@pytest.mark.parametrize(("outer", "function"), FAILING_STEPS)
def test_import_that_fails_at_a_step_tells_it_and_leaves_nothing(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, outer: str, function: str
) -> None:
    monkeypatch.setattr(f"image_service.imagestore.{function}", _raise_full)
    with pytest.raises(NoSpaceError) as caught:
        put(store, aci())
    assert caught.value.message == outer
    assert files(store) == set()


def test_import_whose_record_fails_leaves_nothing(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.infos, "save", _raise_full)
    with pytest.raises(NoSpaceError, match="error writing ACI Info"):
        put(store, aci())
    assert files(store) == set()


def test_import_again_whose_record_fails_keeps_the_image(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(store, aci())
    with monkeypatch.context() as patch:
        patch.setattr(store.infos, "save", _raise_full)
        with pytest.raises(NoSpaceError):
            put(store, aci())
    assert files(store) == files_of(key)
    assert read(store, key) == aci()


def _raise_full(*_: object, **__: object) -> None:
    raise NoSpaceError("no space left on device")


def test_import_again_renews_times_and_keeps_latest_and_tree_size(store: ImageStore, clock: Clock) -> None:
    key = put(store, aci(), latest=True)
    store.update_tree_store_size(key, 77)
    clock.move(5)
    assert put(store, aci()) == key
    info = store.get_aci_info(key)
    assert (info.latest, info.tree_store_size_bytes) == (True, 77)
    assert info.import_time_ns == info.last_used_ns == clock.now_ns
    put(store, aci(), latest=False)
    assert not store.get_aci_info(key).latest


def test_tree_store_size_of_an_unknown_image_is_no_error(store: ImageStore) -> None:
    store.update_tree_store_size("sha512-" + "0" * 64, 5)
    assert store.list_aci_infos() == []


def _packed_by_program(program: str) -> Callable[[bytes], bytes]:
    import subprocess

    return lambda image: subprocess.run([program, "-c"], input=image, capture_output=True, check=True).stdout


@pytest.mark.parametrize("program", ["gzip", "bzip2", "xz", "zstd"])
def test_import_of_what_real_programs_packed_gives_the_key(store: ImageStore, program: str) -> None:
    image = aci(content=NOISE * 1000)
    assert put(store, _packed_by_program(program)(image)) == key_of(image)
