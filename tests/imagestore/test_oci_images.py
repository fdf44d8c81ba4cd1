"""OCI images: layouts made by real tools go in and come out equal; what is broken leaves nothing."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_service.imagestore.importing import Imported, import_image
from image_service.imagestore.oci_checking import OciCheck
from image_service.imagestore.oci_images import OciImages
from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.errors import InvalidArgumentError, MistifyError, NotFoundError
from imaging.oci import ImageReference, name_of
from tests.imagestore.conftest import Clock
from tests.imagestore.images import aci as aci_image
from tests.imagestore.images import entry, files, put, tar

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"


class Layout:
    """A layout in the making; tests break it before it is packed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
        self.index: list[dict[str, Any]] = []

    def add(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        self.files[f"blobs/sha256/{digest}"] = data
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    def image(self, *layers: bytes, **changes: Any) -> dict[str, Any]:
        config = self.add(json.dumps({"architecture": "amd64", "os": "linux", "n": len(layers)}).encode(), CONFIG)
        parts = [self.add(layer, LAYER) for layer in layers]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": parts} | changes
        return self.add(json.dumps(manifest).encode(), MANIFEST)

    def tag(self, descriptor: dict[str, Any], tag: str | None) -> Layout:
        annotations = {} if tag is None else {"annotations": {"org.opencontainers.image.ref.name": tag}}
        self.index.append(descriptor | annotations)
        return self

    def pack(self) -> bytes:
        index = {"schemaVersion": 2, "manifests": self.index}
        documents = {"index.json": json.dumps(index).encode()} | self.files
        return tar(*[entry(name, data) for name, data in documents.items()])


def _import(store: ImageStore, image: bytes, name: str = "app") -> list[Imported]:
    return import_image(store, io.BytesIO(image), name=name)


def _two_images() -> Layout:
    layout = Layout()
    base, extra = b"base layer" * 1000, b"extra layer" * 1000
    return layout.tag(layout.image(base), "v1").tag(layout.image(base, extra), "v2")


def test_layout_is_listed_by_name_and_tag_and_shares_layers(store: ImageStore) -> None:
    layout = _two_images()
    first, second = _import(store, layout.pack())
    images = OciImages(store)
    assert [image.tags for image in (images.get(first.key), images.get(second.key))] == [("app:v1",), ("app:v2",)]
    assert images.resolve("app:v2").digest == second.key
    assert images.resolve(second.key[:14]).digest == second.key
    stored = {path for path in files(store) if path.startswith("oci/blobs")}
    assert len(stored) == len([name for name in layout.files if name.startswith("blobs/")])
    assert first.labels == {"tag": "v1"}


def test_layout_with_an_index_of_platforms_is_one_image(store: ImageStore) -> None:
    layout = Layout()
    platforms = [layout.image(b"amd64"), layout.image(b"arm64", b"more")]
    inner = layout.add(json.dumps({"schemaVersion": 2, "manifests": platforms}).encode(), INDEX)
    [image] = _import(store, layout.tag(inner, None).pack())
    assert (image.name, image.labels, image.key) == ("app", {"tag": "latest"}, inner["digest"])
    buffer = io.BytesIO()
    OciImages(store).export(OciImages(store).get(image.key), buffer)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        assert {name for name in archive.getnames() if name.startswith("blobs/")} == {
            name for name in layout.files if name.startswith("blobs/")
        }


def _break_layer(layout: Layout) -> None:
    name = next(name for name, data in layout.files.items() if data.startswith(b"extra"))
    layout.files[name] = layout.files[name][:-1] + b"X"


def _drop(match: bytes) -> Callable[[Layout], None]:
    def drop(layout: Layout) -> None:
        del layout.files[next(name for name, data in layout.files.items() if match in data)]

    return drop


def _shorten_layer(layout: Layout) -> None:
    name = next(name for name, data in layout.files.items() if data.startswith(b"extra"))
    layout.files[name] = layout.files[name][:-1]


def _break_manifest(layout: Layout) -> None:
    name = next(name for name, data in layout.files.items() if b'"layers"' in data)
    layout.files[name] = layout.files[name].replace(b'"schemaVersion"', b'"schemaversion"')


def _set(**change: Any) -> Callable[[Layout], None]:
    def change_index(layout: Layout) -> None:
        layout.index[1] |= change

    return change_index


def _replace_all(layout: Layout, **documents: bytes) -> None:
    layout.files |= documents


def _nested(layout: Layout) -> None:
    descriptor = layout.index[0]
    for _ in range(6):
        descriptor = layout.add(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode(), INDEX)
    layout.index[0] = descriptor


BROKEN: dict[str, tuple[Callable[[Layout], None], str]] = {
    "a layer with other bytes": (_break_layer, "has another digest"),
    "a layer that is shorter": (_shorten_layer, "bytes instead of"),
    "a layer that is missing": (_drop(b"extra layer"), "is missing"),
    "a configuration that is missing": (_drop(b'"architecture"'), "is missing"),
    "a manifest with other bytes": (_break_manifest, "has another digest"),
    "a manifest of another size": (_set(size=5), "bytes instead of 5"),
    "a manifest of negative size": (_set(size=-1), "is negative"),
    "a digest that is none": (_set(digest="sha256:../../../etc/passwd"), "not a digest in a descriptor"),
    "a digest of another kind": (_set(digest="sha512:" + "0" * 128), "only sha256 digests are kept"),
    "something that is no image": (_set(mediaType="application/pdf"), "not an image"),
    "indexes in indexes": (_nested, "nested more than 3 deep"),
    "another version": (
        lambda layout: layout.files.update({"oci-layout": b'{"imageLayoutVersion":"2.0.0"}'}),
        "image layout version '2.0.0' is not 1.0.0",
    ),
    "a layout file that is no JSON": (
        lambda layout: layout.files.update({"oci-layout": b"x"}),
        "oci-layout is malformed",
    ),
    "nothing in it": (lambda layout: layout.index.clear(), "the layout has no image"),
    "an index that is no JSON": (lambda layout: layout.files.update({"index.json": b"{"}), "the index is malformed"),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_layout_broken_is_refused_and_leaves_nothing(store: ImageStore, what: str) -> None:
    damage, text = BROKEN[what]
    layout = _two_images()
    damage(layout)
    with pytest.raises(MistifyError) as caught:
        _import(store, layout.pack())
    assert caught.value.message == "error importing image layout"
    assert text in chain(caught.value)
    assert files(store) == set()
    assert OciImages(store).list() == []


def test_layout_broken_takes_nothing_from_images_that_are_there(store: ImageStore) -> None:
    layout = _two_images()
    _import(store, layout.pack())
    before = files(store)
    layout.tag(layout.image(b"base layer" * 1000, b"third"), "v3")
    layout.files = {name: b"THIRD" if data == b"third" else data for name, data in layout.files.items()}
    with pytest.raises(MistifyError):
        _import(store, layout.pack())
    assert files(store) == before


def test_tag_moves_to_the_image_imported_last(store: ImageStore) -> None:
    one, two = Layout(), Layout()
    [first] = _import(store, one.tag(one.image(b"1"), "v1").pack())
    [second] = _import(store, two.tag(two.image(b"2"), "v1").pack())
    images = OciImages(store)
    assert images.resolve("app:v1").digest == second.key
    assert images.get(first.key).tags == ()


def test_removal_by_tag_keeps_what_others_need(store: ImageStore) -> None:
    first, second = _import(store, _two_images().pack())
    images = OciImages(store)
    images.delete("app:v2")
    assert [image.digest for image in images.list()] == [first.key]
    assert OciCheck(images, store).verify() == []
    with pytest.raises(NotFoundError, match="no image app:v2"):
        images.delete("app:v2")
    images.delete(first.key)
    assert files(store) == set()
    assert second.key != first.key


@pytest.mark.parametrize("reference", ["sha256:", "sha256:zz", "App:v1", "app:v9", "app:v 1"])
def test_resolve_of_what_is_not_there_is_refused(store: ImageStore, reference: str) -> None:
    _import(store, _two_images().pack())
    with pytest.raises((NotFoundError, InvalidArgumentError)):
        OciImages(store).resolve(reference)


def test_index_lost_brings_back_images_and_tags(tmp_path: Path) -> None:
    with ImageStore(tmp_path) as store:
        _import(store, _two_images().pack())
        before = [(image.digest, image.size_bytes, image.tags) for image in OciImages(store).list()]
        key = put(store, aci_image())
    with ImageStore.rebuild(tmp_path) as store:
        assert [(image.digest, image.size_bytes, image.tags) for image in OciImages(store).list()] == before
        assert OciCheck(OciImages(store), store).verify() == []
        assert store.has_full_key(key)


def test_verify_removes_damaged_images_and_stray_parts_and_mends_tags(store: ImageStore) -> None:
    _import(store, _two_images().pack())
    images = OciImages(store)
    check = OciCheck(images, store)
    extra = next(path for path in store.layout.oci_blobs.rglob("*") if path.is_file() and b"extra" in path.read_bytes())
    extra.write_bytes(b"EXTRA" + extra.read_bytes()[5:])
    (store.layout.oci_blobs / "00" / ("0" * 64)).write_bytes(b"stray")
    images.tag_files.delete(ImageReference("app", "v1"))
    assert len(check.verify()) == 3
    told = {(finding.problem.split()[-1], finding.repair) for finding in check.verify(repair=True)}
    assert told == {("damaged", "image removed"), ("image", "removed"), ("says", "written anew")}
    assert check.verify() == []
    assert [image.tags for image in images.list()] == [("app:v1",)]


def test_collect_takes_unused_images(store: ImageStore, clock: Clock) -> None:
    first, second = _import(store, _two_images().pack())
    clock.move(100)
    images = OciImages(store)
    images.export(images.get(first.key), io.BytesIO())
    check = OciCheck(images, store)
    assert [item.key for item in check.collect(grace_s=50, dry_run=True)] == [second.key]
    assert [item.key for item in check.collect(grace_s=50)] == [second.key]
    assert [image.digest for image in images.list()] == [first.key]


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({}, "app:latest"),
        ({"org.opencontainers.image.ref.name": "v1"}, "app:v1"),
        ({"org.opencontainers.image.ref.name": "docker.io/library/busybox:1.36"}, "docker.io/library/busybox:1.36"),
        ({"org.opencontainers.image.ref.name": "localhost:5000/x"}, "localhost:5000/x:latest"),
        ({"io.containerd.image.name": "docker.io/a:b", "org.opencontainers.image.ref.name": "b"}, "docker.io/a:b"),
        ({"org.opencontainers.image.ref.name": "what ever/it is"}, "app:latest"),
    ],
)
def test_name_comes_from_annotations(annotations: dict[str, str], name: str) -> None:
    assert str(name_of(annotations, "app")) == name


# -- real tools ------------------------------------------------------------------------------------------------------------


def _run(*command: object) -> bytes:
    done = subprocess.run([str(word) for word in command], capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, (command, done.stderr.decode())
    return done.stdout


@pytest.fixture(scope="session")
def tools(checkout: Path) -> None:
    """The programs themselves, installed if they are missing."""
    _run(checkout / "scripts" / "ensure-packages", "skopeo=skopeo", "umoci=umoci")


@pytest.fixture
def umoci_layout(tools: None, tmp_path: Path) -> Path:
    """Two images made by umoci, packed by tar."""
    layout, tree = tmp_path / "layout", tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_text("hello\n")
    _run("umoci", "init", "--layout", layout)
    _run("umoci", "new", "--image", f"{layout}:v1")
    _run("umoci", "insert", "--rootless", "--image", f"{layout}:v1", tree, "/data")
    _run("umoci", "tag", "--image", f"{layout}:v1", "v2")
    _run("umoci", "insert", "--rootless", "--image", f"{layout}:v2", tree, "/more")
    _run("tar", "-C", layout, "-cf", tmp_path / "layout.tar", ".")
    return layout


@pytest.mark.backend("apt")
def test_layout_of_umoci_imports_exports_and_is_equal_to_skopeo(umoci_layout: Path, store: ImageStore) -> None:
    archive = umoci_layout.with_name("layout.tar")
    imported = _import(store, archive.read_bytes(), "tool")
    assert [image.labels["tag"] for image in imported] == ["v1", "v2"]
    for image in imported:
        tag = image.labels["tag"]
        exported = umoci_layout.with_name(f"{tag}.tar")
        with exported.open("wb") as file:
            OciImages(store).export(OciImages(store).resolve(f"tool:{tag}"), file)
        ours = json.loads(_run("skopeo", "inspect", f"oci-archive:{exported}:{tag}"))
        assert ours == json.loads(_run("skopeo", "inspect", f"oci:{umoci_layout}:{tag}"))
        assert ours["Digest"] == image.key


@pytest.mark.backend("apt")
def test_archive_of_skopeo_imports_and_goes_back(umoci_layout: Path, store: ImageStore) -> None:
    archive = umoci_layout.with_name("skopeo.tar")
    _run("skopeo", "copy", f"oci:{umoci_layout}:v2", f"oci-archive:{archive}:docker.io/library/tool:v2")
    [image] = _import(store, archive.read_bytes())
    assert (image.name, image.labels) == ("docker.io/library/tool", {"tag": "v2"})
    exported = umoci_layout.with_name("again.tar")
    with exported.open("wb") as file:
        OciImages(store).export(OciImages(store).get(image.key), file)
    _run("skopeo", "copy", f"oci-archive:{exported}:v2", f"dir:{umoci_layout.with_name('dir')}")
    assert json.loads(_run("skopeo", "inspect", f"oci-archive:{exported}:v2"))["Digest"] == image.key
