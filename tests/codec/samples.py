"""The real streams the codec is tested with. MISTIFY_SAMPLES says where they are; without them these tests fail."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imaging.sendstream.reader import Frame, StreamReader
from imaging.sendstream.volume import VolumeState, apply_stream

_CHECKOUT = Path(__file__).resolve().parents[2]


def directory() -> Path:
    root = Path(os.environ.get("MISTIFY_SAMPLES") or _CHECKOUT.parent / "shared" / "samples")
    found = root / "zfs-streams"
    return found if found.is_dir() else root


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    path = directory() / "MANIFEST.json"
    if not path.exists():
        return {}  # test_manifest_is_there fails and says so
    samples: dict[str, dict[str, Any]] = json.loads(path.read_text())["samples"]
    return samples


def names(*, expect: str = "") -> list[str]:
    """Streams (not the raw image) whose expectation starts so."""
    return [
        name
        for name, entry in manifest().items()
        if str(entry.get("expect", "?")).startswith(expect) and "expect" in entry
    ]


@functools.lru_cache(maxsize=16)
def load(name: str) -> bytes:
    return gzip.decompress((directory() / manifest()[name]["file"]).read_bytes())


def raw_image() -> bytes:
    return gzip.decompress((directory() / "image-a.raw.gz").read_bytes())


def frames(data: bytes) -> list[Frame]:
    reader = StreamReader()
    found = reader.feed(data)
    reader.finish()
    return found


def plain(found: list[Frame]) -> list[tuple[int, bytes, bytes, int, int]]:
    """Frames as values that outlive the buffers they came from."""
    return [(f.type, bytes(f.header), bytes(f.payload), f.offset, f.number) for f in found]


@contextmanager
def scratch() -> Iterator[int]:
    """A descriptor of an empty file."""
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def apply_chain(fd: int, chain: list[str], state: VolumeState | None = None) -> VolumeState | None:
    for name in chain:
        state = apply_stream(io.BytesIO(load(name)), fd, state)
    return state
