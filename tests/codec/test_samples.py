"""Every sample gives what its manifest entry says."""

from __future__ import annotations

import hashlib
import io
import os

import pytest

from imaging.errors import BadDataError, MistifyError, UnsupportedError
from imaging.sendstream.validator import Policy, StreamValidator
from imaging.sendstream.volume import apply_stream, hash_image
from tests.codec import samples

RECEIVED_WITHOUT_L = {"big1M-noL", "big1M-inc-noL"}
"""Their blocks arrive as 128 KiB writes, so that is the block size of what is received."""
CONTINUES = "plain-resume-t"
"""Applies to a part of another stream only: test_resume has it."""


def test_manifest_is_there() -> None:
    assert samples.manifest(), f"no MANIFEST.json in {samples.directory()}: set MISTIFY_SAMPLES"
    assert len(samples.names()) > 80


@pytest.mark.parametrize("name", samples.names())
def test_sample_unpacked_is_the_stated_stream(name: str) -> None:
    assert hashlib.sha256(samples.load(name)).hexdigest() == samples.manifest()[name]["sha256_stream"]


@pytest.mark.parametrize("name", [name for name in samples.names(expect="ok") if name != CONTINUES])
def test_apply_good_sample_gives_the_stated_volume(name: str) -> None:
    entry = samples.manifest()[name]
    with samples.scratch() as fd:
        state = samples.apply_chain(fd, [*(entry.get("base") or []), name])
        assert state is not None
        result = entry.get("result") or {}
        found = {
            "volsize": state.volsize_bytes,
            "volblocksize": 131072 if name in RECEIVED_WITHOUT_L else state.volblocksize_bytes,
            "guid": str(state.guid),
            "creation": state.creation_s,
            "sha256": hash_image(fd, state.volsize_bytes).hex if "sha256" in result else None,
        }
        expected = dict(result)
        if name in RECEIVED_WITHOUT_L:
            assert state.volblocksize_bytes == 131072
            expected["volblocksize"] = 131072
        assert {key: found[key] for key in expected} == expected
        assert os.fstat(fd).st_size == state.volsize_bytes


WORDS = {
    "truncated": "truncated",
    "checksum mismatch": "checksum mismatch",
    "trailing data": "data after the end",
    "package header checksum": "checksum mismatch",
    "nonzero unused bytes": "must be zero",
    "no volume size": "no volume size",
    "not a microzap": "not a microzap",
    "write to an object": "not announced",
    "object 2 before": "object 2 before object 1",
    "lz4": "lz4",
    "unknown feature flag": "unknown feature flag",
    "block size not": "power of two",
    "kind filesystem": "filesystem",
    "block size differs": "differs from the base",
    "frees the volume": "frees the volume's properties",
}
"""How the manifest words an error, and how we do."""


@pytest.mark.parametrize("name", samples.names(expect="error"))
def test_apply_bad_sample_is_refused_with_the_stated_reason(name: str) -> None:
    entry = samples.manifest()[name]
    reason = entry["expect"].removeprefix("error: ")
    words = next(ours for theirs, ours in WORDS.items() if reason.startswith(theirs))
    with samples.scratch() as fd:
        state = samples.apply_chain(fd, entry.get("base") or [])
        with pytest.raises((BadDataError, UnsupportedError), match=words):
            apply_stream(io.BytesIO(samples.load(name)), fd, state)


@pytest.mark.parametrize("name", samples.names(expect="verify ok"))
def test_apply_opaque_sample_is_refused_by_name_but_verifies(name: str) -> None:
    with (
        samples.scratch() as fd,
        pytest.raises(MistifyError, match=r"encrypted|redacted|filesystem|no stream of the volume"),
    ):
        apply_stream(io.BytesIO(samples.load(name)), fd)
    validator = StreamValidator(policy=Policy(opaque=True))
    data = samples.load(name)
    assert validator.feed(data) + validator.finish() == data
    assert all(summary.not_applicable for summary in validator.summaries)


def test_apply_half_block_writes_only_where_asked_for() -> None:
    """Released kernels take them, debug builds stop: refused unless the caller knows better."""
    data = samples.load("bad-halfwrites")
    with samples.scratch() as fd, pytest.raises(BadDataError, match="not one block"):
        apply_stream(io.BytesIO(data), fd)
    with samples.scratch() as fd:
        state = apply_stream(io.BytesIO(data), fd, whole_blocks=False)
        assert hash_image(fd, state.volsize_bytes).hex == hashlib.sha256(samples.raw_image()).hexdigest()


def test_apply_size_that_is_no_multiple_of_the_block_size_is_taken() -> None:
    with samples.scratch() as fd:
        state = samples.apply_chain(fd, ["bad-unaligned_volsize"])
        assert state is not None
        assert os.fstat(fd).st_size == state.volsize_bytes == 16775680


def test_apply_sparse_sample_takes_no_more_space_than_its_data() -> None:
    with samples.scratch() as fd:
        samples.apply_chain(fd, ["far6G-full"])
        assert os.fstat(fd).st_blocks * 512 < 4 << 20
