"""Incus and LXD's own clients use the service as they use the public image servers."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from image_service.catalog_mirror import Mirror, MirrorOptions
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import HttpSource
from imaging.simplestreams.transfer import items_of
from imaging.simplestreams.tree import Filter, TreeReader
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import call, upload
from tests.simplestreams.catalogues import key
from tests.simplestreams.clients import Client
from tests.simplestreams.public import unified_tarball
from tests.simplestreams.tls import Front, tls_front
from tests.simplestreams.trees import served

RANDOM = random.Random(6)
pytestmark = [pytest.mark.backend("apt"), pytest.mark.slow]


def _rootfs() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        content = RANDOM.randbytes(200_000)
        member = tarfile.TarInfo("etc/os-release")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


UNIFIED = unified_tarball(RANDOM.randbytes(100_000))
SQUASHFS = b"hsqs" + RANDOM.randbytes(300_000)
RAW = bytes(1 << 20) + RANDOM.randbytes(200_000) + bytes((1 << 20) - 200_000)


class Site(NamedTuple):
    service: Daemon
    front: Front
    ids: dict[str, str]


def _label(service: Daemon, image_id: str, **labels: Any) -> None:
    response = call(service, "PUT", f"/catalog/images/{image_id}", json=labels)
    assert response.status_code == 200, response.text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    (directory / "key.asc").write_bytes(key().private)
    flags: dict[str, Any] = {
        "catalog_key": directory / "key.asc",
        "catalog_region": "here",
        "catalog_endpoint": "https://here.example.org",
    }
    with start_image_service(directory / "state", **flags) as service, tls_front(service.port, directory) as front:
        ids = {
            "tarball": upload(service, _rootfs(), image_type="container")["id"],
            "squashfs": upload(service, SQUASHFS, image_type="container")["id"],
            "unified": upload(service, UNIFIED, image_type="container")["id"],
            "vm": upload(service, RAW)["id"],
            "vm-gz": upload(service, gzip.compress(RAW + bytes(1 << 20)))["id"],
        }
        _label(
            service, ids["squashfs"], os="debian", release="bookworm", version="12", aliases=["debian/12", "bookworm"]
        )
        _label(service, ids["unified"], os="void", release="current", aliases=["void/current"])
        _label(
            service, ids["vm"], os="debian", release="bookworm", variant="cloud", version="12", aliases=["debian/12"]
        )
        yield Site(service, front, ids)


@pytest.fixture(params=["incus", "lxc"])
def client(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> Client:
    return Client(request.param, site.front.url, site.front.certificate, tmp_path / "home")


def _document(site: Site, path: str) -> Any:
    response = call(site.service, "GET", path)
    assert response.status_code == 200, response.text
    return response.json()


def _expected(site: Site) -> dict[str, str]:
    """Fingerprints by image id, as the published documents have them."""
    index = _document(site, "/streams/v1/index.json")
    products = _document(site, f"/{index['index']['images']['path']}")["products"]
    found = {}
    for product in products.values():
        for version in product["versions"].values():
            items = version["items"]
            meta = items.get("incus.tar.xz", {})
            combined = [value for key, value in sorted(meta.items()) if key.startswith("combined")]
            found[product["aliases"].split(",")[0]] = (combined or [items["incus_combined.tar.gz"]["sha256"]])[0]
    return found


def test_client_lists_every_image(site: Site, client: Client) -> None:
    images = client.images()
    fingerprints = {image["fingerprint"] for image in images}
    index = _document(site, "/streams/v1/index.json")
    products = _document(site, f"/{index['index']['images']['path']}")["products"]
    assert len(images) == len(products) == 5
    assert set(_expected(site).values()) <= fingerprints
    assert sorted(image["type"] for image in images) == ["container"] * 3 + ["virtual-machine"] * 2


def test_client_shows_an_image_by_alias(site: Site, client: Client) -> None:
    shown = client.run("image", "info", "x:bookworm").stdout
    assert "os: debian" in shown
    aliases = client.run("image", "alias", "list", "x:", "--format", "csv").stdout
    assert aliases.count("debian/12,") == 2, "once as container, once as virtual machine"


@pytest.mark.parametrize("kind", ["container", "vm"])
def test_client_exports_files_whose_digests_are_ours(site: Site, client: Client, kind: str) -> None:
    flags = ["--vm"] if kind == "vm" else []
    client.run("image", "export", "x:debian/12", str(client.home), *flags)
    files = [path for path in client.home.iterdir() if path.is_file()]
    digests = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}
    assert len(files) == 2, files
    for digest, path in digests.items():
        headers = requests.head(f"{site.service.url}/files/{digest}/x", timeout=60).headers
        assert headers["Content-Length"] == str(path.stat().st_size)
    if kind == "container":
        assert hashlib.sha256(SQUASHFS).hexdigest() in digests
    else:
        root = next(path for path in files if path.read_bytes().startswith(b"QFI\xfb"))
        assert root.stat().st_size < len(RAW), "zeros take no room"
        _check_qcow2(root)


def test_client_exports_a_unified_tarball_as_it_came(site: Site, client: Client) -> None:
    client.run("image", "export", "x:void/current", str(client.home))
    [file] = [path for path in client.home.iterdir() if path.is_file()]
    assert file.read_bytes() == UNIFIED


def _check_qcow2(path: Path) -> None:
    from imaging.digests import Digest
    from imaging.diskimage.probe import content_digest, open_disk

    with path.open("rb") as file:
        assert content_digest(open_disk(file.fileno())) == Digest.of(RAW)


def test_client_notices_a_file_that_was_tampered_with(site: Site, client: Client, tmp_path: Path) -> None:
    squashfs = hashlib.sha256(SQUASHFS).hexdigest()
    [stored] = [path for path in (site.service.log_path.parent).rglob(squashfs) if path.is_file()] or [None]  # type: ignore[list-item]
    assert stored is not None, "the blob's file"
    good, mode = stored.read_bytes(), stored.stat().st_mode
    stored.chmod(0o644)
    try:
        with stored.open("r+b") as file:
            os.pwrite(file.fileno(), b"tampered", 1000)
        done = client.run("image", "export", "x:bookworm", str(tmp_path), check=False)
        assert done.returncode != 0
        assert "mismatch" in done.stderr.lower()
    finally:
        stored.write_bytes(good)
        stored.chmod(mode)


def test_client_uses_a_mirror_served_by_any_web_server(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    verifier = Verifier(key().public)
    source = HttpSource(site.service.url)
    options = MirrorOptions(filters=[Filter("release=bookworm")])
    report = Mirror(TreeReader(source, verifier), items_of(source), target, options).run()
    assert (report.failed, report.signed) == ([], True)
    with served(target) as server, tls_front(server.server_address[1], tmp_path) as front:
        client = Client("incus", front.url, front.certificate, tmp_path / "home")
        assert len(client.images()) == 2
        client.run("image", "export", "x:bookworm", str(client.home))
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in client.home.iterdir() if path.is_file()}
    assert hashlib.sha256(SQUASHFS).hexdigest() in digests
