"""The firewall: what passes is unchanged, nothing dangerous passes whole, and each rule says its name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from imaging.errors import BadDataError, ConflictError, MistifyError, TooLargeError, UnsupportedError
from imaging.sendstream import microzap
from imaging.sendstream.records import (
    MAGIC,
    TO_THE_END,
    Begin,
    Free,
    FreeObjects,
    Object,
    Record,
    Redact,
    Spill,
    Write,
    WriteEmbedded,
)
from imaging.sendstream.rules import Limits
from imaging.sendstream.validator import Policy, StreamValidator
from imaging.sendstream.volume import VolumeState
from imaging.sendstream.writer import StreamWriter
from tests.codec import samples

GUID = 100
BASE = VolumeState(50, 0, 65536, 8192, 0, "a/b@1")
GOOD = [name for name in samples.names(expect="ok") if name != "plain-resume-t"]


def obj(number: int, kind: int, size: int, **more: int) -> Object:
    return Object(number, kind, 0, size, 0, 0, 0, 1, 0, 0, GUID, 0, 0, 0, 0)._replace(**more)


def write(number: int, kind: int, offset: int, size: int, **more: Any) -> Write:
    plain = Write(number, kind, offset, size, GUID, 2, 0, 0, bytes(32), 0, 0, bytes(8), bytes(12), bytes(16))
    return plain._replace(**more)


Step = tuple[Record, bytes]
ANNOUNCE: Step = (obj(1, 23, 8192), b"")
BLOCK: Step = (write(1, 23, 0, 8192), b"x" * 8192)
PROPERTIES: Step = (obj(2, 24, 512), b"")
ZAP: Step = (write(2, 24, 0, 512), microzap.build(65536, GUID))
SOUND = [ANNOUNCE, BLOCK, PROPERTIES, ZAP]


def stream(steps: list[Step], *, fromguid: int = 0, features: int = 0, end: int = GUID, **begin: object) -> bytes:
    head = Begin(0, MAGIC, 1 | features << 2, 7, 3, 12, GUID, fromguid, b"a/b@c".ljust(256, b"\0"))._replace(**begin)  # type: ignore[arg-type]
    writer = StreamWriter()
    return writer.begin(head) + b"".join(writer.record(record, payload) for record, payload in steps) + writer.end(end)


def check(data: bytes, base: VolumeState | None = None, policy: Policy | None = None) -> bytes:
    validator = StreamValidator(base, policy or Policy())
    return validator.feed(data) + validator.finish()


@pytest.mark.parametrize("name", GOOD)
def test_good_sample_passes_unchanged_in_any_split(name: str) -> None:
    data = samples.load(name)
    validator, passed = StreamValidator(), b""
    rng, start = random.Random(name), 0
    while start < len(data):
        piece = data[start : start + rng.randint(1, 1 << rng.randint(1, 20))]
        start += len(piece)
        passed += validator.feed(piece)
    assert len(passed) < len(data), "END must be held back"
    assert passed + validator.finish() == data


def pass_through(validator: StreamValidator, data: bytes, passed: bytearray) -> None:
    for start in range(0, len(data), 1000):
        passed += validator.feed(data[start : start + 1000])
    passed += validator.finish()


@pytest.mark.parametrize("name", [*samples.names(expect="error"), *samples.names(expect="verify ok")])
def test_bad_sample_never_passes_with_its_end(name: str) -> None:
    entry = samples.manifest()[name]
    data, passed = samples.load(name), bytearray()
    base = VolumeState(256, 0, 16 << 20, 8192, 0, "m/n@s1") if entry.get("base") else None
    with pytest.raises(MistifyError):
        pass_through(StreamValidator(base), data, passed)
    assert data.startswith(passed)
    assert len(passed) <= max(0, len(data) - 312)


def test_sound_crafted_streams_pass() -> None:
    for data in (stream(SOUND), stream([BLOCK], fromguid=50), stream([], fromguid=50)):
        assert check(data) == data
    assert check(stream([ANNOUNCE, BLOCK], fromguid=50), BASE)


BROKEN: list[tuple[str, Callable[[], bytes], str]] = [
    ("no data object", lambda: stream([]), "rule objects"),
    ("no properties", lambda: stream(SOUND[:2]), "rule size"),
    ("no size value", lambda: stream(SOUND[:3]), "rule size"),
    ("size 0", lambda: stream([*SOUND[:3], (ZAP[0], microzap.build(0, 1))]), "rule size"),
    ("odd size", lambda: stream([*SOUND[:3], (ZAP[0], microzap.build(1000, 1))]), "rule size"),
    (
        "data past the size",
        lambda: stream([ANNOUNCE, (write(1, 23, 65536, 8192), bytes(8192)), PROPERTIES, ZAP]),
        "rule size",
    ),
    ("object 3", lambda: stream([ANNOUNCE, (obj(3, 23, 512), b"")]), "rule objects"),
    ("wrong type", lambda: stream([(obj(1, 19, 8192), b"")]), "rule objects"),
    ("object twice", lambda: stream([ANNOUNCE, ANNOUNCE]), "rule objects"),
    ("bonus", lambda: stream([(obj(1, 23, 8192, bonus_bytes=8), bytes(8))]), "rule objects"),
    ("attributes", lambda: stream([(obj(1, 23, 8192, levels=3), b"")]), "rule objects"),
    ("block size 0", lambda: stream([(obj(1, 23, 0), b"")]), "rule block size"),
    ("block size 256", lambda: stream([(obj(1, 23, 256), b"")]), "rule block size"),
    ("block size 24576", lambda: stream([(obj(1, 23, 24576), b"")]), "rule block size"),
    ("large without flag", lambda: stream([(obj(1, 23, 1 << 18), b"")]), "LARGE_BLOCKS"),
    ("frees object 1", lambda: stream([ANNOUNCE, (FreeObjects(0, 5, GUID), b"")]), "rule free objects"),
    ("frees object 2", lambda: stream([*SOUND, (FreeObjects(2, 1, GUID), b"")]), "frees the volume's properties"),
    ("frees all objects", lambda: stream([*SOUND, (FreeObjects(0, TO_THE_END, GUID), b"")]), "rule free objects"),
    ("frees the size", lambda: stream([*SOUND, (Free(2, 0, 512, GUID), b"")]), "rule free"),
    ("free overflows", lambda: stream([*SOUND, (Free(1, TO_THE_END, 512, GUID), b"")]), "rule free"),
    ("free of object 9", lambda: stream([ANNOUNCE, (Free(9, 0, 512, GUID), b"")]), "rule objects"),
    ("not announced", lambda: stream([BLOCK]), "not announced"),
    ("writes descend", lambda: stream([ANNOUNCE, (write(1, 23, 8192, 8192), bytes(8192)), BLOCK]), "out of order"),
    ("write twice", lambda: stream([ANNOUNCE, BLOCK, BLOCK]), "out of order"),
    ("half a block", lambda: stream([ANNOUNCE, (write(1, 23, 0, 4096), bytes(4096))]), "rule blocks"),
    ("misaligned", lambda: stream([ANNOUNCE, (write(1, 23, 512, 8192), bytes(8192))]), "rule blocks"),
    ("write of a wrong type", lambda: stream([ANNOUNCE, (write(1, 24, 0, 8192), bytes(8192))]), "rule blocks"),
    ("raw write", lambda: stream([ANNOUNCE, (write(1, 23, 0, 8192, flags=1), bytes(8192))]), "rule blocks"),
    (
        "bad compressed size",
        lambda: stream([ANNOUNCE, (write(1, 23, 0, 8192, compression=15, compressed_bytes=8), bytes(8))]),
        "rule blocks",
    ),
    (
        "bad payload",
        lambda: stream(
            [ANNOUNCE, (write(1, 23, 0, 8192, compression=16, compressed_bytes=512), b"\0\0\1\0" + bytes(508))]
        ),
        "zstd",
    ),
    ("no microzap", lambda: stream([*SOUND[:3], (ZAP[0], bytes(512))]), "not a microzap"),
    ("properties elsewhere", lambda: stream([*SOUND[:3], (write(2, 24, 512, 512), ZAP[1])]), "rule blocks"),
    (
        "spill",
        lambda: stream([*SOUND, (Spill(1, 512, GUID, 0, 0, 0, bytes(8), bytes(12), bytes(16), 44), bytes(512))]),
        "SPILL record does not belong",
    ),
    ("redact record", lambda: stream([*SOUND, (Redact(1, 0, 512, GUID), b"")]), "REDACT record does not belong"),
    (
        "embedded too large",
        lambda: stream([ANNOUNCE, (WriteEmbedded(1, 0, 8192, GUID, 15, 0, 8192, 120), bytes(120))]),
        "rule blocks",
    ),
    (
        "embedded of another type",
        lambda: stream([ANNOUNCE, (WriteEmbedded(1, 0, 8192, GUID, 15, 1, 8192, 16), bytes(16))]),
        "rule blocks",
    ),
    ("foreign END", lambda: stream(SOUND, end=5), "rule end"),
    ("no snapshot name", lambda: stream(SOUND, name=b"a/b".ljust(256, b"\0")), "rule begin"),
    ("name not ended", lambda: stream(SOUND, name=b"a@" + b"b" * 254), "rule begin"),
    ("guid 0", lambda: stream(SOUND, toguid=0, end=0), "rule begin"),
    ("kind 4", lambda: stream(SOUND, kind=4), "rule begin"),
    ("kind filesystem", lambda: stream(SOUND, kind=2), "rule kind"),
]


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_rule_is_refused_by_its_name(data: Callable[[], bytes], words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        check(data())


@pytest.mark.parametrize("where", [r"record 2 \(WRITE\) at byte 624"])
def test_refusal_names_record_and_place(where: str) -> None:
    with pytest.raises(BadDataError, match=where):
        check(stream([ANNOUNCE, (write(1, 23, 0, 512), bytes(512))]))


@pytest.mark.parametrize(
    ("bit", "words"),
    [
        (0, "deduplicated"),
        (21, "redacted"),
        (24, "encrypted"),
        (20, "interrupted"),
        (18, "unknown feature flag bit 18"),
        (60, "unknown feature flag bit 60"),
    ],
)
def test_feature_that_cannot_be_applied_is_refused_by_name(bit: int, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        check(stream(SOUND, features=1 << bit))


def test_limits_are_kept() -> None:
    with pytest.raises(TooLargeError, match="volume size 65536 is above 4096"):
        check(stream([ANNOUNCE, *SOUND[2:]]), policy=Policy(Limits(volume_size_max_bytes=4096)))
    with pytest.raises(TooLargeError, match="block size 8192 is above 4096"):
        check(stream(SOUND), policy=Policy(Limits(block_max_bytes=4096)))
    huge = microzap.build(1 << 63, 1)
    with pytest.raises(TooLargeError):
        check(stream([*SOUND[:3], (ZAP[0], huge)]))


def test_increment_is_held_against_its_base() -> None:
    with pytest.raises(ConflictError, match="guid 51, not 50"):
        check(stream([BLOCK], fromguid=51), BASE)
    with pytest.raises(ConflictError, match="needs a volume"):
        check(stream([BLOCK], fromguid=50), policy=Policy(base_known=True))
    with pytest.raises(BadDataError, match="differs from the base's 8192"):
        check(stream([(obj(1, 23, 4096), b"")], fromguid=50), BASE)
    with pytest.raises(BadDataError, match=r"\[rule size\]"):
        check(stream([(write(1, 23, 65536, 8192), bytes(8192))], fromguid=50), BASE)


def test_package_of_streams_that_do_not_follow_each_other_is_refused() -> None:
    data = samples.load("plain-I-s1-s3-package")
    found = samples.frames(data)
    begins = [frame.offset for frame in found if frame.type == 0]
    swapped = (
        data[: begins[1]] + data[begins[2] : found[-1].offset] + data[begins[1] : begins[2]] + data[found[-1].offset :]
    )
    with pytest.raises(ConflictError, match="needs a volume with guid 3487082587457790019"):
        check(swapped, VolumeState(446543199311072499, 0, 20 << 20, 8192, 0, "x@y"))


def test_summaries_say_what_passed() -> None:
    validator = StreamValidator()
    validator.verify(samples.load("plain-inc-s1-s2"))
    validator.finish()
    (summary,) = validator.summaries
    assert (summary.kind, summary.volsize_bytes, summary.records) == ("volume", 20971520, 23)
    assert (summary.guid, summary.fromguid) == (446543199311072499, 3487082587457790019)
