"""nvlists: both encodings, and hostile input."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import BadDataError, InvalidArgumentError, UnsupportedError
from imaging.sendstream import nvlist
from imaging.sendstream.package import packaged_datasets, resume_position
from imaging.sendstream.records import RecordType
from imaging.sendstream.resume import ResumeToken
from tests.codec import samples

numbers = st.integers(0, (1 << 64) - 1)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
leaves = st.one_of(numbers, names, st.just(True), st.lists(numbers, min_size=1, max_size=5), st.binary(max_size=20))
lists = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda inner: st.dictionaries(names, st.one_of(leaves, inner), max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(lists)
def test_encode_then_decode_is_the_identity(values: nvlist.NvList) -> None:
    assert nvlist.decode(nvlist.encode_xdr(values)) == values
    assert nvlist.decode(nvlist.encode_native(values)) == values


PAYLOADS = [
    "b512-p",
    "gen-props-package",
    "pkg-no-final-end",
    "fs-R-package",
    "plain-resume-t",
    "plain-redacted",
    "enc-w-raw",
]


def payload(name: str) -> bytes:
    data = samples.load(name)
    return data[312 : 312 + int.from_bytes(data[4:8], "little")]


@pytest.mark.parametrize("name", ["b512-p", "gen-props-package", "pkg-no-final-end", "fs-R-package"])
def test_encode_what_userland_wrote_gives_the_same_bytes(name: str) -> None:
    assert nvlist.encode_xdr(nvlist.decode(payload(name))) == payload(name)


@pytest.mark.parametrize("name", ["plain-resume-t", "plain-redacted"])
def test_encode_what_the_kernel_wrote_gives_the_same_bytes(name: str) -> None:
    assert nvlist.encode_native(nvlist.decode(payload(name))) == payload(name)


def test_decode_kernel_list_with_nested_list_and_byte_arrays() -> None:
    keys = nvlist.decode(payload("enc-w-raw"))["crypt_keydata"]
    assert isinstance(keys, dict)
    assert keys["DSL_CRYPTO_SUITE"] == 8
    assert isinstance(keys["DSL_CRYPTO_MASTER_KEY_1"], bytes)


def test_decode_package_header_lists_the_datasets() -> None:
    first, second = packaged_datasets(payload("b512-p"))[0], packaged_datasets(payload("fs-R-package"))[0]
    assert (first.name, second.name) == ("mistify/b512", "mistify/fs")
    assert first.snapshots == {"s1": 6395683918249932246}
    assert packaged_datasets(b"") == []


@pytest.mark.parametrize("name", PAYLOADS)
def test_decode_damaged_list_raises_bad_data_or_gives_a_list(name: str) -> None:
    data = payload(name)
    rng = random.Random(name)
    for _ in range(1500):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] = rng.randrange(256)
        decode_safely(bytes(damaged))
    for size in range(len(data)):
        decode_safely(data[:size])


def decode_safely(data: bytes) -> None:
    """Only our own errors may leave the decoder, and what it gives is a list."""
    try:
        found = nvlist.decode(data)
    except (BadDataError, UnsupportedError):
        return
    assert isinstance(found, dict)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"\0\1\0\0", b"\1\1\0\0"]), st.binary(max_size=300))
def test_decode_garbage_raises_bad_data(start: bytes, data: bytes) -> None:
    decode_safely(start + data)


@pytest.mark.parametrize("encode", [nvlist.encode_xdr, nvlist.encode_native])
def test_decode_too_deep_nesting_is_refused(encode: Callable[[nvlist.NvList], bytes]) -> None:
    values: nvlist.NvList = {}
    for _ in range(nvlist.NESTING_MAX):
        values = {"a": values}
    assert nvlist.decode(encode(values)) == values
    with pytest.raises(BadDataError, match="nested deeper"):
        nvlist.decode(encode({"a": values}))


def test_decode_array_that_claims_more_than_there_is_allocates_nothing() -> None:
    body = struct.pack(">I4sII", 1, b"a\0\0\0", 16, 1 << 31) + struct.pack(">I", 1 << 31)
    with pytest.raises(BadDataError):
        nvlist.decode(b"\1\1\0\0" + struct.pack(">iI", 0, 1) + struct.pack(">II", len(body) + 8, 64) + body)


def test_decode_too_many_pairs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvlist, "PAIRS_MAX", 10)
    with pytest.raises(BadDataError, match="more than 10 pairs"):
        nvlist.decode(nvlist.encode_xdr({str(index): index for index in range(11)}))


def test_decode_list_above_the_size_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvlist, "SIZE_MAX_BYTES", 100)
    with pytest.raises(BadDataError, match="larger than 100"):
        nvlist.decode(bytes(101))


def test_encode_what_no_list_can_hold_is_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        nvlist.encode_xdr({"a": ["text"]})
    with pytest.raises(InvalidArgumentError):
        nvlist.encode_native({"a": 1.5})  # type: ignore[dict-item]


def test_resume_position_is_read_from_a_real_stream() -> None:
    assert resume_position(payload("plain-resume-t")) == (1, 1073152)
    with pytest.raises(BadDataError, match="does not say"):
        resume_position(nvlist.encode_native({"resume_object": 1}))


@settings(deadline=None)
@given(st.tuples(*[numbers] * 5), st.sampled_from(["a/b@c", "pool/ü@s"]))
def test_token_survives_its_text(values: tuple[int, ...], name: str) -> None:
    token = ResumeToken(values[0], values[1], name, values[2], values[3], values[4], 1 << 19 | 1 << 22)
    assert ResumeToken.parse(token.encode()) == token


def test_token_that_is_damaged_is_refused() -> None:
    text = ResumeToken(1, 2, "a/b@c", 1, 8192, 100).encode()
    for index in range(len(text)):
        other = "0" if text[index] != "0" else "1"
        damaged = text[:index] + other + text[index + 1 :]
        try:
            found = ResumeToken.parse(damaged)
        except BadDataError:
            continue
        # the checksum ignores what follows the last whole word; zlib's own checksum covers all but its own length
        assert found == ResumeToken.parse(text)
    with pytest.raises(BadDataError, match="not a resume token"):
        ResumeToken.parse("1-" + "a" * 100_000)


def test_record_types_of_payload_owners_are_begin() -> None:
    assert all(samples.load(name)[0] == RecordType.BEGIN for name in PAYLOADS)
