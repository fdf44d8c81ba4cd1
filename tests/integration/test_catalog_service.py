"""The service's own catalogue, and importing into the service: over real sockets, with the real commands."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner, Result

from image_service.cli import cli
from imaging.sendstream.volume import StreamHeader, make_stream
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import FETCHING, call, download, sha256, upload
from tests.simplestreams.catalogues import key
from tests.simplestreams.trees import DATE, check_whole, content, default_products, items_of, served, write_tree

RAW = bytes(1 << 20) + random.Random(3).randbytes(100_000) + bytes((1 << 20) - 100_000)
SQUASHFS = b"hsqs" + random.Random(4).randbytes(100_000)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("service")
    (directory / "key.asc").write_bytes(key().private)
    flags: dict[str, Any] = {
        "catalog_key": directory / "key.asc",
        "catalog_region": "here",
        "catalog_endpoint": "https://h",
    }
    with start_image_service(directory / "state", **FETCHING, **flags) as daemon:
        yield daemon


def index_of(service: Daemon) -> Any:
    response = call(service, "GET", "/streams/v1/index.json")
    assert response.status_code == 200, response.text
    return response.json()


def products_of(service: Daemon, content_id: str = "images") -> dict[str, Any]:
    entry = index_of(service)["index"].get(content_id)
    if entry is None:
        return {}
    found: dict[str, Any] = call(service, "GET", f"/{entry['path']}").json()["products"]
    return found


def label(service: Daemon, image_id: str, **labels: Any) -> requests.Response:
    return call(service, "PUT", f"/catalog/images/{image_id}", json=labels)


def product_of(service: Daemon, image_id: str) -> Any:
    """The product an image without labels is in."""
    return next((p for p in products_of(service).values() if p["aliases"] == image_id), None)


# -- out -------------------------------------------------------------------------------------------------------------------


def test_catalogue_has_an_image_as_soon_as_it_is_complete_and_not_when_it_is_gone(service: Daemon) -> None:
    record = upload(service, SQUASHFS, image_type="container", **{"X-Image-Comment": "A small one"})
    product = product_of(service, record["id"])
    assert product["release_title"] == "A small one"
    [items] = [version["items"] for version in product["versions"].values()]
    assert items["squashfs"]["sha256"] == hashlib.sha256(SQUASHFS).hexdigest()
    files = {item["path"] for item in items.values()}
    for item in items.values():
        data = call(service, "GET", f"/{item['path']}").content
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item["size"], item["sha256"])
    description = call(service, "GET", f"/{items['incus.tar.xz']['path']}").content
    combined = hashlib.sha256(description + SQUASHFS).hexdigest()
    assert items["incus.tar.xz"]["combined_squashfs_sha256"] == combined
    assert items["lxd.tar.xz"]["combined_squashfs_sha256"] == combined
    assert call(service, "DELETE", f"/images/{record['id']}").status_code == 200
    assert product_of(service, record["id"]) is None
    for path in files:
        assert call(service, "GET", f"/{path}").status_code == 200, "clients with the last index may still ask"


def test_catalogue_is_signed_in_both_forms(service: Daemon) -> None:
    from imaging.simplestreams.signing import Verifier
    from imaging.simplestreams.sources import HttpSource
    from imaging.simplestreams.tree import TreeReader

    image_id = upload(service, RAW)["id"]
    verifier = Verifier(key().public)
    assert image_id in str([item.aliases for item in TreeReader(HttpSource(service.url), verifier).read().items()])
    plain = call(service, "GET", "/streams/v1/index.json")
    signature = call(service, "GET", "/streams/v1/index.json.gpg").content
    assert verifier.verify_detached(plain.content, signature).fingerprint
    assert plain.headers["Cache-Control"] == "no-cache"


def test_catalogue_answers_304_and_says_what_may_be_cached(service: Daemon) -> None:
    upload(service, RAW)
    index = call(service, "GET", "/streams/v1/index.json")
    again = call(service, "GET", "/streams/v1/index.json", headers={"If-None-Match": index.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    products = call(service, "GET", f"/{index.json()['index']['images']['path']}")
    assert "immutable" in products.headers["Cache-Control"]
    item = next(items_of(products.json()["products"]))
    part = call(service, "GET", f"/{item['path']}", headers={"Range": "bytes=1-3"})
    assert (part.status_code, len(part.content)) == (206, 3)
    assert "immutable" in part.headers["Cache-Control"]
    for answer in (index, products, part):
        assert parsedate_to_datetime(answer.headers["Last-Modified"]) <= datetime.now(UTC)
        assert answer.headers["ETag"]


@pytest.mark.parametrize(
    "path", ["/streams/v1/nope.json", "/streams/v1/..%2f..%2frecords.db", "/files/00/x", f"/files/{'0' * 64}/x"]
)
def test_catalogue_has_nothing_else(service: Daemon, path: str) -> None:
    assert call(service, "GET", path).status_code == 404


def test_labels_say_how_an_image_appears(service: Daemon) -> None:
    image_id = upload(service, gzip.compress(RAW))["id"]
    labels = {
        "os": "debian",
        "release": "trixie",
        "version": "13",
        "arch": "arm64",
        "variant": "cloud",
        "aliases": ["debian/13"],
    }
    assert label(service, image_id, **labels).status_code == 200
    assert call(service, "GET", f"/catalog/images/{image_id}").json()["aliases"] == ["debian/13"]
    product = products_of(service)["debian:trixie:arm64:cloud"]
    assert (product["aliases"], product["version"]) == ("debian/13", "13")
    ids = products_of(service, "com.ubuntu.cloud:custom")["com.ubuntu.cloud:server:13:arm64"]
    assert image_id in json.dumps(ids)
    assert label(service, image_id, published=False).status_code == 200
    assert "debian:trixie:arm64:cloud" not in products_of(service)


def test_ids_are_found_by_clients_that_deploy_by_id(service: Daemon) -> None:
    image_id = upload(service, RAW)["id"]
    label(service, image_id, version="14.04", arch="amd64")
    arguments = ["fetch", "--source", service.url, "--series", "trusty", "--arch", "amd64", "--json"]
    wire = json.loads(
        CliRunner().invoke(cli, ["catalog", *arguments, "--region", "here", "--endpoint", "https://h"]).stdout
    )
    assert image_id in [image["id"] for image in wire["images"]]


@pytest.mark.parametrize("labels", [{"os": "a:b"}, {"aliases": ["a,b"]}, {"aliases": [""]}, {"os": 5}, {"unknown": ""}])
def test_labels_that_would_break_the_catalogue_are_refused(service: Daemon, labels: Any) -> None:
    image_id = upload(service, RAW)["id"]
    assert label(service, image_id, **labels).status_code == 400
    assert label(service, "no-such-image").status_code == 404


def test_image_that_cannot_be_offered_says_why(service: Daemon) -> None:
    image_id = upload(service, b"neither tarball nor squashfs", image_type="container")["id"]
    [entry] = [one for one in call(service, "GET", "/catalog/images").json() if one["image_id"] == image_id]
    assert "must be a tarball" in entry["reason"]
    assert product_of(service, image_id) is None


def test_volume_stream_is_offered_as_it_is(service: Daemon, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(RAW)
    header = StreamHeader(toname="pool/disk@1", guid=1, creation_s=1, volblocksize_bytes=16384)
    with disk.open("rb") as file:
        stream = b"".join(make_stream(file.fileno(), len(RAW), header))
    for data in (stream, gzip.compress(stream)):
        image_id = upload(service, data)["id"]
        [version] = product_of(service, image_id)["versions"].values()
        assert list(version["items"]) == ["volume.zfs"]
        assert version["items"]["volume.zfs"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_catalogue_survives_a_restart_and_is_the_same_again(tmp_path: Path) -> None:
    with start_image_service(tmp_path / "state") as service:
        upload(service, RAW)
        before = call(service, "GET", "/streams/v1/index.json").content
        service.kill()
        service.start()
        assert call(service, "GET", "/streams/v1/index.json").content == before


# -- in --------------------------------------------------------------------------------------------------------------------


class Terminal:
    """``mistify-image catalog`` with a list of catalogues of its own."""

    def __init__(self, directory: Path) -> None:
        self.env = {"MISTIFY_CATALOGS_DIR": str(directory)}

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, ["catalog", *arguments], env=self.env)

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def error(self, *arguments: str) -> str:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 1, result.output
        text: str = json.loads(result.stdout)["error"]
        return text


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path / "catalogs")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    base = tmp_path / "source"
    return write_tree(base, default_products(base), signer="catalogue")


@pytest.fixture
def keyring(tmp_path: Path) -> str:
    (tmp_path / "keys.asc").write_bytes(key().public)
    return str(tmp_path / "keys.asc")


def test_catalog_is_added_listed_searched_and_removed(terminal: Terminal, tree: Path, keyring: str) -> None:
    terminal.json("add", "ubuntu", str(tree), "--keyring", keyring)
    assert terminal.json("list") == [{"name": "ubuntu", "url": str(tree), "signed": True}]
    found = terminal.json("search", "jammy", "AMD64")
    assert [one["version"] for one in found] == ["20240101", "20240201", "20240301"]
    assert (
        "ubuntu:com.ubuntu.cloud:server:noble:arm64:20240101\tdisk1.img\t2000" in terminal.run("search", "noble").stdout
    )
    assert "is named 'ubuntu' already" in terminal.error("add", "ubuntu", str(tree))
    assert terminal.run("remove", "ubuntu").exit_code == 0
    assert terminal.json("list") == []


def test_catalog_that_is_not_signed_by_its_keys_is_not_added(terminal: Terminal, tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.asc"
    other.write_bytes(key("stranger").public)
    assert "unknown entity" in terminal.error("add", "ubuntu", str(tree), "--keyring", str(other))
    assert terminal.json("list") == []


def test_catalog_that_was_rolled_back_is_refused(terminal: Terminal, tree: Path, keyring: str) -> None:
    terminal.json("add", "ubuntu", str(tree), "--keyring", keyring)
    write_tree(tree, default_products(tree), signer="catalogue", updated=DATE.replace("2024", "2023"))
    assert "was rolled back" in terminal.error("search", "jammy")


def test_import_by_alias_gives_the_catalogues_bytes(
    service: Daemon, terminal: Terminal, tree: Path, keyring: str
) -> None:
    wanted = content("server/jammy/20240301/amd64-disk1.img")
    with served(tree) as server:
        terminal.json("add", "ubuntu", server.url, "--keyring", keyring)
        record = terminal.json("import", "ubuntu:jammy", "--arch", "amd64", "--service", service.url)
        again = terminal.json("import", "ubuntu:jammy", "--arch", "amd64", "--service", service.url)
    assert (record["digest"], record["id"]) == (sha256(wanted), again["id"])
    assert download(service, record["id"]).content == wanted
    assert call(service, "GET", f"/catalog/images/{record['id']}").json()["release"] == "jammy"


def test_import_from_a_directory_is_an_upload(service: Daemon, terminal: Terminal, tree: Path) -> None:
    terminal.json("add", "local", str(tree))
    image = "local:com.ubuntu.cloud:server:focal:arm64:20240101"
    record = terminal.json("import", image, "--service", service.url)
    assert record["digest"] == sha256(content("server/focal/20240101/arm64-disk1.img"))


@pytest.mark.parametrize("path_type", ["http", "directory"])
def test_import_of_a_file_that_was_tampered_with_is_refused(
    service: Daemon, terminal: Terminal, tree: Path, path_type: str
) -> None:
    (tree / "server/noble/20240301/amd64-disk1.img").write_bytes(b"x" * 2000)
    with served(tree) as server:
        terminal.json("add", "ubuntu", server.url if path_type == "http" else str(tree))
        error = terminal.error("import", "ubuntu:noble", "--arch", "amd64", "--service", service.url)
    assert "digest" in error or "sha256" in error


@pytest.mark.parametrize(
    ("image", "says"),
    [("ubuntu", "not an image of a catalogue"), ("none:x", "no catalogue"), ("ubuntu:x", "no product")],
)
def test_import_of_what_is_not_there_says_what_is_missing(
    terminal: Terminal, tree: Path, image: str, says: str
) -> None:
    terminal.json("add", "ubuntu", str(tree))
    assert says in terminal.error("import", image)


def test_own_catalogue_imported_by_the_own_importer_gives_the_same_digests(
    service: Daemon, terminal: Terminal, tmp_path: Path, keyring: str
) -> None:
    vm, container = upload(service, RAW)["id"], upload(service, SQUASHFS, image_type="container")["id"]
    terminal.json("add", "own", service.url, "--keyring", keyring)
    with start_image_service(tmp_path / "state", **FETCHING) as second:
        first = terminal.json("import", f"own:{container}", "--type", "container", "--service", second.url)
        assert first["digest"] == sha256(SQUASHFS)
        disk = terminal.json("import", f"own:{vm}", "--service", second.url)
        theirs, ours = (product_of(one, vm)["versions"].popitem()[1]["items"] for one in (second, service))
        assert theirs["disk-kvm.img"] == ours["disk-kvm.img"]
        assert disk["digest"] == f"sha256:{ours['disk-kvm.img']['sha256']}"


def test_mirror_of_the_own_catalogue_is_whole(
    service: Daemon, terminal: Terminal, tmp_path: Path, keyring: str
) -> None:
    upload(service, RAW)
    terminal.json("add", "own", service.url, "--keyring", keyring)
    report = terminal.json("mirror", "own", str(tmp_path / "mirror"), "--filter", "ftype!=nothing", "--max", "2")
    assert (report["failed"], report["signed"], report["published"]) == ([], True, True)
    assert len(check_whole(tmp_path / "mirror")) == len(products_of(service))


def test_mirror_that_could_not_bring_everything_exits_with_1(terminal: Terminal, tree: Path, tmp_path: Path) -> None:
    (tree / "server/noble/20240301/amd64-disk1.img").write_bytes(b"x" * 2000)
    terminal.json("add", "ubuntu", str(tree))
    result = terminal.run("mirror", "ubuntu", str(tmp_path / "mirror"), "--filter", "arch=amd64")
    assert result.exit_code == 1
    assert "failed: com.ubuntu.cloud:server:noble:amd64 20240301: " in result.stderr
    assert terminal.error("mirror", "ubuntu", str(tmp_path / "mirror"), "--filter", "arch").startswith("not a filter")
