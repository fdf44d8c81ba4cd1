"""Lookups: parsing, selecting, several sources, error texts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imaging.errors import BadDataError, MistifyError, NotFoundError
from imaging.kv.sqlite import SqliteKeyValue
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.freshness import LastSeen
from imaging.simplestreams.model import CloudSpec, ImageMetadata, Index, ResolveInfo, decode_document
from imaging.simplestreams.reader import Lookup, fetch, get_latest_image_id_metadata
from imaging.simplestreams.selecting import NoMatchError, choose_entry
from imaging.simplestreams.sources import MemorySource
from imaging.simplestreams.validate import validate_image_metadata
from tests.simplestreams.catalogues import (
    ENDPOINT,
    PRECISE,
    PRODUCTS,
    entry,
    index,
    item,
    product,
    products,
    source,
    tree,
)

WANTED = ImageConstraint("us-east-1", ENDPOINT, ["precise"], ["amd64"])
COMPAT = Lookup(compat=True)


def found(documents: dict[str, bytes], wanted: ImageConstraint = WANTED, **lookup: Any) -> list[ImageMetadata]:
    return fetch([source(documents)], wanted, Lookup(**lookup))[0]


def ids(documents: dict[str, bytes], wanted: ImageConstraint = WANTED) -> list[str]:
    return [image.id for image in found(documents, wanted)]


def failure(documents: dict[str, bytes], wanted: ImageConstraint = WANTED) -> MistifyError:
    with pytest.raises(MistifyError) as caught:
        found(documents, wanted)
    return caught.value


def test_fetch_finds_the_image_and_says_where() -> None:
    images, info = fetch([source()], WANTED)
    assert [image.to_wire() for image in images] == [
        {
            "id": "ami-1",
            "root_store": "ebs",
            "virt": "pv",
            "arch": "amd64",
            "version": "12.04",
            "region": "us-east-1",
            "endpoint": ENDPOINT,
        }
    ]
    assert info is not None
    assert info.to_wire() == {
        "source": "memory",
        "signed": False,
        "indexURL": "test://memory/streams/v1/index.json",
    }


def test_fetch_without_sources_has_no_answer_and_no_info() -> None:
    assert fetch([], WANTED) == ([], None)


@pytest.mark.parametrize(
    ("region", "endpoint", "matches"),
    [
        ("us-east-1", ENDPOINT, True),
        ("us-east-1", ENDPOINT + "/", True),
        ("us-east-1", "", False),
        ("US-EAST-1", ENDPOINT, False),
        ("", "", True),
    ],
)
def test_index_entry_is_chosen_by_cloud(region: str, endpoint: str, *, matches: bool) -> None:
    documents = tree(index(entry(clouds=[{"region": "us-east-1", "endpoint": ENDPOINT}])))
    wanted = ImageConstraint(region, endpoint, ["precise"], ["amd64"])
    if matches:
        assert ids(documents, wanted) == ["ami-1"]
    else:
        err = failure(documents, wanted)
        assert isinstance(err, NotFoundError)
        assert err.message == f"index file has no data for cloud {{{region} {endpoint}}} not found"


def test_cloud_without_endpoint_equals_a_slash() -> None:
    assert CloudSpec("r", "").matches(CloudSpec("r", "/"))


def test_index_entry_of_several_is_the_first_by_content_id() -> None:
    other = products({PRECISE: product(v20130501={"a": item("other")})})
    the_index = index(entry(path="streams/v1/other.json"), entry())
    the_index["index"] = dict(zip(["z", "a"], the_index["index"].values(), strict=True))
    documents = tree(the_index, other=other)
    assert ids(documents) == ["ami-1"]
    assert [one.id for one in found(documents, compat=True)] == ["other"]


@pytest.mark.parametrize("documents", [index(index=None), index(entry(datatype="content-download"))])
def test_index_without_image_ids_is_not_found(documents: Any) -> None:
    err = failure(tree(documents))
    assert (type(err), err.message) == (NotFoundError, '"image-ids" data not found')


def test_fetch_that_matches_nothing_is_empty() -> None:
    wanted = ImageConstraint("us-east-1", ENDPOINT, ["trusty"], ["amd64"])
    images, info = fetch([source()], wanted)
    assert (images, info) == (
        [],
        ResolveInfo(source="memory", signed=False, index_url=source().url("streams/v1/index.json")),
    )
    assert ids(tree(), ImageConstraint("nowhere", "", ["precise"])) == []


def test_index_without_the_products_says_which_were_wanted() -> None:
    parsed = decode_document(json.dumps(index()).encode(), Index, "index")
    with pytest.raises(NoMatchError) as caught:
        choose_entry(parsed, "image-ids", CloudSpec(), ["com.ubuntu.cloud:server:14.04:amd64", "b"])
    assert caught.value.message == (
        'index file has no data for product name(s) ["com.ubuntu.cloud:server:14.04:amd64" "b"]'
    )


INDEX_URL = "test://memory/streams/v1/index.json"
PRODUCTS_URL = f"test://memory/{PRODUCTS}"


@pytest.mark.parametrize(
    ("documents", "kind", "text"),
    [
        ({}, NotFoundError, f'invalid URL "{INDEX_URL}" not found'),
        (tree(b"{"), BadDataError, f'cannot unmarshal JSON index metadata at URL "{INDEX_URL}": '),
        (
            tree(index(format="x")),
            BadDataError,
            f'unexpected index file format "x", expected "index:1.0" at URL "{INDEX_URL}"',
        ),
        (
            tree({"index": {}}),
            BadDataError,
            f'unexpected index file format "", expected "index:1.0" at URL "{INDEX_URL}"',
        ),
        (
            tree(mirrors=b"["),
            BadDataError,
            'cannot load mirror metadata at URL "test://memory/streams/v1/mirrors.json": ',
        ),
        (
            tree(index(entry(path="streams/v1/gone.json"))),
            BadDataError,
            'cannot read product data, invalid URL "test://memory/streams/v1/gone.json" not found',
        ),
        (tree(None, b"nope"), BadDataError, f'cannot unmarshal JSON metadata at URL "{PRODUCTS_URL}": '),
        (
            tree(None, products({PRECISE: product(v1={"a": {"id": 5}})})),
            BadDataError,
            f'cannot unmarshal JSON metadata at URL "{PRODUCTS_URL}": ',
        ),
        (
            tree(None, products({PRECISE: {"version": 14.04}})),
            BadDataError,
            f'cannot unmarshal JSON metadata at URL "{PRODUCTS_URL}": ',
        ),
        (
            tree(None, products(format="index:1.0")),
            BadDataError,
            f'unexpected index file format "index:1.0", expected "products:1.0" at URL "{PRODUCTS_URL}"',
        ),
        (tree(index(entry(path="../up.json"))), BadDataError, "catalogue has a path that leaves its tree"),
    ],
)
def test_fetch_of_a_bad_catalogue_says_what_is_wrong(documents: Any, kind: type, text: str) -> None:
    err = failure(documents)
    assert type(err) is kind
    assert text in err.message
    if not text.endswith(": "):
        assert err.message.endswith(text) or "leaves its tree" in text


def test_index2_is_preferred_and_only_its_absence_leads_to_the_index() -> None:
    newer = index(entry(path="streams/v1/newer.json"))
    documents = tree(index2=newer, newer=products({PRECISE: product(v20130501={"a": item("newer")})}))
    images, info = fetch([source(documents)], WANTED)
    assert ([one.id for one in images], info and info.index_url) == (["newer"], "test://memory/streams/v1/index2.json")
    assert "index2.json" in failure(tree(index2=b"{")).message


def test_unknown_attributes_and_nulls_are_ignored() -> None:
    content = product(v20130501={"a": item(crsn=None, size=5, more={"x": [1]}), "none": None})
    content["versions"]["20140101"] = None
    documents = tree(
        index(updated=None, more=[{}]), products({PRECISE: content, "x": {"a": 1}, "y": None}, updated="?")
    )
    assert ids(documents) == ["ami-1"]


def test_item_without_id_and_product_without_versions_are_fine() -> None:
    bare = item()
    del bare["id"]
    assert ids(tree(None, products({PRECISE: product(v1={"a": bare})}))) == [""]
    assert ids(tree(None, products({PRECISE: {"arch": "amd64"}}))) == []


def test_product_missing_from_the_index_is_invisible() -> None:
    documents = tree(index(entry("com.ubuntu.cloud:server:12.04:i386")))
    assert ids(documents) == []


def test_aliases_override_the_items_own_fields_only() -> None:
    aliases = {"crsn": {"uswest3": {"region": "us-west-3", "endpoint": "https://w3", "bogus": "x"}, "other": None}}
    items = {"a": item("ami-3", crsn="uswest3"), "b": item("ami-4", "us-west-3", crsn="unknown")}
    documents = tree(None, products({PRECISE: product(v1=items)}, _aliases=aliases))
    images = found(documents, ImageConstraint("us-west-3", "", ["precise"], ["amd64"]))
    assert [(one.id, one.endpoint, one.region_alias) for one in images] == [
        ("ami-3", "https://w3", "uswest3"),
        ("ami-4", ENDPOINT, "unknown"),
    ]


def test_aliases_do_not_see_inherited_values() -> None:
    content = product(v1={"a": {"id": "i"}}) | {"region": "near"}
    documents = tree(None, products({PRECISE: content}, _aliases={"region": {"near": {"endpoint": "https://far"}}}))
    assert found(documents, ImageConstraint(series=["precise"]))[0].endpoint == ""


def test_blanks_are_inherited_level_by_level() -> None:
    content = {
        "version": "12.04",
        "versions": {"1": {"arch": "from-version", "items": {"a": {"id": "i", "region": ""}}}},
    }
    content |= {"virt": "ignored", "root_store": "ignored", "crsn": "ignored"}
    documents = tree(None, products({PRECISE: content}, region="from-top", endpoint="https://top"))
    [image] = found(documents, ImageConstraint(series=["precise"]))
    assert image == ImageMetadata(
        id="i", arch="from-version", version="12.04", region_name="from-top", endpoint="https://top"
    )


def test_items_of_newer_versions_hide_older_ones_with_the_same_key() -> None:
    content = product(
        v20130501={"a": item("older"), "b": item("other-virt", virt="hvm")},
        v20130502={"a": item("newer-1"), "b": item("newer-2")},
    )
    assert ids(tree(None, products({PRECISE: content}))) == ["newer-1", "newer-2", "other-virt"]


def test_versions_are_ordered_as_texts() -> None:
    content = product(v20130501={"a": item("dated")}, v9={"a": item("nine")})
    assert ids(tree(None, products({PRECISE: content}))) == ["nine"]


def test_answer_is_sorted_by_id_bytewise() -> None:
    items = {name: item(name, virt=name) for name in ("a", "B", "9", "10")}
    assert ids(tree(None, products({PRECISE: product(v1=items)}))) == ["10", "9", "B", "a"]


def test_latest_metadata_is_unsorted_and_a_miss_is_an_error() -> None:
    items = {name: item(name) for name in ("z", "a")}
    data = json.dumps(products({PRECISE: product(v1=items)})).encode()
    assert [one.id for one in get_latest_image_id_metadata(data, WANTED)] == ["z", "a"]
    with pytest.raises(NotFoundError) as caught:
        get_latest_image_id_metadata(data, ImageConstraint(series=["trusty"], arches=["i386"]))
    assert caught.value.message == (
        "index has no records for product ids [com.ubuntu.cloud:server:14.04:i386]; "
        f"it does have product ids [{PRECISE}]"
    )
    with pytest.raises(NotFoundError, match=r"^index has no matching records$"):
        get_latest_image_id_metadata(data, ImageConstraint("mars", series=["precise"]))
    with pytest.raises(BadDataError, match=r'at URL "<unknown>"'):
        get_latest_image_id_metadata(b"{}", WANTED)


# -- several sources -----------------------------------------------------------------------------------------------------


def sources(*kinds: str) -> list[MemorySource]:
    documents = {
        "missing": {},
        "bad": tree(b"{"),
        "empty": tree(index(entry("something:else"))),
        "good": tree(),
    }
    return [source(documents[kind], f"{kind}-{number}") for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("before", ["missing", "bad", "empty"])
def test_source_that_has_nothing_is_passed_over(before: str) -> None:
    images, info = fetch(sources(before, "good"), WANTED)
    assert ([one.id for one in images], info and info.source) == (["ami-1"], "good-1")


@pytest.mark.parametrize(
    ("kinds", "ours", "original"),
    [
        (["empty", "missing"], "empty", "missing"),
        (["missing", "empty"], "empty", "empty"),
        (["bad", "missing"], "bad", "missing"),
        (["missing", "bad"], "bad", "bad"),
        (["bad", "empty"], "bad", "empty"),
        (["missing", "missing"], "missing", "missing"),
    ],
)
def test_failure_that_is_told_of_several(kinds: list[str], ours: str, original: str) -> None:
    expected = {"missing": NotFoundError, "bad": BadDataError, "empty": None}
    for lookup, kind in ((Lookup(), expected[ours]), (COMPAT, expected[original])):
        if kind is None:
            assert fetch(sources(*kinds), WANTED, lookup)[0] == []
        else:
            with pytest.raises(kind) as caught:
                fetch(sources(*kinds), WANTED, lookup)
            assert type(caught.value) is kind


def test_failure_of_several_sources_notes_the_others() -> None:
    with pytest.raises(BadDataError) as caught:
        fetch(sources("missing", "bad"), WANTED)
    assert caught.value.__notes__ == ['missing-0: invalid URL "test://missing-0/streams/v1/index.json" not found']


# -- mirrors -------------------------------------------------------------------------------------------------------------


def mirrored(clouds: list[dict[str, str]] | None, mirrors: Any = None) -> dict[str, bytes]:
    reference = {"datatype": "image-ids", "path": "streams/v1/cpc.json", "clouds": clouds}
    info = {"mirror": "http://mirror.invalid", "path": "p.json"} | ({"clouds": clouds} if clouds else {})
    cpc = {"format": "mirrors:1.0", "mirrors": {"c": [info]}} if mirrors is None else mirrors
    return tree(mirrors={"mirrors": {"c": [reference]}}, cpc=cpc)


def test_mirrors_are_used_only_if_asked_for() -> None:
    documents = mirrored(None)
    assert ids(documents) == ["ami-1"]
    assert found(documents, mirror_content_id="another")[0].id == "ami-1"


@pytest.mark.parametrize("clouds", [None, [{"region": "us-east-1", "endpoint": ENDPOINT}]])
def test_mirror_of_the_content_id_is_where_products_come_from(clouds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = MemorySource({"p.json": json.dumps(products({PRECISE: product(v1={"a": item("far")})})).encode()})
    monkeypatch.setattr("imaging.simplestreams.reader.HttpSource", lambda _: mirror)
    images, info = fetch([source(mirrored(clouds))], WANTED, Lookup(mirror_content_id="c"))
    assert ([one.id for one in images], info and info.mirror_url) == (["far"], "http://mirror.invalid")


def test_mirror_for_another_cloud_is_not_used() -> None:
    documents = mirrored([{"region": "mars", "endpoint": "https://mars"}])
    assert found(documents, mirror_content_id="c")[0].id == "ami-1"


def test_mirrors_of_another_format_are_refused() -> None:
    with pytest.raises(BadDataError, match=r'expected "mirrors:1.0"'):
        found(mirrored(None, {"format": "x"}), mirror_content_id="c")


# -- rolled back -----------------------------------------------------------------------------------------------------------


def test_catalogue_that_grows_younger_is_refused(tmp_path: Any) -> None:
    store = SqliteKeyValue(tmp_path / "seen.db")
    lookup = Lookup(last_seen=LastSeen(store))
    newer = tree(index(updated="Thu, 02 May 2013 00:00:00 +0000"))
    for documents in (tree(), newer, newer):
        assert fetch([source(documents)], WANTED, lookup)[0]
    for older in (tree(), tree(index(updated=None)), tree(index(updated="yesterday"))):
        with pytest.raises(BadDataError, match=r"was rolled back"):
            fetch([source(older)], WANTED, lookup)
    old_products = products(updated="Mon, 01 Apr 2013 00:00:00 +0000")
    with pytest.raises(BadDataError, match=r"products\.json.* was rolled back"):
        fetch([source(tree(index(updated="Fri, 03 May 2013 00:00:00 +0000"), old_products))], WANTED, lookup)
    store.close()


# -- validate --------------------------------------------------------------------------------------------------------------


def test_validate_gives_sorted_ids_and_where() -> None:
    names, info = validate_image_metadata([source()], WANTED)
    assert (names, info and info.source) == (["ami-1"], "memory")


def test_validate_that_finds_nothing_names_the_constraint() -> None:
    wanted = ImageConstraint("mars", "https://e", ["precise", "trusty"], ["amd64", "i386"])
    with pytest.raises(NotFoundError) as caught:
        validate_image_metadata([source()], wanted)
    assert caught.value.message == (
        "no matching images found for constraint &{LookupParams:{CloudSpec:{Region:mars Endpoint:https://e} "
        "Series:[precise trusty] Arches:[amd64 i386] Stream:}}"
    )


@pytest.mark.parametrize("missing", ["series", "region", "endpoint", "arches", "sources"])
def test_validate_without_a_parameter_names_it(missing: str) -> None:
    given: dict[str, Any] = {"region": "r", "endpoint": "e", "series": ["precise"], "arches": ["amd64"]}
    given.pop(missing, None)
    with pytest.raises(MistifyError, match=rf"^required parameter {missing} not specified$"):
        validate_image_metadata([] if missing == "sources" else [source()], ImageConstraint(**given))
