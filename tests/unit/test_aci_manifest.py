"""Manifests of app container images: every rule, and the text that says which one is broken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imaging.aci import MANIFEST_MAX_BYTES, canonical_json, new_manifest, parse_app_string, parse_manifest
from imaging.errors import BadDataError, InvalidArgumentError

GOOD: dict[str, Any] = {"acKind": "ImageManifest", "acVersion": "0.8.11", "name": "example.com/app"}
APP: dict[str, Any] = {"exec": ["/bin/app"], "user": "0", "group": "0"}
ID = "sha512-" + "0123456789abcdef" * 8


def _parse(**changes: Any) -> Any:
    document = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return parse_manifest(json.dumps(document).encode())


def _labels(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in pairs]


LINUX = "amd64 i386 aarch64 aarch64_be armv6l armv7l armv7b ppc64 ppc64le s390x"
CHARACTERS = 'ACIdentifier must contain only lower case alphanumeric characters plus "-._~/"'
EDGES = "ACIdentifier must start and end with only lower case alphanumeric characters"
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"acKind": ...}, 'missing or bad ACKind (must be "ImageManifest")'),
    ({"acKind": "PodManifest"}, 'missing or bad ACKind (must be "ImageManifest")'),
    ({"acKind": "Foo"}, "bad ACKind: Foo"),
    ({"acVersion": ...}, "acVersion must be set"),
    ({"acVersion": "0.0.0"}, "acVersion must be set"),
    ({"acVersion": "1.2"}, "SemVer is bad"),
    ({"acVersion": "1.2.x"}, "SemVer is bad"),
    ({"acVersion": "01.2.3"}, "SemVer is bad"),
    ({"name": ...}, "name must be set"),
    ({"name": ""}, "name must be set"),
    ({"name": "Example.com"}, CHARACTERS),
    ({"name": "a b"}, CHARACTERS),
    ({"name": "-a"}, EDGES),
    ({"name": "a/"}, EDGES),
    ({"name": "a//b"}, EDGES),
    ({"labels": _labels(("", "x"))}, "ACIdentifier cannot be empty"),
    ({"labels": _labels(("a", "1"), ("a", "2"))}, 'duplicate labels of name "a"'),
    ({"labels": _labels(("name", "1"))}, 'invalid label name: "name"'),
    ({"labels": _labels(("os", "plan9"))}, 'bad os "plan9" (must be one of: [darwin freebsd linux])'),
    (
        {"labels": _labels(("os", "linux"), ("arch", "x86_64"))},
        f'bad arch "x86_64" for linux (must be one of: [{LINUX}])',
    ),
    (
        {"labels": _labels(("os", "freebsd"), ("arch", "s390x"))},
        'bad arch "s390x" for freebsd (must be one of: [amd64 i386 arm])',
    ),
    ({"annotations": _labels(("created", "yesterday"))}, "bad Date: yesterday"),
    ({"annotations": _labels(("created", "2020-13-01T00:00:00Z"))}, "bad Date: 2020-13-01T00:00:00Z"),
    ({"annotations": _labels(("homepage", "ftp://x"))}, "bad URL scheme, must be http/https"),
    ({"annotations": _labels(("documentation", "http://[x"))}, "bad URL: http://[x"),
    ({"annotations": _labels(("a", "1"), ("a", "2"))}, 'duplicate annotations of name "a"'),
    ({"app": {"exec": ["/a"], "group": "0"}}, "user is required"),
    ({"app": {"exec": ["/a"], "user": "0"}}, "group is required"),
    ({"app": APP | {"workingDirectory": "tmp"}}, "workingDirectory must be an absolute path"),
    ({"app": APP | {"eventHandlers": [{"name": "x", "exec": []}]}}, 'bad eventHandler name: "x"'),
    ({"app": APP | {"environment": _labels(("", "x"))}}, "name of an environment variable must be set"),
    ({"app": APP | {"mountPoints": [{"name": "a_b", "path": "/"}]}}, "ACName must contain only lower case"),
    ({"app": APP | {"mountPoints": [{"name": "a"}]}}, "path of a mount point must be set"),
    ({"app": APP | {"ports": [{"name": "p", "protocol": "tcp", "port": 0}]}}, "port must be in 1-65535 range"),
    (
        {"app": APP | {"ports": [{"name": "p", "protocol": "tcp", "port": 65535, "count": 2}]}},
        "end of port range must be in 1-65535 range",
    ),
    ({"dependencies": [{}]}, "imageName cannot be empty"),
    ({"dependencies": [{"imageName": "a", "imageID": "md5-00"}]}, "unrecognized hash type: md5"),
    ({"dependencies": [{"imageName": "a", "imageID": "sha512"}]}, "badly formatted hash string"),
    ({"dependencies": [{"imageName": "a", "imageID": "sha512-00"}]}, "badly formatted hash string"),
    ({"dependencies": [{"imageName": "a", "size": -1}]}, "size of a dependency cannot be negative"),
    ({"labels": "x"}, "the manifest has a wrong type"),
    ({"app": APP | {"exec": "x"}}, "the manifest has a wrong type"),
]


@pytest.mark.parametrize(("changes", "text"), BROKEN, ids=[text[:40] for _, text in BROKEN])
def test_manifest_that_breaks_a_rule_is_refused_with_its_text(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadDataError) as caught:
        _parse(**changes)
    assert caught.value.message.startswith(text)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_manifest_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(BadDataError, match="not a JSON"):
        parse_manifest(data)


def test_manifest_over_the_limit_is_refused() -> None:
    with pytest.raises(BadDataError, match="larger than 1048576 bytes"):
        parse_manifest(b" " * (MANIFEST_MAX_BYTES + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": _labels(("arch", "whatever"))},
        {"labels": _labels(("os", "linux"), ("arch", "s390x"), ("version", "1"))},
        {"app": APP | {"exec": ["relative"]}},
        {"annotations": _labels(("created", "2020-02-29T12:00:00.5+02:00"), ("homepage", "https://x"))},
        {"dependencies": [{"imageName": "a", "imageID": ID, "labels": _labels(("version", "1")), "size": 5}]},
        {"labels": None, "app": None, "annotations": [], "unknown": {"x": 1}},
    ],
)
def test_manifest_that_keeps_the_rules_is_accepted(changes: dict[str, Any]) -> None:
    assert _parse(**changes).name == "example.com/app"


def test_canonical_manifest_has_the_formats_order_and_nothing_unknown() -> None:
    app = {"group": "1", "user": "0", "exec": ["/a"], "ports": [], "mountPoints": [{"path": "/d", "name": "d"}]}
    manifest = _parse(zzz=1, app=app, labels=[{"value": "1", "name": "version", "x": 1}], pathWhitelist=["/a"])
    assert canonical_json(manifest) == (
        b'{"acKind":"ImageManifest","acVersion":"0.8.11","name":"example.com/app","labels":[{"name":"version","value":"1"}],'
        b'"app":{"exec":["/a"],"user":"0","group":"1","mountPoints":[{"name":"d","path":"/d"}]},"pathWhitelist":["/a"]}'
    )


def test_canonical_manifest_parses_to_itself() -> None:
    manifest = _parse(
        app=APP
        | {
            "supplementaryGIDs": [5],
            "isolators": [{"name": "resource/memory", "value": {"limit": "1G", "empty": []}}],
            "environment": _labels(("A", "")),
            "ports": [{"name": "p", "protocol": "tcp", "port": 80, "socketActivated": True}],
            "eventHandlers": [{"name": "pre-start", "exec": ["/x"]}],
        }
    )
    again = parse_manifest(canonical_json(manifest))
    assert again == manifest
    assert canonical_json(again) == canonical_json(manifest)


def test_minimal_manifest_is_valid_and_says_its_labels() -> None:
    manifest = new_manifest("a/b", {"version": "1"})
    assert parse_manifest(canonical_json(manifest)).label_values == {"version": "1"}
    with pytest.raises(BadDataError, match="ACIdentifier"):
        new_manifest("A", {})


@pytest.mark.parametrize(
    ("text", "name", "labels"),
    [
        ("example.com/app", "example.com/app", {}),
        ("example.com/app:1.0", "example.com/app", {"version": "1.0"}),
        ("example.com/app:1.0,os=linux", "example.com/app", {"version": "1.0", "os": "linux"}),
        ("example.com/app,channel=a%2Bb+c", "example.com/app", {"channel": "a+b c"}),
        ("app,version=2", "app", {"version": "2"}),
    ],
)
def test_app_string_gives_name_and_labels(text: str, name: str, labels: dict[str, str]) -> None:
    app = parse_app_string(text)
    assert (app.name, app.labels) == (name, labels)
    assert parse_app_string(str(app).replace("+", "%2B").replace(" ", "+")) == app


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,x=1:2", "malformed app string - colon may appear only right after the app name"),
        ("a:1:2", "malformed app string - colon may appear at most once"),
        ("a:1,version=2", 'label version with multiple values ["1" "2"]'),
        ("a,x=1,x=2", 'label x with multiple values ["1" "2"]'),
        ("a,x", "malformed app string - has a label without a value: x"),
        ("A", CHARACTERS),
        ("", "ACIdentifier cannot be empty"),
        ("a,B=1", CHARACTERS),
    ],
)
def test_app_string_malformed_is_refused_with_its_text(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_app_string(text)
    assert caught.value.message == message
