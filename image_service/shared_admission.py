"""Admission where several replicas fill one store: the quota is one, so what is on its way is written down where all see it.

Key: ``quota/reserved``, JSON: the bytes each writer may come to, by its ref. A writer is let in by a compare-and-swap of that one
entry, so two that do not fit together can't both be let in. What is stored is read from the records and the index of derived images each
time: it can't drift. Between the moment an image has a record and the moment its reservation is gone it is counted twice, never not at
all; so nobody is refused at first sight.

A reservation of a writer that is dead counts no more. Without a quota nothing is read or written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from image_service.admission import Admission, AdmissionLimits, Reservation
from image_service.metadata import MetadataStore
from imaging.errors import ConflictError, MistifyError, NoSpaceError, UnavailableError
from imaging.kv.base import ABSENT, put

KEY = "quota/reserved"

TRIES_MAX = 64
"""A compare-and-swap loses only to one that won; each takes a millisecond or two."""

LOOKS = 4
LOOK_AGAIN_S = 0.25
"""Before somebody is refused: in this time whoever has just finished is not counted twice any more."""

GRANT_BYTES = 64 << 20
"""A writer whose length nobody knows is let in by this much at a time."""

UNSTORED_PREFIX = "unpacked-"
"""Reservations for temporary files of this machine, which no quota counts."""

_PAUSE = threading.Event()

log = logging.getLogger(__name__)


class SharedAdmission(Admission):
    """See the module's docstring. ``is_left`` says which writers are dead. Life: construct, use, ``close``."""

    def __init__(
        self,
        limits: AdmissionLimits,
        records: MetadataStore,
        derived_bytes: Callable[[], int],
        is_left: Callable[[str], bool],
    ) -> None:
        super().__init__(limits)
        self._records = records
        self._derived_bytes = derived_bytes
        self._is_left = is_left
        self._ending = ThreadPoolExecutor(1, thread_name_prefix="quota")

    def _admit(self, reservation: Reservation, announced_bytes: int, received_bytes: int) -> None:
        """See Admission."""
        if self._limits.quota_bytes and not reservation.ref.startswith(UNSTORED_PREFIX):
            self._let_in(reservation.ref, max(announced_bytes, received_bytes, 0))
        with self._lock:
            reservation.announced_bytes, reservation.received_bytes = announced_bytes, received_bytes
            self._active.add(reservation)

    def _let_in(self, ref: str, wanted_bytes: int) -> None:
        for look in range(LOOKS):
            if look:
                _PAUSE.wait(LOOK_AGAIN_S)
            if self._change(lambda held: self._with(held, ref, wanted_bytes)):
                return
        quota_bytes = self._limits.quota_bytes
        raise NoSpaceError(f"image does not fit into the quota of {quota_bytes} bytes: no space left on device")

    def _with(self, held: Mapping[str, int], ref: str, wanted_bytes: int) -> Mapping[str, int] | None:
        """The reservations with one more, or None if it does not fit."""
        others = {other: held[other] for other in held if other != ref}
        if wanted_bytes > held.get(ref, 0) and not self._fits(others, wanted_bytes):
            others = {other: others[other] for other in others if not self._is_dead(other)}
            if not self._fits(others, wanted_bytes):
                return None
        return others | {ref: wanted_bytes}

    def _fits(self, others: Mapping[str, int], wanted_bytes: int) -> bool:
        stored_bytes = self._records.stored_bytes() + self._derived_bytes()
        return stored_bytes + sum(others.values()) + wanted_bytes <= self._limits.quota_bytes

    def _is_dead(self, ref: str) -> bool:
        """Whether a writer ended without a word, or this process could not say so."""
        with self._lock:
            here = {reservation.ref for reservation in self._active}
        return ref not in here and (self._records.replica.id in ref or self._is_left(ref))

    def _change(self, change: Callable[[Mapping[str, int]], Mapping[str, int] | None]) -> bool:
        """Replace the reservations by what ``change`` makes of them; False if that is None."""
        engine = self._records.engine
        for _ in range(TRIES_MAX):
            entry = engine.get(KEY)
            held = msgspec.json.decode(entry.value, type=dict[str, int]) if entry else {}
            wanted = change(held)
            if wanted is None:
                return False
            try:
                put(engine, KEY, msgspec.json.encode(wanted), expect=entry.revision if entry else ABSENT)
            except ConflictError:
                continue
            return True
        raise UnavailableError("the reservations of the quota change too fast")

    def received(self, reservation: Reservation) -> None:
        """See Admission: more came than was let in."""
        if self._limits.quota_bytes and reservation.received_bytes > reservation.announced_bytes:
            received_bytes = reservation.received_bytes
            try:
                self._admit(reservation, received_bytes + GRANT_BYTES, received_bytes)
            except NoSpaceError:
                self._admit(reservation, received_bytes, received_bytes)

    def end(self, reservation: Reservation) -> None:
        """See Admission. Callers on an event loop do not wait."""
        with self._lock:
            known = reservation in self._active
            self._active.discard(reservation)
            again = any(other.ref == reservation.ref for other in self._active)
        if known and not again and self._limits.quota_bytes:
            self._ending.submit(self._forget, reservation.ref)

    def _forget(self, ref: str) -> None:
        try:
            self._change(lambda held: {other: held[other] for other in held if other != ref})
        except MistifyError as err:
            log.warning("a reservation counts until somebody needs its room: %s", err.message, extra={"ref": ref})

    def close(self) -> None:
        """See Admission."""
        self._ending.shutdown()
