"""Documents as they are written, byte for byte, and merging."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from imaging.errors import BadDataError, InvalidArgumentError, NotFoundError, UnsupportedError
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.merge import FileStorage, StorageSource, merge_and_write_metadata
from imaging.simplestreams.model import CloudSpec, ImageMetadata
from imaging.simplestreams.paths import index_storage_path, product_metadata_storage_path
from imaging.simplestreams.reader import fetch, sort_images
from imaging.simplestreams.writer import (
    WriteOptions,
    format_date,
    marshal_image_metadata,
    marshal_index,
    marshal_json,
    marshal_products,
)

NOW = datetime(2015, 3, 9, 23, 30, tzinfo=UTC)
IMAGES = [
    ImageMetadata(id="abcd", storage="root", virt_type="virt", arch="amd64", version="13.04", region_alias="x"),
    ImageMetadata(id="1234", arch="arm64", version="14.04", region_name="region", endpoint="endpoint"),
    ImageMetadata(id="0", arch="amd64", version="13.04", stream="daily"),
]
PRODUCTS = """{
    "products": {
        "com.ubuntu.cloud.daily:server:13.04:amd64": {
            "version": "13.04",
            "arch": "amd64",
            "versions": {
                "20150309": {
                    "items": {
                        "0": {
                            "id": "0"
                        }
                    }
                }
            }
        },
        "com.ubuntu.cloud:server:13.04:amd64": {
            "version": "13.04",
            "arch": "amd64",
            "versions": {
                "20150309": {
                    "items": {
                        "abcd": {
                            "id": "abcd",
                            "virt": "virt"
                        }
                    }
                }
            }
        },
        "com.ubuntu.cloud:server:14.04:arm64": {
            "version": "14.04",
            "arch": "arm64",
            "versions": {
                "20150309": {
                    "items": {
                        "1234": {
                            "id": "1234",
                            "region": "region",
                            "endpoint": "endpoint"
                        }
                    }
                }
            }
        }
    },
    "updated": "Mon, 09 Mar 2015 23:30:00 +0000",
    "format": "products:1.0",
    "content_id": "com.ubuntu.cloud:custom"
}"""
INDEX = """{
    "index": {
        "com.ubuntu.cloud:custom": {
            "updated": "Mon, 09 Mar 2015 23:30:00 +0000",
            "format": "products:1.0",
            "datatype": "image-ids",
            "cloudname": "custom",
            "clouds": [
                {
                    "region": "region",
                    "endpoint": "endpoint"
                }
            ],
            "path": "streams/v1/com.ubuntu.cloud-released-imagemetadata.json",
            "products": [
                "com.ubuntu.cloud.daily:server:13.04:amd64",
                "com.ubuntu.cloud:server:13.04:amd64",
                "com.ubuntu.cloud:server:14.04:arm64"
            ]
        }
    },
    "updated": "Mon, 09 Mar 2015 23:30:00 +0000",
    "format": "index:1.0"
}"""
HERE = CloudSpec("region", "endpoint")


def test_documents_are_written_byte_for_byte() -> None:
    index, products = marshal_image_metadata(IMAGES, [HERE], NOW)
    assert index.decode() == INDEX
    assert products.decode() == PRODUCTS
    assert marshal_index([], [], NOW).count(b'"products": []') == 1
    assert b"clouds" not in marshal_index([], [], NOW)


def test_version_of_the_original_has_the_day_before_the_month() -> None:
    assert b'"20150903"' in marshal_products(IMAGES, NOW, WriteOptions(compat=True))


def test_date_is_in_its_own_zone() -> None:
    moment = datetime(2015, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=2)))
    assert format_date(moment) == "Thu, 31 Dec 2015 23:30:00 +0200"


def test_json_is_escaped_as_for_html() -> None:
    text = '<&>\u2028\u2029\x08\x0c\x01\n"\\b\u00e9'
    assert marshal_json(text) == (
        b'"\\u003c\\u0026\\u003e\\u2028\\u2029\\u0008\\u000c\\u0001\\n\\"\\\\b' + "\u00e9".encode() + b'"'
    )
    assert json.loads(marshal_json(text)) == text


def test_one_id_in_two_regions_is_kept_twice_but_not_by_the_original() -> None:
    near = ImageMetadata(id="i", arch="amd64", version="13.04", region_name="near")
    images = [near, msgspec.structs.replace(near, region_name="far")]
    for options, names in ((WriteOptions(), ["i", "i-far"]), (WriteOptions(compat=True), ["i"])):
        document = json.loads(marshal_products(images, NOW, options))
        [product] = document["products"].values()
        assert list(product["versions"].popitem()[1]["items"]) == names


def test_sort_is_bytewise() -> None:
    names = ["a", "9", "B", "10"]
    assert [image.id for image in sort_images([ImageMetadata(id=name) for name in names])] == ["10", "9", "B", "a"]


# -- merging ---------------------------------------------------------------------------------------------------------------


def merged(storage: FileStorage) -> list[tuple[str, str, str, str]]:
    wanted = ImageConstraint(series=["12.04", "14.04"], arches=["amd64", "weird"])
    images = fetch([StorageSource(storage)], wanted)[0]
    return [(one.id, one.version, one.region_name, one.virt_type) for one in images]


def add(place: FileStorage, image_id: str, series: str = "precise", region: str = "region", **more: object) -> None:
    fields: dict[str, object] = {"arch": "amd64", "version": "99", "region_name": "ignored"} | more
    compat = bool(fields.pop("compat", False))
    image = ImageMetadata(id=image_id, **fields)  # type: ignore[arg-type]
    merge_and_write_metadata(series, [image], CloudSpec(region, "endpoint"), place, now=NOW, compat=compat)


def test_merge_into_nothing_writes_both_documents(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    add(storage, "new")
    assert merged(storage) == [("new", "12.04", "region", "")]
    assert (tmp_path / index_storage_path()).is_file()


@pytest.mark.parametrize("compat", [False, True])
def test_merge_replaces_the_same_and_keeps_other_series_and_regions(tmp_path: Path, *, compat: bool) -> None:
    storage = FileStorage(tmp_path)
    for arguments in (("old",), ("other", "trusty"), ("far", "precise", "far"), ("new",)):
        add(storage, *arguments, compat=compat)
    assert sorted(merged(storage)) == [
        ("far", "12.04", "far", ""),
        ("new", "12.04", "region", ""),
        ("other", "14.04", "region", ""),
    ]
    [entry] = json.loads((tmp_path / index_storage_path()).read_bytes())["index"].values()
    expected = ["region", "far", "region"] if compat else ["region", "far"]
    assert [cloud["region"] for cloud in entry["clouds"]] == expected


def test_merge_keeps_other_streams_arches_virts_and_root_stores(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    add(storage, "daily", stream="daily")
    add(storage, "odd", arch="weird", storage="ssd")
    add(storage, "pv", virt_type="pv")
    add(storage, "hvm", virt_type="hvm")
    daily = ImageConstraint(series=["precise"], stream="daily")
    assert [one.id for one in fetch([StorageSource(storage)], daily)[0]] == ["daily"]
    assert [one[0] for one in merged(storage)] == ["hvm", "odd", "pv"]
    weird = ImageConstraint(series=["precise"], arches=["weird"])
    assert fetch([StorageSource(storage)], weird)[0][0].storage == "ssd"


def test_merge_of_the_original_forgets_what_its_constraint_does_not_name(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    add(storage, "odd", arch="weird")
    add(storage, "daily", stream="daily")
    add(storage, "new", compat=True)
    document = json.loads((tmp_path / product_metadata_storage_path()).read_bytes())
    assert list(document["products"]) == ["com.ubuntu.cloud:server:12.04:amd64"]


class Recording(FileStorage):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.written: list[str] = []

    def put(self, path: str, data: bytes) -> None:
        self.written.append(path.rsplit("/", 1)[-1])
        super().put(path, data)


def test_merge_writes_products_before_the_index(tmp_path: Path) -> None:
    storage = Recording(tmp_path)
    add(storage, "a")
    add(storage, "a", compat=True)
    products = "com.ubuntu.cloud-released-imagemetadata.json"
    assert storage.written == [products, "index.json", "index.json", products]


def test_merge_of_an_unknown_series_writes_nothing(tmp_path: Path) -> None:
    storage = Recording(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r'^invalid series "nope"$'):
        add(storage, "a", "nope")
    assert storage.written == []


@pytest.mark.parametrize("damage", ["index", "products", "foreign", "gone"])
def test_merge_into_what_it_could_not_keep_is_refused(tmp_path: Path, damage: str) -> None:
    storage = Recording(tmp_path)
    add(storage, "a")
    index, products = (tmp_path / path for path in (index_storage_path(), product_metadata_storage_path()))
    before = index.read_text(), products.read_text()
    if damage == "index":
        index.write_text("{")
    elif damage == "products":
        products.write_text(before[1].replace("products:1.0", "x"))
    elif damage == "foreign":
        products.write_text(before[1].replace("com.ubuntu.cloud:server:12.04:amd64", "debian:12:amd64"))
    else:
        products.unlink()
    storage.written.clear()
    expected = {"foreign": UnsupportedError, "gone": NotFoundError}
    with pytest.raises(expected.get(damage, BadDataError)):
        add(storage, "b")
    assert storage.written == []
