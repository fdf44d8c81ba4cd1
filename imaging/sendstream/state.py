"""What is known of a volume that streams are applied to, and of a transfer that was cut off."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from imaging.errors import BadDataError
from imaging.sendstream.records import TO_THE_END


@dataclass(frozen=True, slots=True)
class VolumeState:
    """A volume as of the snapshot its last stream made. Keep it next to the volume; the next increment needs it."""

    guid: int
    fromguid: int
    volsize_bytes: int
    volblocksize_bytes: int
    creation_s: int
    toname: str

    def to_wire(self) -> dict[str, int | str]:
        """As JSON-ready values. Guids are decimal strings: they do not fit into a double."""
        return {**asdict(self), "guid": str(self.guid), "fromguid": str(self.fromguid)}

    @classmethod
    def from_wire(cls, wire: object) -> VolumeState:
        """The state ``to_wire`` gave; BadDataError if these values are no such thing."""
        if not isinstance(wire, dict):
            raise BadDataError("a volume's state is not an object")
        try:
            numbers = {name: _number(wire[name]) for name in _NUMBERS}
            return cls(**numbers, toname=str(wire["toname"]))
        except (KeyError, TypeError, ValueError) as err:
            raise BadDataError("a volume's state lacks a number or its name") from err


_NUMBERS = ("guid", "fromguid", "volsize_bytes", "volblocksize_bytes", "creation_s")


def _number(value: object) -> int:
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= TO_THE_END:
        raise ValueError(value)
    return number


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a stream that was cut off was applied: everything before this block, and the block itself.

    A resuming stream sends that last block again and goes on from there.
    """

    toguid: int
    fromguid: int
    toname: str
    object: int
    offset: int
    volblocksize_bytes: int
    features: int = 0
    """Of the stream that was cut off: its continuation has to be of the same sort."""
    volsize_bytes: int | None = None
    """If the stream had told it already."""
