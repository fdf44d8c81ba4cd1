"""Mirrors and publishing: nothing is promised that is not there, whatever breaks and whenever the process dies."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from image_service.catalog_mirror import Mirror, MirrorOptions, MirrorReport, check_target
from imaging.errors import AlreadyExistsError, BadDataError, InvalidArgumentError
from imaging.simplestreams.paths import IMAGE_DOWNLOADS
from imaging.simplestreams.publishing import Document, Publisher
from imaging.simplestreams.signing import Signer, Verifier, binary_keyring
from imaging.simplestreams.sources import FileSource, HttpSource
from imaging.simplestreams.transfer import HttpItems, items_of
from imaging.simplestreams.tree import Filter, TreeReader
from tests.simplestreams.catalogues import key
from tests.simplestreams.trees import (
    check_whole,
    content,
    default_products,
    index_of,
    put,
    served,
    write_tree,
)

JAMMY = "com.ubuntu.cloud:server:jammy:amd64"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    base = tmp_path / "source"
    return write_tree(base, default_products(base))


def mirror(tree: Path, target: Path, *, key_name: str = "", now: float | None = None, **options: Any) -> MirrorReport:
    filters = [Filter(text) for text in options.pop("filters", ())]
    source = FileSource(tree)
    more: dict[str, Any] = {} if now is None else {"now": lambda: now}
    signer = Signer(key(key_name).private) if key_name else None
    try:
        job = Mirror(
            TreeReader(source), items_of(source), target, MirrorOptions(filters, **options), signer=signer, **more
        )
        return job.run()
    finally:
        if signer:
            signer.close()


def test_mirror_brings_what_the_filters_accept_and_promises_no_more(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    report = mirror(tree, target, filters=["arch=amd64", "release~(jammy|noble)"], versions_max=2)
    assert (report.versions, report.files, report.brought, report.failed) == (4, 4, 4, [])
    products = check_whole(target)
    assert sorted(products) == [JAMMY, JAMMY.replace("jammy", "noble")]
    assert sorted(products[JAMMY]["versions"]) == ["20240201", "20240301"]
    assert products[JAMMY]["aliases"] == "jammy,j"
    again = mirror(tree, target, filters=["arch=amd64", "release~(jammy|noble)"], versions_max=2)
    assert (again.brought, again.published) == (0, False), "nothing changed"


def test_mirror_is_signed_by_its_own_key(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    mirror(tree, target, key_name="mirror")
    catalogue = TreeReader(FileSource(target), Verifier(key("mirror").public)).read()
    assert catalogue.info.signed
    assert len(list(catalogue.items())) == 18
    keyring = tmp_path / "keys.gpg"
    keyring.write_bytes(binary_keyring(key("mirror").public))
    for path in (target / "streams/v1").iterdir():
        arguments = [str(path), str(path.with_suffix(""))] if path.suffix == ".gpg" else [str(path)]
        if path.suffix != ".json":
            done = subprocess.run(
                ["gpgv", "--keyring", str(keyring), *arguments], check=False, timeout=60, capture_output=True
            )
            assert done.returncode == 0, (path, done.stderr)


def test_mirror_removes_what_left_after_a_while(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    mirror(tree, target, now=1000.0)
    products = default_products(tree)
    gone = products[JAMMY]["versions"].pop("20240101")["items"]["disk1.img"]["path"]
    write_tree(tree, products, updated="Thu, 02 May 2024 00:00:00 +0000")
    assert mirror(tree, target, now=2000.0).removed == 0
    assert "20240101" not in check_whole(target)[JAMMY]["versions"]
    assert (target / gone).exists(), "clients with the last catalogue may still ask for it"
    assert mirror(tree, target, now=2000.0 + 3599).removed == 0
    assert mirror(tree, target, now=2000.0 + 3600).removed == 1
    assert not (target / gone).exists()
    check_whole(target)


def test_mirror_resumes_where_a_broken_connection_left_it(tree: Path, tmp_path: Path) -> None:
    path = "server/jammy/20240301/amd64-disk1.img"
    with served(tree) as server:
        server.break_after[path] = 700
        job = Mirror(TreeReader(HttpSource(server.url)), HttpItems(server.url), tmp_path / "mirror")
        job._transfer._pause = lambda _: None
        assert job.run().failed == []
        assert [asked for name, asked in server.requests if name == path] == ["", "bytes=700-"]
    check_whole(tmp_path / "mirror")


def test_mirror_that_was_killed_resumes_from_its_partial_file(tree: Path, tmp_path: Path) -> None:
    path = "server/jammy/20240301/amd64-disk1.img"
    put(tmp_path / "mirror", f"{path}.part", content(path)[:500])
    put(tmp_path / "mirror", "server/noble/20240301/amd64-disk1.img.part", b"x" * 5000)
    with served(tree) as server:
        report = Mirror(TreeReader(HttpSource(server.url)), HttpItems(server.url), tmp_path / "mirror").run()
        assert (report.failed, report.received_bytes) == ([], 18 * 2000 - 500)
        assert (path, "bytes=500-") in server.requests
    check_whole(tmp_path / "mirror")


@pytest.mark.parametrize("how", ["changed", "cut", "longer", "gone"])
def test_mirror_leaves_out_a_version_it_could_not_bring_whole(tree: Path, tmp_path: Path, how: str) -> None:
    file = tree / "server/jammy/20240301/amd64-disk1.img"
    data = file.read_bytes()
    file.write_bytes({"changed": b"x" + data[1:], "cut": data[:-1], "longer": data + b"x", "gone": b""}[how])
    if how == "gone":
        file.unlink()
    target = tmp_path / "mirror"
    with served(tree) as server:
        job = Mirror(TreeReader(HttpSource(server.url)), HttpItems(server.url), target)
        job._transfer._pause = lambda _: None
        report = job.run()
        if how == "gone":
            indexes = [name for name, _ in server.requests if name.endswith("index.json")]
            assert len(indexes) == 2, "the catalogue was read once more"
    assert len(report.failed) == 1
    assert report.failed[0].startswith(f"{JAMMY} 20240301: ")
    assert sorted(check_whole(target)[JAMMY]["versions"]) == ["20240101", "20240201"]
    file.write_bytes(data)
    assert mirror(tree, target).failed == []
    assert len(check_whole(target)[JAMMY]["versions"]) == 3


def test_mirror_that_verifies_replaces_a_damaged_file(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    mirror(tree, target)
    damaged = target / "server/jammy/20240301/amd64-disk1.img"
    damaged.write_bytes(b"x" * 2000)
    assert mirror(tree, target).brought == 0
    assert mirror(tree, target, verify=True).brought == 1
    check_whole(target)


@pytest.mark.parametrize("path", ["streams/v1/index.json", "snapshots/1", ".retired.json"])
def test_mirror_lets_no_file_into_the_place_of_documents(tree: Path, tmp_path: Path, path: str) -> None:
    products = default_products(tree)
    products[JAMMY]["versions"]["20240301"]["items"]["disk1.img"]["path"] = path
    write_tree(tree, products)
    report = mirror(tree, tmp_path / "mirror")
    assert len(report.failed) == 1
    check_whole(tmp_path / "mirror")


def test_mirror_does_not_take_over_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(AlreadyExistsError):
        check_target(tmp_path)


# -- publishing ------------------------------------------------------------------------------------------------------------


def document(version: str, content_id: str = "images") -> Document:
    products = {"p": {"arch": "amd64", "versions": {version: {"items": {"i": {"ftype": "x", "size": 1}}}}}}
    return Document(content_id, IMAGE_DOWNLOADS, products)


def versions(directory: Path) -> list[str]:
    """The versions every form of the catalogue agrees on."""
    verifier = Verifier(key().public)
    readers = (TreeReader(FileSource(directory)), TreeReader(FileSource(directory), verifier))
    seen = [[item.version for item in reader.read().items()] for reader in readers]
    detached = directory / "streams/v1/index.json"
    verifier.verify_detached(detached.read_bytes(), detached.with_name("index.json.gpg").read_bytes())
    assert seen[0] == seen[1]
    return seen[0]


_KILLED = """
import os, sys
from pathlib import Path
from imaging.simplestreams.publishing import Document, Publisher
from imaging.simplestreams.signing import Signer
directory, key, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
left = [limit]
def step(word):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
products = {"p": {"arch": "amd64", "versions": {"new": {"items": {"i": {"ftype": "x", "size": 1}}}}}}
Publisher(directory, Signer.from_file(key), step=step).publish([Document("images", "image-downloads", products)])
os._exit(0)
"""


@pytest.mark.slow
def test_publisher_killed_between_any_two_writes_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """At each step in turn; afterwards the next publisher finishes the work and clears away what was left."""
    key_file = tmp_path / "key.asc"
    key_file.write_bytes(key().private)
    base = tmp_path / "base"
    with Signer(key().private) as signer:
        Publisher(base, signer).publish([document("old")])
        outcomes = []
        for limit in range(100):
            directory = tmp_path / f"at-{limit}"
            shutil.copytree(base, directory, symlinks=True)
            command = [sys.executable, "-c", _KILLED, str(directory), str(key_file), str(limit)]
            status = subprocess.run(command, check=False, timeout=120, cwd=Path(__file__).parents[2]).returncode
            outcomes.append(versions(directory))
            assert status in {0, 9}
            Publisher(directory, signer).publish([document("new")])
            assert versions(directory) == ["new"]
            assert len(list((directory / "snapshots").iterdir())) == 1
            assert not list(directory.glob(".tmp-*"))
            if status == 0:
                break
    assert outcomes[0] == ["old"]
    assert outcomes[-1] == ["new"]
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes, key=lambda one: one == ["new"]), "old until the switch, new from then on"


def test_publisher_keeps_the_last_products_for_a_while(tmp_path: Path) -> None:
    now = [1_000_000.0]
    publisher = Publisher(tmp_path, now=lambda: now[0])
    paths = []
    for version in ("a", "b", "c"):
        publisher.publish([document(version)])
        paths.append(tmp_path / index_of(tmp_path)["index"]["images"]["path"])
        now[0] += 1700
    assert [path.exists() for path in paths] == [True, True, True]
    now[0] += 1700
    publisher.publish([document("d")])
    assert [path.exists() for path in paths] == [False, True, True]


def test_publisher_says_when_nothing_changed(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    assert publisher.publish([document("a"), document("a", "other")])
    before = (tmp_path / "streams/v1/index.json").read_bytes()
    assert not publisher.publish([document("a"), document("a", "other")])
    assert (tmp_path / "streams/v1/index.json").read_bytes() == before
    with Signer(key().private) as signer:
        assert Publisher(tmp_path, signer).publish([document("a")])


def test_publisher_has_no_two_files_of_one_base_name(tmp_path: Path) -> None:
    Publisher(tmp_path).publish([document("a", "x:y"), document("a", "x-y")])
    paths = [entry["path"] for entry in index_of(tmp_path)["index"].values()]
    assert len({Path(path).name for path in paths}) == 2
    with pytest.raises(InvalidArgumentError):
        Publisher(tmp_path).publish([document("a"), document("b")])


def test_publisher_leaves_a_catalogue_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "streams/v1").mkdir(parents=True)
    (tmp_path / "streams/v1/index.json").write_text(json.dumps({"index": {}}))
    with pytest.raises(AlreadyExistsError):
        Publisher(tmp_path).publish([document("a")])
    (tmp_path / "streams/v1/index.json").write_text("{")
    with pytest.raises(BadDataError):
        Publisher(tmp_path).publish([document("a")])


def test_digest_of_the_tree_is_that_of_the_source(tree: Path, tmp_path: Path) -> None:
    mirror(tree, tmp_path / "first")
    mirror(tmp_path / "first", tmp_path / "second")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (base / "server").rglob("*.img")}
        for base in (tree, tmp_path / "first", tmp_path / "second")
    ]
    assert digests[0] == digests[1] == digests[2]
