"""Which bytes a request's conditions ask for: a table."""

from __future__ import annotations

import pytest

from image_service.serving import Plan, entity_tag, headers_of, plan
from imaging.blobs.base import BlobInfo
from imaging.digests import Digest

INFO = BlobInfo(Digest.of(b"x"), 1000, 0.0)
EMPTY = BlobInfo(Digest.of(b""), 0, 0.0)
TAG = entity_tag(INFO.digest)
WHOLE = Plan(200, 0, 1000)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, WHOLE),
        ({"Range": "bytes=0-0"}, Plan(206, 0, 1)),
        ({"Range": "bytes=0-999"}, Plan(206, 0, 1000)),
        ({"Range": "bytes=0-"}, Plan(206, 0, 1000)),
        ({"Range": "bytes=999-"}, Plan(206, 999, 1)),
        ({"Range": "bytes= 5 - 9 "}, Plan(206, 5, 5)),
        ({"Range": "bytes=990-5000"}, Plan(206, 990, 10)),
        ({"Range": "bytes=-10"}, Plan(206, 990, 10)),
        ({"Range": "bytes=-5000"}, Plan(206, 0, 1000)),
        ({"Range": "bytes=1000-"}, Plan(416)),
        ({"Range": "bytes=1000-2000"}, Plan(416)),
        ({"Range": "bytes=-0"}, Plan(416)),
        ({"Range": "bytes=9-5"}, WHOLE),
        ({"Range": "bytes=-"}, WHOLE),
        ({"Range": "bytes="}, WHOLE),
        ({"Range": "bytes=0-1,3-4"}, WHOLE),
        ({"Range": "bytes=x-y"}, WHOLE),
        ({"Range": "bytes=" + "9" * 30 + "-"}, WHOLE),
        ({"Range": "items=0-1"}, WHOLE),
        ({"Range": "bytes=0-1", "If-Range": TAG}, Plan(206, 0, 2)),
        ({"Range": "bytes=0-1", "If-Range": '"other"'}, WHOLE),
        ({"Range": "bytes=0-1", "If-Range": f"W/{TAG}"}, WHOLE),
        ({"Range": "bytes=0-1", "If-Range": "Sat, 01 Jan 2000 00:00:00 GMT"}, WHOLE),
        ({"If-None-Match": TAG}, Plan(304)),
        ({"If-None-Match": f"W/{TAG}"}, Plan(304)),
        ({"If-None-Match": f'"a", {TAG} ,"b"'}, Plan(304)),
        ({"If-None-Match": "*"}, Plan(304)),
        ({"If-None-Match": '"a"'}, WHOLE),
        ({"If-None-Match": TAG, "Range": "bytes=0-1"}, Plan(304)),
        ({"If-Match": TAG}, WHOLE),
        ({"If-Match": "*"}, WHOLE),
        ({"If-Match": '"a"'}, Plan(412)),
        ({"If-Match": f"W/{TAG}"}, Plan(412)),
    ],
)
def test_plan_of_a_get_follows_its_conditions(headers: dict[str, str], expected: Plan) -> None:
    assert plan("GET", headers, INFO) == expected


def test_plan_of_a_head_ignores_the_range() -> None:
    assert plan("HEAD", {"Range": "bytes=0-1"}, INFO) == WHOLE
    assert plan("HEAD", {"If-None-Match": TAG}, INFO) == Plan(304)


@pytest.mark.parametrize("asked", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_plan_of_a_range_of_nothing_is_not_satisfiable(asked: str) -> None:
    assert plan("GET", {"Range": asked}, EMPTY) == Plan(416)
    assert plan("GET", {}, EMPTY) == Plan(200, 0, 0)


def test_headers_say_what_is_sent() -> None:
    part = headers_of(Plan(206, 10, 5), INFO)
    assert (part["Content-Range"], part["Content-Length"]) == ("bytes 10-14/1000", "5")
    assert headers_of(Plan(416), INFO)["Content-Range"] == "bytes */1000"
    unchanged = headers_of(Plan(304), INFO)
    assert unchanged["ETag"] == TAG
    assert unchanged["X-Image-Digest"] == str(INFO.digest)
    assert "Content-Length" not in unchanged
