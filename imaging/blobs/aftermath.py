"""What may still go wrong when a blob is published: the call has succeeded all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from imaging.digests import Digest
from imaging.errors import MistifyError

_log = logging.getLogger(__name__)


@contextmanager
def logged_after(what: str, digest: Digest) -> Iterator[None]:
    """For steps after the point of no return: the log gets the error, the caller does not."""
    try:
        yield
    except MistifyError:
        _log.exception(what, extra={"component": "blobs", "digest": str(digest)})
