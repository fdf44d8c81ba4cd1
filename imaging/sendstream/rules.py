"""The rules a volume's stream must keep before anything acts on it.

Checksums protect from accidents only: anybody can compute them. Kernels take streams that make them hang or panic, and volumes
that cannot be read. Each rule below has a name, which the refusal states together with the record's number and place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from imaging.errors import BadDataError, ConflictError, MistifyError, TooLargeError, UnsupportedError
from imaging.sendstream import microzap
from imaging.sendstream.blocks import SECTOR_BYTES, BlockDecoder
from imaging.sendstream.reader import Frame, WriteRun
from imaging.sendstream.records import (
    BLOCK_MAX_BYTES,
    BLOCK_MIN_BYTES,
    BLOCK_SMALL_MAX_BYTES,
    DATA_OBJECT,
    DATA_TYPE,
    KNOWN_FEATURES,
    MICROZAP_BYTES,
    PROPERTIES_OBJECT,
    PROPERTIES_TYPE,
    TO_THE_END,
    Begin,
    End,
    Feature,
    Free,
    FreeObjects,
    Object,
    Record,
    RecordType,
    StreamKind,
    Write,
    WriteEmbedded,
    feature_names,
)
from imaging.sendstream.state import ResumePoint, VolumeState

EMBEDDED_MAX_BYTES = 112
"""What a block pointer has room for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stream from outside may ask for."""

    volume_size_max_bytes: int = 16 << 40
    """16 TiB: the largest file of ext4 with 4 KiB blocks; a tiny stream may claim 2^63 bytes."""
    block_max_bytes: int = BLOCK_MAX_BYTES
    """Every supported release takes 1 MiB; 2.1 nothing larger."""


DEFAULT_LIMITS = Limits()


class Admitted(NamedTuple):
    """A record that keeps the rules, and for blocks of data their decompressed contents."""

    record: Record
    block: bytes | memoryview | None


def reason_not_applicable(begin: Begin) -> str | None:
    """Why this stream, though it may be sound, holds no contents a volume could be made of."""
    features = begin.features
    if features & Feature.RAW:
        return "its blocks are encrypted (a raw stream)"
    if features & Feature.REDACTED:
        return "it is redacted: data was left out"
    if features & (Feature.DEDUP | Feature.DEDUPPROPS):
        return "it is deduplicated"
    if begin.kind == StreamKind.FILESYSTEM:
        return "it holds a filesystem, not a volume"
    return None


def check_begin(begin: Begin) -> None:
    """Rule *begin*: known features, a known kind, a snapshot's name, a guid."""
    unknown = begin.features & ~KNOWN_FEATURES
    if unknown:
        raise UnsupportedError(f"unknown feature flag {', '.join(feature_names(unknown))} [rule begin]")
    if begin.kind not in {StreamKind.FILESYSTEM, StreamKind.VOLUME}:
        raise BadDataError(f"unknown kind of dataset {begin.kind} [rule begin]")
    if b"\0" not in begin.name or not begin.dataset or not begin.snapshot:
        raise BadDataError("the stream names no snapshot [rule begin]")
    if begin.toguid == 0:
        raise BadDataError("the stream's guid is 0 [rule begin]")


class VolumeRules:
    """Checks one volume's stream record by record, in stream order, from the record after BEGIN to END.

    ``base`` is what an increment has to build on; without it (``base_known`` false) an increment is checked as far as it can
    be alone. ``whole_blocks`` off takes writes of other sizes than the block size, which released kernels do too.

    Errors: BadDataError and UnsupportedError (a rule is broken), ConflictError (the base is another), TooLargeError (a limit).
    """

    def __init__(
        self,
        begin: Begin,
        base: VolumeState | None = None,
        *,
        base_known: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        whole_blocks: bool = True,
        resume: ResumePoint | None = None,
    ) -> None:
        check_begin(begin)
        reason = reason_not_applicable(begin)
        if reason is not None:
            kind = BadDataError if begin.kind == StreamKind.FILESYSTEM else UnsupportedError
            raise kind(f"the stream cannot be applied: {reason} [rule kind]")
        self.begin = begin
        self.volume_size_bytes: int | None = resume.volsize_bytes if resume else None
        self.data_end = 0
        self.ended = False
        self._base = base
        self._limits = limits
        self._whole_blocks = whole_blocks
        self._incremental = begin.fromguid != 0
        if base_known:
            self._check_base(base)
        self._block_bytes = base.volblocksize_bytes if base else 0
        self._properties_block_bytes = MICROZAP_BYTES
        self._required_block_bytes = self._block_bytes
        if resume is not None:
            self._required_block_bytes = resume.volblocksize_bytes
        self._announced: set[int] = set()
        self._last = (0, 0)  # object and end of the last write
        self._freed_early = ""
        self._decoder = BlockDecoder()

    @property
    def block_bytes(self) -> int:
        """The volume's block size; 0 if an increment whose base is unknown does not tell."""
        return self._block_bytes

    def state(self) -> VolumeState:
        """The volume after END; only if the base was given or the stream is full."""
        size = self.volume_size_bytes if self.volume_size_bytes is not None else self._base_size()
        assert self.ended
        assert size is not None
        begin = self.begin
        return VolumeState(begin.toguid, begin.fromguid, size, self._block_bytes, begin.creation_s, begin.toname)

    def admit(self, frame: Frame) -> Admitted:
        """Check the next record; the error names the rule and the record."""
        record = frame.record()
        try:
            if type(record) is Write:
                return self._admit_write(record, frame.payload)
            if type(record) is Free:
                self._check_free(record)
            elif type(record) is Object:
                self._check_object(record)
            elif type(record) is WriteEmbedded:
                return self._admit_embedded(record, frame.payload)
            elif type(record) is FreeObjects:
                self._check_free_objects(record)
            elif type(record) is End:
                self._check_end(record)
            else:
                raise BadDataError(
                    f"a {RecordType(frame.type).name} record does not belong into a volume [rule objects]"
                )
        except MistifyError as err:
            raise type(err)(f"{err.message}: {frame.where}") from err
        return Admitted(record, None)

    def admit_run(self, run: WriteRun) -> Write:
        """Check a run of writes, which is as good as its first if it ends in time; the first record."""
        admitted = self.admit(run.first).record
        assert isinstance(admitted, Write)
        end = admitted.offset + admitted.logical_bytes * run.blocks
        if admitted.object != DATA_OBJECT or end > self._limits.volume_size_max_bytes:
            for frame in islice(run.frames(), 1, None):
                self.admit(frame)  # one of them is wrong: find which
        self._last = (admitted.object, end)
        self.data_end = max(self.data_end, end)
        return admitted

    # -- base --------------------------------------------------------------------------------------------------------

    def _check_base(self, base: VolumeState | None) -> None:
        wanted = self.begin.fromguid
        if wanted and base is None:
            raise ConflictError(f"the increment needs a volume with guid {wanted} [rule base]")
        if wanted and base is not None and wanted != base.guid:
            raise ConflictError(f"the increment needs a volume with guid {wanted}, not {base.guid} [rule base]")
        if not wanted and base is not None:
            raise ConflictError("a full stream cannot be applied onto an existing volume [rule base]")

    def _base_size(self) -> int | None:
        return self._base.volsize_bytes if self._base else None

    # -- objects -----------------------------------------------------------------------------------------------------

    def _check_object(self, record: Object) -> None:
        expected = {DATA_OBJECT: DATA_TYPE, PROPERTIES_OBJECT: PROPERTIES_TYPE}.get(record.object)
        if expected is None or record.type != expected:
            raise BadDataError(f"a volume has no object {record.object} of type {record.type} [rule objects]")
        if max(self._announced, default=0) >= record.object or self._last[0] > record.object:
            raise BadDataError(f"object {record.object} is out of order [rule objects]")
        if record.object == PROPERTIES_OBJECT and DATA_OBJECT not in self._announced and not self._incremental:
            raise BadDataError("object 2 before object 1 [rule objects]")
        if record.bonus_bytes or record.raw_bonus_bytes or any(record[5:7]) or record.flags or any(record[11:]):
            raise BadDataError(f"object {record.object} has attributes that no volume has [rule objects]")
        self._check_block_size(record)
        self._announced.add(record.object)

    def _check_block_size(self, record: Object) -> None:
        size = record.block_bytes
        if size & (size - 1) or size < BLOCK_MIN_BYTES:
            raise BadDataError(f"block size {size} is not a power of two from {BLOCK_MIN_BYTES} [rule block size]")
        if size > self._limits.block_max_bytes:
            raise TooLargeError(f"block size {size} is above {self._limits.block_max_bytes} [rule block size]")
        if size > BLOCK_SMALL_MAX_BYTES and not self.begin.features & Feature.LARGE_BLOCKS:
            raise BadDataError(f"block size {size} without the LARGE_BLOCKS feature [rule block size]")
        if record.object == PROPERTIES_OBJECT:
            self._properties_block_bytes = size
            return
        if self._required_block_bytes and size != self._required_block_bytes:
            raise BadDataError(
                f"block size {size} differs from the base's {self._required_block_bytes} [rule block size]"
            )
        self._block_bytes = size

    def _check_free_objects(self, record: FreeObjects) -> None:
        if record.first > PROPERTIES_OBJECT or record.first + record.slots <= DATA_OBJECT or not record.slots:
            return
        touched = {DATA_OBJECT, PROPERTIES_OBJECT} & set(range(record.first, min(record.first + record.slots, 3)))
        text = f"frees the volume's {'data' if DATA_OBJECT in touched else 'properties'} [rule free objects]"
        if self._incremental or touched & self._announced:
            raise BadDataError(text)
        self._freed_early = text  # nothing is there yet: what the rest of the stream lacks says more

    def _check_free(self, record: Free) -> None:
        self._check_known(record.object)
        if record.object == PROPERTIES_OBJECT and record.offset < MICROZAP_BYTES:
            raise BadDataError("frees the volume's size [rule free]")
        if record.length != TO_THE_END and record.offset + record.length > TO_THE_END:
            raise BadDataError("frees past the end of all objects [rule free]")

    def _check_known(self, number: int) -> None:
        if number not in {DATA_OBJECT, PROPERTIES_OBJECT}:
            raise BadDataError(f"a volume has no object {number} [rule objects]")
        if number not in self._announced and not self._incremental:
            raise BadDataError(f"object {number} was not announced [rule objects]")

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _admit_write(self, record: Write, payload: memoryview) -> Admitted:
        size = record.logical_bytes
        self._check_place(record.object, record.offset, size)
        expected = DATA_TYPE if record.object == DATA_OBJECT else PROPERTIES_TYPE
        if record.type != expected or record.flags:
            raise BadDataError(f"a write of type {record.type} with flags {record.flags} [rule blocks]")
        block: bytes | memoryview = payload
        if record.compression:
            packed = record.compressed_bytes
            if packed % SECTOR_BYTES or packed >= size:
                raise BadDataError(f"a compressed size of {packed} for {size} bytes [rule blocks]")
            block = self._decoder.decode(record.compression, payload, size)
        if record.object == PROPERTIES_OBJECT:
            self._take_properties(block)
        return Admitted(record, block)

    def _admit_embedded(self, record: WriteEmbedded, payload: memoryview) -> Admitted:
        size = record.length
        self._check_place(record.object, record.offset, size)
        if record.embedded_type or record.logical_bytes != size or record.physical_bytes > EMBEDDED_MAX_BYTES:
            raise BadDataError("an embedded block that is not data of one block [rule blocks]")
        block = self._decoder.decode(record.compression, payload[: record.physical_bytes], size)
        if record.object == PROPERTIES_OBJECT:
            self._take_properties(block)
        return Admitted(record, block)

    def _check_place(self, number: int, offset: int, size: int) -> None:
        if number not in self._announced:
            self._check_known(number)
        if (number, offset) < self._last:
            raise BadDataError("writes are out of order [rule blocks]")
        end = offset + size
        self._last = (number, end)
        if number != DATA_OBJECT:
            if offset or size != self._properties_block_bytes:
                raise BadDataError("the volume's properties are not one block [rule blocks]")
            return
        whole = self._block_bytes
        if self._whole_blocks and whole and (size != whole or offset % whole):
            raise BadDataError(f"a write of {size} bytes at {offset} is not one block of {whole} [rule blocks]")
        if size % BLOCK_MIN_BYTES or offset % BLOCK_MIN_BYTES or not 0 < size <= self._limits.block_max_bytes:
            raise BadDataError(f"a write of {size} bytes at {offset} [rule blocks]")
        if end > self.data_end:
            self.data_end = end
            if end > self._limits.volume_size_max_bytes:
                raise TooLargeError(f"data up to byte {end}, past {self._limits.volume_size_max_bytes} [rule size]")

    # -- size and end --------------------------------------------------------------------------------------------------

    def _take_properties(self, block: bytes | memoryview) -> None:
        size = microzap.volume_size(block)
        if size == 0 or size % BLOCK_MIN_BYTES:
            raise BadDataError(f"volume size {size} is not a multiple of {BLOCK_MIN_BYTES} above 0 [rule size]")
        if size > self._limits.volume_size_max_bytes:
            raise TooLargeError(f"volume size {size} is above {self._limits.volume_size_max_bytes} [rule size]")
        self.volume_size_bytes = size

    def _check_end(self, record: End) -> None:
        if record.toguid != self.begin.toguid:
            raise BadDataError(f"END is of another snapshot, guid {record.toguid} [rule end]")
        if self._freed_early:
            raise BadDataError(self._freed_early)
        if not self._incremental and DATA_OBJECT not in self._announced and not self._required_block_bytes:
            raise BadDataError("the stream has no data object [rule objects]")
        if self.volume_size_bytes is None and not self._incremental:
            raise BadDataError("the stream states no volume size [rule size]")
        self._check_data_end()
        self.ended = True

    def _check_data_end(self) -> None:
        size = self.volume_size_bytes if self.volume_size_bytes is not None else self._base_size()
        if size is not None and self._block_bytes and self.data_end > -(-size // self._block_bytes) * self._block_bytes:
            raise BadDataError(f"data up to byte {self.data_end} of a volume of {size} bytes [rule size]")
