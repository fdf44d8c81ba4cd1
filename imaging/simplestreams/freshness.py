"""A catalogue must not grow younger: the last ``updated`` seen of each document is kept, and an older one is refused.

Signatures do not expire, so whoever can answer for a server could otherwise serve last year's catalogue, with last year's holes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from imaging.errors import BadDataError
from imaging.kv.base import KeyValue, Put

PREFIX = "simplestreams/seen/"


def parse_date(text: str | None) -> datetime | None:
    """A document's ``updated`` as a time; None if it has none anybody could read."""
    try:
        moment = parsedate_to_datetime(text or "")
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class LastSeen:
    """What was seen, in any KeyValue."""

    def __init__(self, store: KeyValue) -> None:
        self._store = store

    def check(self, url: str, updated: str | None) -> None:
        """BadDataError if the document at ``url`` is older than one seen there (or has lost its date)."""
        entry = self._store.get(_key(url))
        before = parse_date(entry.value.decode()) if entry else None
        now = parse_date(updated)
        if before is not None and (now is None or now < before):
            raise BadDataError(
                f'catalogue at URL "{url}" was rolled back: it says "{updated or ""}", and {_text(before)} was seen before'
            )

    def remember(self, seen: Mapping[str, str | None]) -> None:
        """These documents were used."""
        puts = [Put(_key(url), updated.encode()) for url, updated in seen.items() if updated and parse_date(updated)]
        if puts:
            self._store.transact(puts)


def _key(url: str) -> str:
    """Hashed, because a URL may be longer than a key."""
    return PREFIX + hashlib.sha256(url.encode()).hexdigest()


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S %z")
