"""Images of every length arrive whole, through the page cache and past it, however their source gives its bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest

from image_service.imagestore import spool
from image_service.imagestore.store import ImageStore
from imaging.errors import NoSpaceError
from imaging.files import write_all
from tests.imagestore.images import aci, files, key_of, read

PIECE = spool.PIECE_BYTES
SIZES = (1, PIECE - 2048, 2 * PIECE, 3 * PIECE - 3072, 3 * PIECE, 4 * PIECE + 1, 5 * PIECE + 4097)


@pytest.fixture(autouse=True)
def _early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large begins at two pieces."""
    monkeypatch.setattr(spool, "DIRECT_FROM_BYTES", 2 * PIECE)


class _Dribble:
    """A source that gives what it likes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._chance = io.BytesIO(data), random.Random(3)

    def read(self, size: int = -1, /) -> bytes:
        return self._data.read(min(size, self._chance.randrange(1, 300_000)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["file", "memory", "dribble", "gzip"])
def test_import_of_any_length_and_source_is_whole(store: ImageStore, tmp_path: Path, size: int, kind: str) -> None:
    image = aci(content=random.Random(size).randbytes(size))
    with contextlib.ExitStack() as stack:
        source: Any = io.BytesIO(image)
        if kind == "file":
            (tmp_path / "image").write_bytes(image)
            source = stack.enter_context((tmp_path / "image").open("rb", buffering=0))
        elif kind == "gzip":
            source = io.BytesIO(gzip.compress(image, 1))
        elif kind == "dribble":
            source = _Dribble(image)
        assert store.write_aci(source) == key_of(image)
    assert read(store, key_of(image), verify=True) == image


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_import_where_nothing_can_be_written_past_the_cache_is_whole(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def strict(fd: int, data: memoryview, offset_bytes: int) -> None:
        if _is_direct(fd):
            refused.append(offset_bytes)
            raise OSError(errno.EINVAL, "Invalid argument")
        write_all(fd, data, offset_bytes)

    monkeypatch.setattr(spool, "write_all", strict)
    image = aci(content=random.Random(1).randbytes(4 * PIECE))
    assert store.write_aci(io.BytesIO(image)) == key_of(image)
    assert refused in ([2 * PIECE, 3 * PIECE], []), "nothing on a file system that refuses the wish already"
    assert read(store, key_of(image), verify=True) == image


def test_import_of_a_large_image_onto_a_full_disk_leaves_nothing(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset_bytes: int) -> None:
        if offset_bytes >= 3 * PIECE:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(fd, data, offset_bytes)

    monkeypatch.setattr(spool, "write_all", full)
    with pytest.raises(NoSpaceError, match="error copying image"):
        store.write_aci(io.BytesIO(aci(content=bytes(5 * PIECE))))
    assert files(store) == set()
