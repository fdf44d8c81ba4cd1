"""Putting stored objects together inside the service."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from imaging.blobs.s3_bucket import S3Bucket, StoredObject
from imaging.errors import MistifyError, NotFoundError, UnavailableError

COPY_THREADS = 4
"""Parts copied at a time: the service works, we wait."""

COPY_MAX_BYTES = 1 << 30
"""Copied by one request. S3 takes 5 GiB; less keeps each request below the read time-out."""


@dataclass(frozen=True, slots=True)
class Source:
    """A stored object of one exact version, or ``size_bytes`` of it from ``offset_bytes``."""

    key: str
    etag: str
    offset_bytes: int = 0
    size_bytes: int | None = None


def assemble(bucket: S3Bucket, target: str, sources: Sequence[Source]) -> None:
    """Make ``target`` of the sources in their order; ConflictError if one of them is not what it was."""
    if len(sources) == 1 and sources[0].size_bytes is None:
        bucket.copy(sources[0].key, target, etag=sources[0].etag)
        return
    upload = bucket.begin_upload(target)
    try:
        with ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="assemble") as pool:
            etags = list(pool.map(lambda item: _copy_part(bucket, target, upload, *item), enumerate(sources, 1)))
        _complete(bucket, target, upload, etags)
    except BaseException:
        with suppress(MistifyError):  # else it is collected
            bucket.abort_upload(target, upload)
        raise


def copy_object(bucket: S3Bucket, source: StoredObject, target: str) -> None:
    """Copy an object of any size."""
    if source.size_bytes <= COPY_MAX_BYTES:
        bucket.copy(source.key, target, etag=source.etag)
        return
    offsets = range(0, source.size_bytes, COPY_MAX_BYTES)
    pieces = [
        Source(source.key, source.etag, offset, min(COPY_MAX_BYTES, source.size_bytes - offset)) for offset in offsets
    ]
    assemble(bucket, target, pieces)


def _copy_part(bucket: S3Bucket, target: str, upload: str, number: int, source: Source) -> str:
    end = source.offset_bytes + source.size_bytes - 1 if source.size_bytes is not None else None
    span = f"bytes={source.offset_bytes}-{end}" if end is not None else None
    return bucket.copy_part(target, upload, number, source.key, etag=source.etag, span=span)


def _complete(bucket: S3Bucket, target: str, upload: str, etags: Sequence[str]) -> None:
    """Complete the upload; if nobody tells how that ended, the target's existence does."""
    try:
        bucket.complete_upload(target, upload, etags)
    except (UnavailableError, NotFoundError) as err:
        try:
            bucket.head(target)
        except NotFoundError:
            raise err from None
