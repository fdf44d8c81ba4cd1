"""``mistify-image catalog``: lookups as a person or a script calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from image_service.cli import cli
from tests.simplestreams.catalogues import ENDPOINT, index, key, signed, tree

WANTED = ["--region", "us-east-1", "--endpoint", ENDPOINT, "--series", "precise", "--arch", "amd64"]


def call(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["catalog", *arguments], input=text)


def answer(*arguments: str, status: int = 0, text: str | None = None) -> Any:
    result = call(*arguments, text=text)
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    for path, data in signed(tree()).items():
        file = tmp_path / "site" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "keys.asc").write_bytes(key().public)
    return tmp_path / "site"


def test_fetch_prints_images_and_where_they_were(site: Path) -> None:
    wire = answer("fetch", "--source", str(site), *WANTED, "--json")
    assert [image["id"] for image in wire["images"]] == ["ami-1"]
    url = f"file://{site}/streams/v1/index.json"
    assert wire["resolve_info"] == {"source": f"file://{site}", "signed": False, "indexURL": url}
    assert call("fetch", "--source", f"file://{site}", *WANTED).stdout.split()[0] == "ami-1"


def test_fetch_with_a_keyring_prefers_signed_data(site: Path) -> None:
    keyring = str(site.parent / "keys.asc")
    wire = answer("fetch", "--source", str(site), *WANTED, "--keyring", keyring, "--signed-only", "--json")
    assert wire["resolve_info"]["signed"] is True


def test_fetch_that_fails_prints_the_error_and_its_kind(site: Path, tmp_path: Path) -> None:
    wire = answer("fetch", "--source", str(tmp_path / "none"), *WANTED, "--json", status=1)
    url = f"file://{tmp_path}/none/streams/v1/index.json"
    assert wire == {"error": f'invalid URL "{url}" not found', "kind": "NotFound"}
    (site / "streams/v1/index.sjson").write_text("nothing")
    arguments = ["fetch", "--source", str(site), *WANTED, "--keyring", str(site.parent / "keys.asc"), "--json"]
    assert answer(*arguments, status=1)["kind"] == "BadData"
    assert answer(*arguments, "--compat")["resolve_info"]["signed"] is False
    assert answer("fetch", "--source", str(site), "--series", "x", "--json", status=1) == {
        "error": 'invalid series "x"',
        "kind": "InvalidArgument",
    }


def test_fetch_without_json_fails_with_one_line(tmp_path: Path) -> None:
    result = call("fetch", "--source", str(tmp_path), *WANTED)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: invalid URL ")


def test_fetch_without_sources_finds_nothing() -> None:
    assert answer("fetch", "--json") == {"images": [], "resolve_info": None}


def test_fetch_refuses_what_is_older_than_it_saw(site: Path, tmp_path: Path) -> None:
    arguments = ["fetch", "--source", str(site), *WANTED, "--state", str(tmp_path / "seen.db"), "--json"]
    assert answer(*arguments)["images"]
    older = index(updated="Wed, 01 May 2012 13:31:26 +0000")
    (site / "streams/v1/index.json").write_text(json.dumps(older))
    assert "rolled back" in answer(*arguments, status=1)["error"]


def test_validate_prints_ids_or_what_is_missing(site: Path) -> None:
    assert answer("validate", "--source", str(site), *WANTED, "--json")["image_ids"] == ["ami-1"]
    wire = answer("validate", "--source", str(site), "--series", "precise", "--json", status=1)
    assert wire["error"] == "required parameter region not specified"


def test_product_ids_are_printed_in_order() -> None:
    arguments = ["product-ids", "--series", "precise", "--arch", "amd64", "--arch", "i386", "--stream", "daily"]
    names = [f"com.ubuntu.cloud.daily:server:12.04:{arch}" for arch in ("amd64", "i386")]
    assert answer(*arguments, "--json") == {"product_ids": names}
    assert call(*arguments).stdout.split() == names


def test_url_is_printed_or_refused() -> None:
    assert answer("url", "/home/foo", "--json") == {"url": "file:///home/foo/images"}
    assert call("url", "http://cloud-images.ubuntu.com", "daily").stdout == "http://cloud-images.ubuntu.com/daily\n"
    assert answer("url", "foo", "--json", status=1) == {
        "error": "foo is not an absolute path",
        "kind": "InvalidArgument",
    }


IMAGES = [{"id": "1", "arch": "amd64", "version": "12.04", "region": "r"}]


def test_marshal_prints_both_documents(tmp_path: Path) -> None:
    file = tmp_path / "images.json"
    date = "Mon, 09 Mar 2015 00:00:00 +0000"
    given = {"images": IMAGES, "clouds": [{"region": "r", "endpoint": "e"}], "updated": date}
    file.write_text(json.dumps(given))
    wire = answer("marshal", str(file))
    assert json.loads(wire["index"])["updated"] == date
    assert "20150309" in wire["products"]
    assert "20150903" in answer("marshal", str(file), "--compat")["products"]
    assert call("marshal", str(file), "--products").stdout == wire["products"]
    alone = answer("marshal", "-", "--updated", "2015-03-09T00:00:00Z", text=json.dumps(IMAGES))
    assert alone["products"] == wire["products"]


@pytest.mark.parametrize("text", ["{", "[5]", '{"images": [{"id": 5}]}', "", "\xff"])
def test_marshal_of_something_else_is_refused(text: str) -> None:
    assert answer("marshal", "-", "--json", text=text, status=1)["kind"] == "BadData"
    assert answer("marshal", "-", "--updated", "soon", "--json", text="[]", status=1)["kind"] == "InvalidArgument"
