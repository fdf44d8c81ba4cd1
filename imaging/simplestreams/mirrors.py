"""Mirrors: other places with the same products file, found by content id and cloud. Pure functions of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from imaging.errors import NotFoundError
from imaging.simplestreams.model import (
    CloudSpec,
    MirrorInfo,
    MirrorReference,
    MirrorReferences,
    Mirrors,
    check_format,
    decode_document,
)
from imaging.simplestreams.paths import MIRRORS_FORMAT

M = TypeVar("M", MirrorReference, MirrorInfo)


def parse_references(data: bytes, url: str) -> MirrorReferences:
    """A site's mirror references; BadDataError."""
    return decode_document(data, MirrorReferences, f'cannot unmarshal JSON mirror metadata at URL "{url}"')


def parse_mirrors(data: bytes, url: str) -> Mirrors:
    """A mirrors document; BadDataError."""
    mirrors = decode_document(data, Mirrors, f'cannot unmarshal JSON mirror metadata at URL "{url}"')
    check_format(mirrors.format, MIRRORS_FORMAT, url)
    return mirrors


def find_reference(references: MirrorReferences, content_id: str, datatype: str, cloud: CloudSpec) -> MirrorReference:
    """The reference for a content id; NotFoundError."""
    every = [one for one in (references.mirrors or {}).get(content_id) or () if one is not None]
    fitting = [one for one in every if one.datatype == datatype]
    if not fitting:
        raise NotFoundError(f'mirror data for "{content_id}" not found')
    return _for_cloud(fitting, cloud, content_id)


def find_mirror(mirrors: Mirrors, content_id: str, cloud: CloudSpec) -> MirrorInfo:
    """The mirror for a content id; NotFoundError."""
    every = [one for one in (mirrors.mirrors or {}).get(content_id) or () if one is not None]
    if not every:
        raise NotFoundError(f'mirror info for "{content_id}" not found')
    return _for_cloud(every, cloud, content_id)


def _for_cloud(candidates: Sequence[M], cloud: CloudSpec, content_id: str) -> M:
    """The one that names the cloud, else the default: the one that names none."""
    for one in candidates:
        if cloud.is_empty or any(named is not None and named.matches(cloud) for named in one.clouds or ()):
            return one
    for one in candidates:
        if not one.clouds:
            return one
    raise NotFoundError(f'mirror data for "{content_id}" with cloud {cloud} not found')
