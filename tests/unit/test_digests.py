"""Digests: what is one, what is none, and that streaming gives what hashlib gives."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.digests import Digest, MultiHasher
from imaging.errors import InvalidArgumentError

HEX = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "md5", "sha1"])
def test_parse_and_format_round_trip(algorithm: str) -> None:
    digest = Digest.of(b"data", algorithm)
    assert Digest.parse(str(digest)) == digest
    assert str(digest) == f"{algorithm}:{hashlib.new(algorithm, b'data').hexdigest()}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        f"sha256:{HEX[:-1]}",
        f"sha256:{HEX}0",
        f"sha256:{HEX.upper()}",
        f"SHA256:{HEX}",
        f"sha256:{HEX}\n",
        f" sha256:{HEX}",
        f"sha256:{'g' * 64}",
        f"sha256:{'٣' * 64}",
        f"sha512:{HEX}",
        f"sha257:{HEX}",
        f"sha256:../../{HEX[6:]}",
    ],
)
def test_parse_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a digest"):
        Digest.parse(text)


@settings(deadline=None)
@given(st.text(max_size=200))
def test_parse_accepts_only_what_it_would_write(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except InvalidArgumentError:
        return
    assert str(digest) == text


def test_parse_error_quotes_at_most_a_line_of_the_text() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Digest.parse("x" * 1_000_000)
    assert len(caught.value.message) < 300


def test_matches_needs_the_same_algorithm_and_value() -> None:
    assert Digest.of(b"a").matches(Digest.of(b"a"))
    assert not Digest.of(b"a").matches(Digest.of(b"b"))
    assert not Digest.of(b"a").matches(Digest.of(b"a", "sha512"))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=20))
def test_multi_hasher_any_split_gives_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    hasher = MultiHasher(("sha256", "md5"))
    for piece in pieces:
        hasher.update(memoryview(piece))
    whole = b"".join(pieces)
    assert hasher.size_bytes == len(whole)
    assert hasher.digest() == Digest.of(whole)
    assert hasher.digest("md5") == Digest.of(whole, "md5")
