"""Digests: parsed once, written ``<algorithm>:<hex>``, computed while streaming.

*Checksum* means only Fletcher-4 (:mod:`imaging.sendstream.checksum`); what identifies content is a *digest*.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from imaging.errors import InvalidArgumentError

_HEX_LENGTHS = {"sha256": 64, "sha512": 128, "md5": 32, "sha1": 40}
_PATTERN = re.compile(r"(sha256|sha512|md5|sha1):([0-9a-f]+)\Z")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A digest of content; equal only if algorithm and value are equal."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Parse ``sha256:<64 lower-case hex digits>``; InvalidArgumentError names the offending text."""
        match = _PATTERN.match(text)
        if match is None or len(match[2]) != _HEX_LENGTHS[match[1]]:
            raise InvalidArgumentError(f"not a digest (want sha256:<64 hex digits>): {text[:160]!r}")
        return cls(match[1], match[2])

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """Digest of a small value that is in memory anyway."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def matches(self, other: Digest) -> bool:
        """Whether both are the same digest, compared in constant time."""
        return self.algorithm == other.algorithm and hmac.compare_digest(self.hex, other.hex)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


class MultiHasher:
    """Several digests and the length of one stream, in one pass."""

    def __init__(self, algorithms: Iterable[str] = ("sha256",)) -> None:
        self._hashers = {name: hashlib.new(name) for name in algorithms}
        self.size_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Feed the next piece; pieces of 64 KiB or more release the interpreter lock."""
        for hasher in self._hashers.values():
            hasher.update(data)
        self.size_bytes += len(data)

    def digest(self, algorithm: str = "sha256") -> Digest:
        """Digest of everything fed so far."""
        return Digest(algorithm, self._hashers[algorithm].hexdigest())
