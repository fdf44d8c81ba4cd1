"""The scalar types of an app container image's manifest: each is checked by one function that raises BadDataError.

The texts are the format's own: tools and people know them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from urllib.parse import urlsplit

from imaging.errors import BadDataError

_IDENTIFIER = re.compile(r"[a-z0-9]+([-._~/][a-z0-9]+)*\Z")
_NAME = re.compile(r"[a-z0-9]+([-][a-z0-9]+)*\Z")
_SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?\Z", re.ASCII)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII)
_HEX = re.compile(r"[0-9a-f]+\Z")

IMAGE_KIND = "ImageManifest"
POD_KIND = "PodManifest"

SHA512_HEX_CHARS = 128

VALUE_SHOWN_MAX_CHARS = 128
"""How much of a wrong value an error repeats."""

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "darwin": ("x86_64", "i386"),
    "freebsd": ("amd64", "i386", "arm"),
    "linux": (
        "amd64",
        "i386",
        "aarch64",
        "aarch64_be",
        "armv6l",
        "armv7l",
        "armv7b",
        "ppc64",
        "ppc64le",
        "s390x",
    ),
}
"""Operating system -> the architectures an image may name with it."""


def shown(text: str) -> str:
    """A value as an error shows it, in double quotes and not endless."""
    return '"' + text[:VALUE_SHOWN_MAX_CHARS].replace("\\", "\\\\").replace('"', '\\"') + '"'


def check_identifier(text: str) -> str:
    """An ACIdentifier: words of lower-case letters and digits, joined by one of ``-._~/``."""
    if not text:
        raise BadDataError("ACIdentifier cannot be empty")
    if re.search(r"[^a-z0-9\-._~/]", text):
        raise BadDataError('ACIdentifier must contain only lower case alphanumeric characters plus "-._~/"')
    if not _IDENTIFIER.match(text):
        raise BadDataError("ACIdentifier must start and end with only lower case alphanumeric characters")
    return text


def check_name(text: str) -> str:
    """An ACName: words of lower-case letters and digits, joined by ``-``."""
    if not text:
        raise BadDataError("ACName cannot be empty")
    if re.search(r"[^a-z0-9-]", text):
        raise BadDataError('ACName must contain only lower case alphanumeric characters plus "-"')
    if not _NAME.match(text):
        raise BadDataError("ACName must start and end with only lower case alphanumeric characters")
    return text


def check_kind(text: str) -> str:
    """The kind of manifest: an image's."""
    if text not in {"", IMAGE_KIND, POD_KIND}:
        raise BadDataError(f"bad ACKind: {text[:VALUE_SHOWN_MAX_CHARS]}")
    if text != IMAGE_KIND:
        raise BadDataError(f'missing or bad ACKind (must be "{IMAGE_KIND}")')
    return text


def check_version(text: str) -> str:
    """The format's version: a semantic version that is not zero."""
    if not text:
        raise BadDataError("acVersion must be set")
    match = _SEMVER.match(text)
    if match is None:
        raise BadDataError("SemVer is bad")
    if match.groups() == ("0", "0", "0", None, None):
        raise BadDataError("acVersion must be set")
    return text


def check_date(text: str) -> str:
    """A moment as RFC 3339 writes it."""
    complaint = f"bad Date: {text[:VALUE_SHOWN_MAX_CHARS]}"
    if not _RFC3339.match(text):
        raise BadDataError(complaint)
    try:
        datetime.fromisoformat(text.upper())
    except ValueError as err:
        raise BadDataError(complaint) from err
    return text


def check_url(text: str) -> str:
    """A web address."""
    try:
        scheme = urlsplit(text).scheme
    except ValueError as err:
        raise BadDataError(f"bad URL: {text[:VALUE_SHOWN_MAX_CHARS]}") from err
    if scheme not in {"http", "https"}:
        raise BadDataError("bad URL scheme, must be http/https")
    return text


def check_image_id(text: str) -> str:
    """An image id: ``sha512-`` and 128 hex digits."""
    kind, dash, value = text.partition("-")
    if not dash or not value:
        raise BadDataError("badly formatted hash string")
    if kind != "sha512":
        raise BadDataError(f"unrecognized hash type: {kind[:VALUE_SHOWN_MAX_CHARS]}")
    if len(value) != SHA512_HEX_CHARS or not _HEX.match(value):
        raise BadDataError("badly formatted hash string")
    return text


def check_platform(labels: Mapping[str, str]) -> None:
    """The labels ``os`` and ``arch`` must be a known pair. Without ``os`` nothing is known about ``arch``."""
    system = labels.get("os")
    if system is None:
        return
    if system not in ARCHITECTURES:
        raise BadDataError(f"bad os {shown(system)} (must be one of: [{' '.join(sorted(ARCHITECTURES))}])")
    arch, known = labels.get("arch"), ARCHITECTURES[system]
    if arch is not None and arch not in known:
        raise BadDataError(f"bad arch {shown(arch)} for {system} (must be one of: [{' '.join(known)}])")


def check_labels(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Labels: each name once, and none of them ``name``."""
    labels: dict[str, str] = {}
    for name, value in pairs:
        check_identifier(name)
        if name == "name":
            raise BadDataError('invalid label name: "name"')
        if name in labels:
            raise BadDataError(f"duplicate labels of name {shown(name)}")
        labels[name] = value
    check_platform(labels)
    return labels
