"""Trees as the public servers publish them are read, imported from and mirrored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from image_service.catalog_mirror import Mirror, MirrorOptions
from image_service.catalog_registry import find_image
from image_service.cli import cli
from image_service.lifecycle import ImageType
from imaging.errors import NotFoundError
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.reader import Lookup, fetch
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import FileSource
from imaging.simplestreams.transfer import items_of
from imaging.simplestreams.tree import Filter, StreamItem, TreeReader
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import FETCHING, call, download, sha256
from tests.simplestreams.catalogues import key
from tests.simplestreams.public import ENDPOINT, juju_tree, linuxcontainers_tree, ubuntu_tree
from tests.simplestreams.trees import check_whole, served

NEWEST = "server/releases/jammy/release-20240308.1/ubuntu-22.04-server-cloudimg-amd64"


@pytest.fixture
def ubuntu(tmp_path: Path) -> Path:
    return ubuntu_tree(tmp_path / "ubuntu", signer="catalogue")


@pytest.fixture
def containers(tmp_path: Path) -> Path:
    return linuxcontainers_tree(tmp_path / "linuxcontainers")


def found(base: Path, text: str, kind: ImageType = ImageType.KVM, **trust: Any) -> StreamItem:
    return find_image(TreeReader(FileSource(base), **trust).read(), text, kind, "amd64")


# -- reading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "suffix"),
    [
        ("jammy", ImageType.KVM, "disk-kvm.img"),
        ("22.04", ImageType.KVM, "disk-kvm.img"),
        ("com.ubuntu.cloud:server:22.04:amd64", ImageType.CONTAINER, "squashfs"),
        ("noble/amd64", ImageType.CONTAINER, "squashfs"),
    ],
)
def test_ubuntus_tree_gives_disks_and_root_file_systems(ubuntu: Path, name: str, kind: ImageType, suffix: str) -> None:
    newest = NEWEST.replace("jammy", "noble").replace("22.04", "24.04") if "noble" in name else NEWEST
    item = found(ubuntu, name, kind, verifier=Verifier(key().public))
    assert item.path == f"{newest}.{suffix}"
    assert (item.attributes["label"], item.attributes["supported"]) == ("release", "True")


def test_ubuntus_older_version_has_only_the_qcow2_disk(ubuntu: Path) -> None:
    item = found(ubuntu, "jammy:20240301")
    assert (item.ftype, item.path) == ("disk1.img", f"{NEWEST}.disk1.img".replace("20240308.1", "20240301"))


def test_ubuntus_ids_are_found_beside_its_downloads(ubuntu: Path) -> None:
    wanted = ImageConstraint("us-east-1", ENDPOINT, ["jammy"], ["amd64"])
    images, info = fetch([FileSource(ubuntu)], wanted, Lookup(verifier=Verifier(key().public), only_signed=True))
    assert [image.id for image in images] == ["ami-jammy-01-use1-hvm", "ami-jammy-01-use1-pv"]
    assert info is not None
    assert info.signed


@pytest.mark.parametrize("compat", [False, True])
def test_jujus_tree_gives_the_newest_ids_of_a_region_by_its_short_name(tmp_path: Path, *, compat: bool) -> None:
    base = juju_tree(tmp_path, signer="catalogue")
    wanted = ImageConstraint("eu-west-1", ENDPOINT + "/eu", ["jammy", "noble"] if not compat else ["trusty"], ["amd64"])
    images, _ = fetch([FileSource(base)], wanted, Lookup(verifier=Verifier(key().public), compat=compat))
    if compat:
        assert images == [], "the original knows no release by the name of jammy"
        return
    assert [image.id for image in images] == [
        f"ami-{release}-01-euw1-{virt}" for release in ("jammy", "noble") for virt in ("hvm", "pv")
    ]
    assert {(one.region_name, one.endpoint, one.region_alias) for one in images} == {
        ("eu-west-1", ENDPOINT + "/eu", "euw1")
    }
    assert "ami-jammy-01-use1-hvm" in {item.attributes["id"] for item in TreeReader(FileSource(base)).read().items()}


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [
        ("alpine/3.20", ImageType.CONTAINER, "images/alpine/3.20/amd64/default/20240309_13:01/root.squashfs"),
        ("alpine/3.20", ImageType.KVM, "images/alpine/3.20/amd64/default/20240309_13:01/disk.qcow2"),
        (
            "alpine:3.20:amd64:default:20240307_13:00",
            ImageType.CONTAINER,
            "images/alpine/3.20/amd64/default/20240307_13:00/root.squashfs",
        ),
        (
            "voidlinux",
            ImageType.CONTAINER,
            "images/void/current/amd64/default/20240309_17:10/incus_combined.tar.gz",
        ),
    ],
)
def test_linuxcontainers_tree_gives_split_and_unified_images(
    containers: Path, name: str, kind: ImageType, file: str
) -> None:
    assert found(containers, name, kind).path == file


def test_unified_tarball_of_a_virtual_machine_is_not_taken_for_a_container(containers: Path) -> None:
    with pytest.raises(NotFoundError, match="has no file for type kvm"):
        found(containers, "voidlinux", ImageType.KVM)
    file = containers / "streams/v1/images.json"
    document = json.loads(file.read_text())
    [version] = document["products"]["void:current:amd64:default"]["versions"].values()
    version["items"] = {"vm": version["items"]["vm"]}
    file.write_text(json.dumps(document))
    with pytest.raises(NotFoundError, match="has no file for type container"):
        found(containers, "voidlinux", ImageType.CONTAINER)


# -- mirroring -------------------------------------------------------------------------------------------------------------


def _mirror(base: Path, target: Path, *filters: str, versions_max: int | None = None) -> dict[str, Any]:
    source = FileSource(base)
    options = MirrorOptions([Filter(text) for text in filters], versions_max=versions_max)
    assert Mirror(TreeReader(source), items_of(source), target, options).run().failed == []
    return check_whole(target)


def test_mirror_of_linuxcontainers_keeps_deltas_whose_base_it_has(containers: Path, tmp_path: Path) -> None:
    product = _mirror(containers, tmp_path / "mirror", "arch=amd64", versions_max=2)["alpine:3.20:amd64:default"]
    bases = {
        name: [item["delta_base"] for item in version["items"].values() if "delta_base" in item]
        for name, version in product["versions"].items()
    }
    assert bases == {"20240308_13:00": [], "20240309_13:01": ["20240308_13:00"]}
    assert product["requirements"] == {"secureboot": "false"}


def test_mirror_of_ubuntu_brings_its_downloads_only(ubuntu: Path, tmp_path: Path) -> None:
    products = _mirror(ubuntu, tmp_path / "mirror", "release=jammy", "arch=amd64", "ftype~(disk|squashfs|lxd)")
    [product] = products.values()
    assert sorted(product["versions"]["20240308.1"]["items"]) == [
        "disk-kvm.img",
        "disk1.img",
        "lxd.tar.xz",
        "squashfs",
    ]
    assert product["release_codename"] == "Jammy Something"


# -- importing -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_image_service(tmp_path_factory.mktemp("service"), **FETCHING) as daemon:
        yield daemon


def _run(directory: Path, *arguments: str) -> Any:
    env = {"MISTIFY_CATALOGS_DIR": str(directory)}
    result = CliRunner().invoke(cli, ["catalog", *arguments, "--json"], env=env)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_import_from_ubuntu_and_linuxcontainers_by_name(
    service: Daemon, ubuntu: Path, containers: Path, tmp_path: Path
) -> None:
    catalogs, keyring = tmp_path / "catalogs", tmp_path / "keys.asc"
    keyring.write_bytes(key().public)
    record: dict[str, Any] = {}
    with served(ubuntu) as first, served(containers) as second:
        _run(catalogs, "add", "ubuntu", first.url, "--keyring", str(keyring))
        _run(catalogs, "add", "lxc", second.url)
        assert len(_run(catalogs, "search", "alpine", "squashfs.vcdiff", "amd64")) == 2
        wanted = {
            ("ubuntu:jammy", "kvm"): ubuntu / f"{NEWEST}.disk-kvm.img",
            ("ubuntu:22.04", "container"): ubuntu / f"{NEWEST}.squashfs",
            ("lxc:alpine/3.20", "kvm"): containers / "images/alpine/3.20/amd64/default/20240309_13:01/disk.qcow2",
            ("lxc:voidlinux", "container"): containers
            / "images/void/current/amd64/default/20240309_17:10/incus_combined.tar.gz",
        }
        for (name, kind), file in wanted.items():
            arguments = ["import", name, "--type", kind, "--arch", "amd64", "--service", service.url]
            record = _run(catalogs, *arguments)
            assert record["digest"] == sha256(file.read_bytes()), name
            assert download(service, record["id"]).content == file.read_bytes(), name
    labels = call(service, "GET", f"/catalog/images/{record['id']}").json()
    assert (labels["os"], labels["aliases"]) == ("Voidlinux", ["voidlinux", "voidlinux/current"])
    [entry] = [one for one in call(service, "GET", "/catalog/images").json() if one["image_id"] == record["id"]]
    assert sorted(entry["items"]) == ["incus_combined.tar.gz", "lxd_combined.tar.gz"]
    assert {item["sha256"] for item in entry["items"].values()} == {record["digest"].removeprefix("sha256:")}
