"""The digest of the disk a volume stream makes, computed from its records as they pass: no disk is written.

The rules of a stream put writes in ascending order, so a full stream can be hashed on the way, its holes as zeros. What would need
bytes again that have passed (a FREE behind the position, a second stream) ends the computing without a result.
"""

from __future__ import annotations

from imaging.digests import Digest, MultiHasher
from imaging.sendstream.records import DATA_OBJECT, Free, Write, WriteEmbedded
from imaging.sendstream.rules import Admitted

_ZEROS = memoryview(bytes(1 << 20))


class VolumeContent:
    """Takes what a validator admitted. ``digest`` gives the result when the stream has ended."""

    def __init__(self, size_max_bytes: int) -> None:
        self._size_max_bytes = size_max_bytes
        self._hasher = MultiHasher()
        self._held: bytes | memoryview = b""  # the last block may reach past the volume's end, which is told after it
        self._held_offset = 0
        self.known = True

    def give_up(self) -> None:
        """There will be no result."""
        self.known = False
        self._held = b""

    def take(self, admitted: Admitted) -> None:
        """The next record that keeps the rules."""
        record = admitted.record
        if not self.known:
            return
        if isinstance(record, (Write, WriteEmbedded)) and record.object == DATA_OBJECT and admitted.block is not None:
            self._put(record.offset, admitted.block)
        elif isinstance(record, Free) and record.object == DATA_OBJECT and record.offset < self._end:
            self.give_up()

    @property
    def _end(self) -> int:
        """Where the last block ends."""
        return self._held_offset + len(self._held)

    def _put(self, offset: int, block: bytes | memoryview) -> None:
        if offset + len(block) > self._size_max_bytes:
            self.give_up()
            return
        self._hasher.update(self._held)
        self._zeros_up_to(offset)
        self._held, self._held_offset = block, offset

    def _zeros_up_to(self, offset: int) -> None:
        while (missing := offset - self._hasher.size_bytes) > 0:
            self._hasher.update(_ZEROS[:missing])

    def digest(self, size_bytes: int) -> Digest | None:
        """The digest of the volume of that size; None if it can't be told."""
        if not self.known or size_bytes > self._size_max_bytes:
            return None
        self._hasher.update(memoryview(self._held)[: max(size_bytes - self._held_offset, 0)])
        self._zeros_up_to(size_bytes)
        return self._hasher.digest() if self._hasher.size_bytes == size_bytes else None
