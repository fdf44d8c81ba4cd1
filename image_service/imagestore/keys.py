"""Keys: ``sha512-`` and the first half of the sha512 of an image's unpacked archive."""

from __future__ import annotations

import re

from imaging.digests import Digest

PREFIX = "sha512-"
KEY_HEX_CHARS = 64
"""Half of the digest: 256 bits tell images apart, and a path component stays short. The index keeps all of it."""

KEY_CHARS = len(PREFIX) + KEY_HEX_CHARS
KEY_MIN_CHARS = len(PREFIX) + 2
"""The shortest reference."""

_KEY = re.compile(r"sha512-[0-9a-f]{64}\Z")


def hash_to_key(digest: Digest) -> str:
    """HashToKey: the key of an image whose unpacked archive has this sha512."""
    return f"{PREFIX}{digest.hex[:KEY_HEX_CHARS]}"


def hash_to_image_id(digest: Digest) -> str:
    """The image id, with the whole digest."""
    return f"{PREFIX}{digest.hex}"


def is_key(text: str) -> bool:
    """Whether this is a whole key."""
    return _KEY.match(text) is not None
