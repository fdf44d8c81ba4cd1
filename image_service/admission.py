"""Who may write how much: the size limit of one image, the quota of all, and the free space that stays free.

The blob store refuses a byte too many by itself. What it can't know is how long a writer said its image will be: a writer reserves that
before its first byte. So ten uploads that each fit alone are not all let in, and one that can't fit is refused at once.

What can be made again (derived images) gives way: it is removed, as far as needed, before anybody is refused.

Errors: TooLargeError (413) for one image over the limit, NoSpaceError (507) for quota and free space.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from image_service.lifecycle import UNKNOWN_SIZE
from imaging.errors import NoSpaceError, TooLargeError
from imaging.files import free_bytes


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Limits on what is stored."""

    size_max_bytes: int = 1 << 40
    """One image: 1 TiB, larger than any guest's disk image we know of."""
    quota_bytes: int = 0
    """All images together, those on their way included; 0 is no quota."""
    free_min_bytes: int = 256 << 20
    """Stays free on the disk, so that metadata and logs can always be written."""


class Reservation:
    """Room for one writer. ``end`` it whatever happens; as a context manager it ends by itself."""

    def __init__(self, admission: Admission, ref: str) -> None:
        self._admission = admission
        self.ref = ref
        self.announced_bytes = 0
        self.received_bytes = 0

    @property
    def missing_bytes(self) -> int:
        """What is reserved and not yet written."""
        return max(self.announced_bytes - self.received_bytes, 0)

    def announce(self, announced_bytes: int, *, received_bytes: int = 0) -> None:
        """The length is known now (so much of it is here already); raises if there is no room for the rest."""
        self._admission.announce(self, announced_bytes, received_bytes)

    def receive(self, received_bytes: int) -> None:
        """So many bytes were written in all."""
        self.received_bytes = received_bytes
        self._admission.received(self)

    def reclaim(self, wanted_bytes: int) -> bool:
        """More came than there is room for: remove what can be made again; whether anything was."""
        return self._admission.reclaim(wanted_bytes)

    def end(self) -> None:
        """Give the room back; idempotent."""
        self._admission.end(self)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class Admission:
    """See the module's docstring. ``used_bytes`` says what the store holds, ``directory`` where (None: not on a disk of ours)."""

    def __init__(
        self, limits: AdmissionLimits, *, used_bytes: Callable[[], int] = lambda: 0, directory: Path | None = None
    ) -> None:
        self._limits = limits
        self._used_bytes = used_bytes
        self._directory = directory
        self._lock = threading.Lock()
        self._active: set[Reservation] = set()
        self._reclaimers: list[Callable[[int], bool]] = []

    @property
    def size_max_bytes(self) -> int:
        """The limit on one image."""
        return self._limits.size_max_bytes

    def check_size(self, size_bytes: int) -> None:
        """TooLargeError if one image may not be so large."""
        if size_bytes > self._limits.size_max_bytes:
            raise TooLargeError(f"image is larger than the limit of {self._limits.size_max_bytes} bytes")

    def add_reclaimer(self, reclaim: Callable[[int], bool]) -> None:
        """From now on ask ``reclaim`` to remove so many bytes before somebody is refused; it says whether it has removed any."""
        self._reclaimers.append(reclaim)

    def reclaim(self, wanted_bytes: int) -> bool:
        """What :meth:`Reservation.reclaim` says."""
        return any(reclaim(wanted_bytes) for reclaim in self._reclaimers)

    def reserve(self, ref: str, announced_bytes: int = UNKNOWN_SIZE) -> Reservation:
        """Let a writer of ``ref`` in; raises if there is no room."""
        reservation = Reservation(self, ref)
        self.announce(reservation, announced_bytes, 0)
        return reservation

    def announce(self, reservation: Reservation, announced_bytes: int, received_bytes: int) -> None:
        """What :meth:`Reservation.announce` says."""
        self.check_size(announced_bytes)
        try:
            self._admit(reservation, announced_bytes, received_bytes)
        except NoSpaceError:
            wanted_bytes = max(announced_bytes - received_bytes, 1)
            if self._never_fits(wanted_bytes) or not self.reclaim(wanted_bytes):
                raise
            self._admit(reservation, announced_bytes, received_bytes)

    def _never_fits(self, wanted_bytes: int) -> bool:
        """Whether nothing could be removed that would help."""
        return 0 < self._limits.quota_bytes < wanted_bytes

    def _admit(self, reservation: Reservation, announced_bytes: int, received_bytes: int) -> None:
        wanted_bytes = max(announced_bytes - received_bytes, 0)
        with self._lock:
            missing_bytes = sum(one.missing_bytes for one in self._active if one is not reservation)
            self._check_room(missing_bytes, wanted_bytes)
            reservation.announced_bytes, reservation.received_bytes = announced_bytes, received_bytes
            self._active.add(reservation)

    def _check_room(self, missing_bytes: int, wanted_bytes: int) -> None:
        quota_bytes = self._limits.quota_bytes
        if quota_bytes and self._used_bytes() + missing_bytes + wanted_bytes > quota_bytes:
            raise NoSpaceError(f"image does not fit into the quota of {quota_bytes} bytes: no space left on device")
        if self._directory is None:
            return
        if free_bytes(self._directory) - missing_bytes - wanted_bytes < self._limits.free_min_bytes:
            raise NoSpaceError("image does not fit into the free space: no space left on device")

    def received(self, reservation: Reservation) -> None:
        """What :meth:`Reservation.receive` says; the store itself refuses a byte too many here."""

    def close(self) -> None:
        """Let what was ended be written down."""

    def end(self, reservation: Reservation) -> None:
        """What :meth:`Reservation.end` says."""
        with self._lock:
            self._active.discard(reservation)
