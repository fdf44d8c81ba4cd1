"""Catalogues of downloads: inheritance, filters, what to add and remove, trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from image_service.catalog_registry import find_image, parse_wanted
from image_service.lifecycle import ImageType
from imaging.errors import BadDataError, InvalidArgumentError, NotFoundError
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import FileSource
from imaging.simplestreams.tree import Filter, ProductsDocument, TreeReader, resolve_work, with_names
from tests.simplestreams.catalogues import key
from tests.simplestreams.public import document, index, products_entry, write_documents
from tests.simplestreams.trees import default_products, product, write_tree


def item_of(**attributes: Any) -> Any:
    data = {
        "license": "free",
        "products": {"p": {"arch": "amd64", "versions": {"1": {"label": "x", "items": {"i": attributes}}}}},
    }
    [item] = ProductsDocument("c", "image-downloads", data).items()
    return item


def test_attributes_are_inherited_as_text_and_the_lower_level_wins() -> None:
    item = item_of(size=5, label="y", supported=True, requirements={"a": "b"})
    assert item.attributes == {"license": "free", "arch": "amd64", "label": "y", "size": "5", "supported": "True"}
    assert with_names(item)["product_name"] == "p"


@pytest.mark.parametrize(
    "junk", [{}, {"products": 5}, {"products": {"p": 5}}, {"products": {"p": {"versions": {"1": None}}}}]
)
def test_document_with_junk_has_no_items(junk: dict[str, Any]) -> None:
    assert list(ProductsDocument("c", "image-downloads", junk).items()) == []


@pytest.mark.parametrize("attributes", [{}, {"size": "x", "sha256": "y"}, {"size": -1, "sha256": "0" * 63}])
def test_item_without_size_or_digest_is_refused(attributes: dict[str, Any]) -> None:
    item = item_of(**attributes)
    with pytest.raises(BadDataError, match="gives no size"):
        _ = item.size_bytes
    with pytest.raises(BadDataError, match=r"no digest|bad sha256"):
        _ = item.digest


def test_item_has_the_strongest_digest_and_stays_in_its_tree() -> None:
    item = item_of(md5="0" * 32, sha256="A" * 64, path="../x")
    assert str(item.digest) == f"sha256:{'a' * 64}"
    with pytest.raises(BadDataError, match="leaves its tree"):
        _ = item.path


@pytest.mark.parametrize(
    ("text", "accepts"),
    [
        ("arch=amd64", True),
        ("arch = amd64", True),
        ("arch!=amd64", False),
        ("release~(jammy|noble)", True),
        ("release~^amm", False),
        ("release!~amm", False),
        ("missing=", True),
        ("missing!=", False),
    ],
)
def test_filter_accepts(text: str, *, accepts: bool) -> None:
    assert Filter(text).accepts({"arch": "amd64", "release": "jammy"}) is accepts


@pytest.mark.parametrize("text", ["", "arch", "=x", "arch~("])
def test_filter_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Filter(text)


@pytest.mark.parametrize(
    ("source", "target", "options", "add", "remove"),
    [
        ("123", "", {}, "321", ""),
        ("123", "12", {}, "3", ""),
        ("12", "123", {}, "", "3"),
        ("123", "", {"maximum": 2}, "32", ""),
        ("12345", "12", {"maximum": 3}, "543", "12"),
        ("345", "12", {"maximum": 4, "keep": True}, "543", "1"),
        ("345", "12", {"maximum": 9, "keep": True}, "543", ""),
        ("123", "1", {"accepts": lambda name: name != "2"}, "3", ""),
        ("", "12", {}, "", "12"),
        ("123", "456", {"maximum": 3, "keep": True}, "", ""),
    ],
)
def test_work_is_what_to_add_and_to_remove(source: str, target: str, options: Any, add: str, remove: str) -> None:
    assert resolve_work(source, target, **options) == (list(add), list(remove))


def test_work_that_keeps_needs_a_maximum() -> None:
    with pytest.raises(InvalidArgumentError):
        resolve_work("1", "2", keep=True)


# -- trust -----------------------------------------------------------------------------------------------------------------


def reader(base: Path, name: str = "catalogue") -> TreeReader:
    return TreeReader(FileSource(base), Verifier(key(name).public))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path, default_products(tmp_path), signer="catalogue")


def test_tree_is_read_signed_in_either_form(tree: Path) -> None:
    assert (reader(tree).read().info.signed, len(list(reader(tree).read().items()))) == (True, 18)
    for path in tree.glob("streams/v1/*.sjson"):
        path.unlink()
    catalogue = reader(tree).read()
    assert (catalogue.info.signed, catalogue.info.index_url) == (True, f"file://{tree}/streams/v1/index.json")


def test_tree_without_signatures_is_read_only_without_keys(tmp_path: Path) -> None:
    write_tree(tmp_path, default_products(tmp_path))
    assert TreeReader(FileSource(tmp_path)).read().info.signed is False
    with pytest.raises(NotFoundError):
        reader(tmp_path).read()
    with pytest.raises(InvalidArgumentError):
        TreeReader(FileSource(tmp_path), only_signed=True).read()


SJSON = ["index.sjson", "downloads.sjson"]
DETACHED = ["index.json", "index.json.gpg", "downloads.json", "downloads.json.gpg"]


@pytest.mark.parametrize("name", SJSON + DETACHED)
@pytest.mark.parametrize("how", ["changed", "cut", "by a stranger"])
def test_tree_with_any_file_tampered_with_is_refused(tree: Path, tmp_path: Path, name: str, how: str) -> None:
    if name in DETACHED:
        for path in tree.glob("streams/v1/*.sjson"):
            path.unlink()
    file = tree / "streams/v1" / name
    data = file.read_bytes()
    if how == "changed":
        middle = data.find(b"ubuntu") if not name.endswith(".gpg") else len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        other = write_tree(tmp_path / "other", default_products(tmp_path / "other"), signer="stranger", updated="x")
        file.write_bytes((other / "streams/v1" / name).read_bytes())
    with pytest.raises(BadDataError):
        reader(tree).read()


def test_tree_with_a_dangling_index_is_refused(tree: Path) -> None:
    (tree / "streams/v1/downloads.sjson").unlink()
    with pytest.raises(BadDataError, match="cannot read product data"):
        reader(tree).read()


def test_tree_of_image_ids_is_read_too(tmp_path: Path) -> None:
    write_tree(tmp_path, {"p": {"arch": "amd64", "versions": {"1": {"items": {"a": {"id": "ami-1"}}}}}})
    index = tmp_path / "streams/v1/index.json"
    index.write_text(index.read_text().replace("image-downloads", "image-ids"))
    assert [item.attributes["id"] for item in TreeReader(FileSource(tmp_path)).read().items()] == ["ami-1"]


# -- indexes in indexes ----------------------------------------------------------------------------------------------------


def nested_tree(base: Path, levels: int, *, signer: str = "", datatype: str = "") -> Path:
    """A tree whose index leads to its products over so many further indexes, and each of those to the first one, too."""
    products = {"p": product(base, "jammy", "amd64", ["20240101"])}
    documents: dict[str, Any] = {"images": document("images", "image-downloads", products)}
    entry: dict[str, Any] = products_entry("images", "image-downloads", products)
    for level in range(levels, 0, -1):
        first = {"format": "index:1.0", "path": "streams/v1/index.json"}
        documents[f"level-{level}"] = index(images=entry, back=first)
        entry = {"format": "index:1.0", "path": f"streams/v1/level-{level}.json"}
        entry |= {"datatype": datatype} if datatype else {}
    return write_documents(base, documents | {"index": index(more=entry, twice=entry)}, signer=signer)


@pytest.mark.parametrize("signer", ["", "catalogue"])
@pytest.mark.parametrize("datatype", ["", "image-downloads"])
def test_index_that_names_indexes_is_followed_and_each_document_read_once(
    tmp_path: Path, signer: str, datatype: str
) -> None:
    base = nested_tree(tmp_path, 2, signer=signer, datatype=datatype)
    catalogue = (reader(base) if signer else TreeReader(FileSource(base))).read(["image-downloads"])
    assert (catalogue.info.signed, len(catalogue.documents)) == (bool(signer), 1)
    assert found(base, "jammy") == "p 20240101 disk1.img"


def test_index_of_another_datatype_is_not_followed(tmp_path: Path) -> None:
    base = nested_tree(tmp_path, 1, datatype="content-download")
    assert TreeReader(FileSource(base)).read().documents == []


def test_index_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    assert TreeReader(FileSource(nested_tree(tmp_path / "4", 4))).read().documents
    with pytest.raises(BadDataError, match="nested more than 4 deep"):
        TreeReader(FileSource(nested_tree(tmp_path / "5", 5))).read()


@pytest.mark.parametrize(
    ("path", "says"), [("streams/v1/gone.json", "cannot read index data"), ("../x.json", "leaves")]
)
def test_index_that_names_no_index_is_refused(tmp_path: Path, path: str, says: str) -> None:
    write_documents(tmp_path, {"index": index(more={"format": "index:1.0", "path": path})})
    with pytest.raises(BadDataError, match=says):
        TreeReader(FileSource(tmp_path)).read()


# -- finding ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        ("a:b:c", "a:b:c", ""),
        ("a:b:c:2024", "a:b:c", "2024"),
        ("jammy", "jammy", ""),
        ("jammy:2024", "jammy", "2024"),
        ("a:b:c:20240101_13:00", "a:b:c", "20240101_13:00"),
        ("a:b:c:d", "a:b:c:d", ""),
        ("alpine/3.20:20240101_13:00", "alpine/3.20", "20240101_13:00"),
    ],
)
def test_wanted_is_a_product_or_an_alias_and_a_version(text: str, name: str, version: str) -> None:
    wanted = parse_wanted(text, ["a:b:c", "a:b:c:d"])
    assert (wanted.name, wanted.version) == (name, version)


def found(base: Path, text: str, kind: ImageType = ImageType.KVM, arch: str = "amd64") -> str:
    return str(find_image(TreeReader(FileSource(base)).read(), text, kind, arch))


def test_image_is_the_newest_of_its_alias_or_product(tree: Path) -> None:
    newest = "com.ubuntu.cloud:server:jammy:amd64 20240301 disk1.img"
    for text in ("jammy", "j", "jammy/amd64", "com.ubuntu.cloud:server:jammy:amd64"):
        assert found(tree, text) == newest
    assert found(tree, "jammy:20240101") == newest.replace("0301", "0101")
    assert "arm64" in found(tree, "jammy", arch="arm64")


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("lucid", ImageType.KVM, "no product or alias 'lucid' for amd64"),
        ("jammy:2000", ImageType.KVM, "has no version '2000'; it has 20240301"),
        ("jammy", ImageType.CONTAINER, "has no file for type container; it has disk1.img"),
    ],
)
def test_image_that_is_missing_says_what_is_there(tree: Path, text: str, kind: ImageType, says: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        found(tree, text, kind)
    assert says in caught.value.message


def test_image_without_sha256_is_not_imported(tmp_path: Path) -> None:
    products = {"p": product(tmp_path, "jammy", "amd64", ["1"])}
    item = products["p"]["versions"]["1"]["items"]["disk1.img"]
    item["md5"] = "0" * 32
    del item["sha256"]
    write_tree(tmp_path, json.loads(json.dumps(products)))
    with pytest.raises(Exception, match="gives no sha256"):
        found(tmp_path, "jammy")
