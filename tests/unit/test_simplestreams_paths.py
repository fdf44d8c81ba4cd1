"""Constants, URLs, product ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from imaging.errors import BadDataError, InvalidArgumentError
from imaging.simplestreams import paths
from imaging.simplestreams.constraint import ARCHES, ImageConstraint, series_version, supported_series
from imaging.simplestreams.paths import check_path, image_metadata_url, join_url, signed_path
from imaging.simplestreams.sources import FileSource, HttpSource, open_source


def test_paths_are_those_of_the_format() -> None:
    assert paths.index_storage_path() == "images/streams/v1/index.json"
    assert paths.product_metadata_storage_path() == "images/streams/v1/com.ubuntu.cloud-released-imagemetadata.json"
    assert [paths.unsigned_index("v1", n) for n in (0, 1, 2)] == [
        "streams/v1/index.json",
        "streams/v1/index.json",
        "streams/v1/index2.json",
    ]
    assert (paths.unsigned_mirror("v1"), paths.mirrors_path("v1")) == ("streams/v1/mirrors.json", "streams/v1/mirrors")
    assert signed_path("streams/v1/index.json") == "streams/v1/index.sjson"


@pytest.mark.parametrize(
    ("given", "stream", "url"),
    [
        ("", "", ""),
        ("http://cloud-images.ubuntu.com", "", "http://cloud-images.ubuntu.com/releases"),
        ("http://cloud-images.ubuntu.com", "released", "http://cloud-images.ubuntu.com/releases"),
        ("http://cloud-images.ubuntu.com", "daily", "http://cloud-images.ubuntu.com/daily"),
        ("http://cloud-images.ubuntu.com/", "daily", "http://cloud-images.ubuntu.com/"),
        ("https://cloud-images.ubuntu.com", "daily", "https://cloud-images.ubuntu.com"),
        ("http://foo", "", "http://foo"),
        ("https://foo", "released", "https://foo"),
        ("file:///home/foo", "", "file:///home/foo"),
        ("test://foo", "", "test://foo"),
        ("/home/foo", "", "file:///home/foo/images"),
        ("/home/foo/", "", "file:///home/foo//images"),
        ("/home/foo/images", "", "file:///home/foo/images"),
        ("/home/foo/images/", "", "file:///home/foo/images//images"),
    ],
)
def test_image_metadata_url_is_made_of_a_source(given: str, stream: str, url: str) -> None:
    assert image_metadata_url(given, stream) == url


@pytest.mark.parametrize("given", ["foo", "relative/path", "ftp://foo"])
def test_image_metadata_url_of_a_relative_path_is_refused(given: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{given} is not an absolute path$"):
        image_metadata_url(given)


@pytest.mark.parametrize("given", ["://foo", "http://[::1", "/home/%zz"])
def test_image_metadata_url_that_does_not_parse_is_refused(given: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        image_metadata_url(given)
    assert caught.value.message.startswith(f"invalid default images URL {given}: parse {given}: ")


@pytest.mark.parametrize("base", ["http://foo", "http://foo/"])
def test_url_join_has_one_slash(base: str) -> None:
    assert join_url(base, "streams/v1/index.json") == "http://foo/streams/v1/index.json"
    assert HttpSource(base).url("a//b") == "http://foo/a//b", "nothing is normalised"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", ".../x", "a/../b", "a/.../b", "a/..", "..", "a\0b"])
def test_path_that_leaves_its_tree_is_refused(path: str) -> None:
    with pytest.raises(BadDataError, match=r"leaves its tree"):
        check_path(path)


@pytest.mark.parametrize("path", ["", "a", "a..b/c", "streams/v1/x.json", "..a/b"])
def test_path_within_its_tree_is_accepted(path: str) -> None:
    assert check_path(path) == path


def test_product_ids_of_one_series_follow_the_arches() -> None:
    constraint = ImageConstraint(series=["precise"], arches=["amd64", "i386"])
    assert constraint.product_ids() == [f"com.ubuntu.cloud:server:12.04:{arch}" for arch in ("amd64", "i386")]


def test_product_ids_of_several_series_keep_their_order_and_stream() -> None:
    constraint = ImageConstraint(series=["trusty", "precise"], arches=["weird"], stream="daily")
    assert constraint.product_ids() == [f"com.ubuntu.cloud.daily:server:{v}:weird" for v in ("14.04", "12.04")]


def test_product_ids_without_arches_have_the_usual_ones() -> None:
    names = ImageConstraint(series=["precise"], stream="released").product_ids()
    assert names == [f"com.ubuntu.cloud:server:12.04:{arch}" for arch in ARCHES]


def test_product_ids_without_series_have_all_that_are_known() -> None:
    names = ImageConstraint(arches=["amd64"]).product_ids()
    versions = [name.split(":")[2] for name in names]
    assert versions == list(supported_series().values())
    assert {"12.04", "7", "win81"} <= set(versions)


def test_index_ids_are_not_used_for_images() -> None:
    assert ImageConstraint().index_ids() is None  # type: ignore[func-returns-value]


def test_series_unknown_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r'^invalid series "foo"$'):
        ImageConstraint(series=["foo"]).product_ids()


def test_series_may_be_a_version_but_not_for_old_clients() -> None:
    assert series_version("98.04") == "98.04"
    with pytest.raises(InvalidArgumentError, match=r'^invalid series "98.04"$'):
        series_version("98.04", compat=True)


def test_series_come_from_the_distributions_list_too(tmp_path: Path) -> None:
    listing = tmp_path / "ubuntu.csv"
    listing.write_text("version,codename,series,created\n66.10 LTS,Wild,wild,2066-01-01\n")
    assert supported_series(distro_info=listing)["wild"] == "66.10"
    assert "wild" not in supported_series(distro_info=tmp_path / "none.csv")


@pytest.mark.parametrize(("text", "kind"), [("http://a", HttpSource), ("file:///a", FileSource), ("/a", FileSource)])
def test_source_is_opened_by_its_form(text: str, kind: type) -> None:
    assert isinstance(open_source(text), kind)


def test_source_of_another_form_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"not a source"):
        open_source("gopher://a")
