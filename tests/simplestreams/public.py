"""Trees in the shapes of the public servers: Ubuntu's cloud images, linuxcontainers.org, and the image ids Juju's clients read."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from imaging.simplestreams.signing import Signer
from tests.simplestreams.catalogues import key
from tests.simplestreams.trees import content, put

DATE = "Sat, 09 Mar 2024 12:01:58 +0000"


def write_documents(base: Path, documents: dict[str, Any], *, signer: str = "") -> Path:
    """Documents by their name in ``streams/v1``, with signed twins if ``signer`` names a key."""
    streams = base / "streams" / "v1"
    for name, value in documents.items():
        file = streams / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(value, indent=1).encode()
        file.write_bytes(data)
        if signer:
            with Signer(key(signer).private) as gpg:
                file.with_suffix(".json.gpg").write_bytes(gpg.detach_sign(data))
                twin = json.dumps(_signed_paths(value), indent=1).encode()
                file.with_suffix(".sjson").write_bytes(gpg.clearsign(twin))
    return base


def _signed_paths(value: dict[str, Any]) -> dict[str, Any]:
    if "index" not in value:
        return value
    entries = {
        name: entry | {"path": entry["path"].replace(".json", ".sjson")} for name, entry in value["index"].items()
    }
    return value | {"index": entries}


def index(**entries: dict[str, Any]) -> dict[str, Any]:
    """An index; names have ``__`` for a colon."""
    named = {name.replace("__", ":"): entry | {"updated": DATE} for name, entry in entries.items()}
    return {"format": "index:1.0", "updated": DATE, "index": named}


def products_entry(path: str, datatype: str, products: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What an index says of a products file."""
    return {
        "format": "products:1.0",
        "datatype": datatype,
        "path": f"streams/v1/{path}.json",
        "products": sorted(products),
    } | more


def document(content_id: str, datatype: str, products: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A products file."""
    head = {"format": "products:1.0", "content_id": content_id, "datatype": datatype, "updated": DATE}
    return head | more | {"products": products}


# -- Ubuntu ----------------------------------------------------------------------------------------------------------------


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _ubuntu_item(base: Path, path: str, ftype: str) -> dict[str, Any]:
    data = content(path)
    return put(base, path, data) | {"ftype": ftype, "md5": _md5(data)}


def _ubuntu_product(base: Path, release: str, version: str, arch: str) -> dict[str, Any]:
    versions: dict[str, Any] = {}
    for serial in ("20240301", "20240308.1"):
        stem = f"server/releases/{release}/release-{serial}/ubuntu-{version}-server-cloudimg-{arch}"
        files = {
            "disk1.img": "disk1.img",
            "disk-kvm.img": "disk-kvm.img",
            "lxd.tar.xz": "lxd.tar.xz",
            "squashfs": "squashfs",
            "root.tar.xz": "root.tar.xz",
            "tar.gz": "tar.gz",
            "manifest": "manifest",
            "ovf": "ova",
        }
        if serial == "20240301":
            del files["disk-kvm.img"]
        items = {name: _ubuntu_item(base, f"{stem}.{suffix}", name) for name, suffix in files.items()}
        lxd = (base / items["lxd.tar.xz"]["path"]).read_bytes()
        root = (base / items["squashfs"]["path"]).read_bytes()
        items["lxd.tar.xz"]["combined_squashfs_sha256"] = hashlib.sha256(lxd + root).hexdigest()
        versions[serial] = {"label": "release", "pubname": f"ubuntu-{release}-{version}-{arch}-server-{serial}"}
        versions[serial] |= {"items": items}
    return {
        "aliases": f"{version},{release[0]},{release},default,lts",
        "arch": arch,
        "os": "ubuntu",
        "release": release,
        "release_codename": f"{release.title()} Something",
        "release_title": f"{version} LTS",
        "support_eol": "2027-04-21",
        "supported": True,
        "version": version,
        "versions": versions,
    }


def ubuntu_tree(base: Path, *, signer: str = "") -> Path:
    """Released images to download, and image ids of a cloud, in two products files."""
    products = {
        f"com.ubuntu.cloud:server:{version}:{arch}": _ubuntu_product(base, release, version, arch)
        for release, version in (("jammy", "22.04"), ("noble", "24.04"))
        for arch in ("amd64", "arm64")
    }
    ids = juju_products()
    download = "com.ubuntu.cloud:released:download"
    license_ = "http://www.canonical.com/intellectual-property-policy"
    return write_documents(
        base,
        {
            download: document(download, "image-downloads", products, license=license_),
            "com.ubuntu.cloud:released:aws": juju_document(ids),
            "index": index(
                com__ubuntu__cloud=products_entry(download, "image-downloads", products),
                aws=products_entry("com.ubuntu.cloud:released:aws", "image-ids", ids, clouds=CLOUDS, cloudname="aws"),
                tools=products_entry("com.ubuntu.juju:released:tools", "content-download", {"com.ubuntu.juju:x": {}}),
            ),
        },
        signer=signer,
    )


# -- image ids, as Juju's clients read them --------------------------------------------------------------------------------

ENDPOINT = "https://ec2.us-east-1.amazonaws.com"
CLOUDS = [{"region": "us-east-1", "endpoint": ENDPOINT}, {"region": "eu-west-1", "endpoint": ENDPOINT + "/eu"}]


def juju_products() -> dict[str, Any]:
    """Two releases in two regions; regions by a short name whose meaning is in the document's table."""
    products: dict[str, Any] = {}
    for version, release in (("22.04", "jammy"), ("24.04", "noble")):
        versions = {
            serial: {
                "items": {
                    f"{region}-{virt}": {
                        "crsn": region,
                        "id": f"ami-{release}-{serial[-2:]}-{region}-{virt}",
                        "virt": virt,
                    }
                    | {"root_store": "ssd"}
                    for region in ("use1", "euw1")
                    for virt in ("hvm", "pv")
                }
            }
            for serial in ("20240201", "20240301")
        }
        product = {"release": release, "version": version, "arch": "amd64", "versions": versions}
        products[f"com.ubuntu.cloud:server:{version}:amd64"] = product
    return products


def juju_document(products: dict[str, Any]) -> dict[str, Any]:
    """With a complete table of its aliases."""
    regions = {
        "use1": {"region": "us-east-1", "endpoint": ENDPOINT},
        "euw1": {"region": "eu-west-1", "endpoint": ENDPOINT + "/eu"},
    }
    return document("com.ubuntu.cloud:released:aws", "image-ids", products, _aliases={"crsn": regions})


def juju_tree(base: Path, *, signer: str = "") -> Path:
    """Only image ids."""
    products = juju_products()
    entry = products_entry("aws", "image-ids", products, clouds=CLOUDS)
    return write_documents(base, {"aws": juju_document(products), "index": index(aws=entry)}, signer=signer)


# -- linuxcontainers.org ---------------------------------------------------------------------------------------------------


def unified_tarball(text: bytes = b"unified", mode: str = "w:gz") -> bytes:
    """``metadata.yaml`` beside ``rootfs/``."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]  # the mode is a text
        for name, data in (("metadata.yaml", b'{"architecture": "x86_64"}'), ("rootfs/etc/motd", text)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _container_items(base: Path, folder: str, *, previous: str) -> dict[str, Any]:
    names = {
        "incus.tar.xz": "incus.tar.xz",
        "lxd.tar.xz": "lxd.tar.xz",
        "root.squashfs": "squashfs",
        "root.tar.xz": "root.tar.xz",
        "disk.qcow2": "disk-kvm.img",
    }
    items = {
        name: put(base, f"{folder}/{name}", content(f"{folder}/{name}")) | {"ftype": ft} for name, ft in names.items()
    }
    if previous:
        path = f"{folder}/delta-{previous.replace(':', '-')}.vcdiff"
        items["delta.vcdiff"] = put(base, path, content(path, 300)) | {
            "ftype": "squashfs.vcdiff",
            "delta_base": previous,
        }
    for meta in ("incus.tar.xz", "lxd.tar.xz"):
        head = (base / items[meta]["path"]).read_bytes()
        for name, attribute in (
            ("root.squashfs", "combined_squashfs_sha256"),
            ("root.tar.xz", "combined_rootxz_sha256"),
            ("disk.qcow2", "combined_disk-kvm-img_sha256"),
        ):
            root = (base / items[name]["path"]).read_bytes()
            items[meta][attribute] = hashlib.sha256(head + root).hexdigest()
    return items


def linuxcontainers_tree(base: Path) -> Path:
    """Split images with deltas, and one distribution that only has unified tarballs, one of them a virtual machine's."""
    products: dict[str, Any] = {}
    serials = ["20240307_13:00", "20240308_13:00", "20240309_13:01"]
    for arch in ("amd64", "arm64"):
        versions = {}
        for previous, serial in zip(["", *serials], serials, strict=False):
            folder = f"images/alpine/3.20/{arch}/default/{serial}"
            versions[serial] = {"items": _container_items(base, folder, previous=previous)}
        products[f"alpine:3.20:{arch}:default"] = {
            "aliases": "alpine/3.20/default,alpine/3.20",
            "arch": arch,
            "os": "Alpine",
            "release": "3.20",
            "release_title": "3.20",
            "variant": "default",
            "requirements": {"secureboot": "false"},
            "versions": versions,
        }
    folder = "images/void/current/amd64/default/20240309_17:10"
    both = put(base, f"{folder}/incus_combined.tar.gz", unified_tarball())
    machine = put(base, f"{folder}/vm_combined.tar.gz", unified_tarball(b"a disk"))
    items = {
        "incus_combined.tar.gz": both | {"ftype": "incus_combined.tar.gz"},
        "lxd_combined.tar.gz": both | {"ftype": "lxd_combined.tar.gz"},
        "vm": machine | {"ftype": "incus_combined.tar.gz", "combined_type": "virtual-machine"},
    }
    products["void:current:amd64:default"] = {
        "aliases": "voidlinux,voidlinux/current",
        "arch": "amd64",
        "os": "Voidlinux",
        "release": "current",
        "release_title": "current",
        "variant": "default",
        "versions": {"20240309_17:10": {"items": items}},
    }
    entry = products_entry("images", "image-downloads", products)
    return write_documents(
        base, {"images": document("images", "image-downloads", products), "index": index(images=entry)}
    )
