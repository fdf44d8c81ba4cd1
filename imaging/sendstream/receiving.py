"""Streams onto disk images."""

from __future__ import annotations

from imaging.compression import Readable
from imaging.errors import BadDataError, ConflictError, UnsupportedError
from imaging.sendstream.image import VolumeImage
from imaging.sendstream.package import StreamSet, resume_position
from imaging.sendstream.reader import Frame, StreamReader, WriteRun
from imaging.sendstream.records import (
    DATA_OBJECT,
    Begin,
    End,
    Feature,
    Free,
    Write,
    WriteEmbedded,
)
from imaging.sendstream.rules import DEFAULT_LIMITS, Limits, VolumeRules
from imaging.sendstream.state import ResumePoint, VolumeState

READ_BYTES = 1 << 20
"""Pieces of this size keep the checksum's arrays in the cache and the number of calls low."""


class VolumeReceiver:
    """Applies a stream or package to an image, piece by piece: ``feed`` ..., then ``finish`` gives the new state.

    The image is changed while the stream comes in, before END is known to be right: work on a private copy, and throw it away if
    any call raises. See :func:`apply_stream` for the parameters and errors.
    """

    def __init__(
        self,
        fd: int,
        base: VolumeState | None = None,
        *,
        dataset: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        whole_blocks: bool = True,
        resume: ResumePoint | None = None,
    ) -> None:
        self._image = VolumeImage(fd)
        self._reader = StreamReader()
        self._set = StreamSet(dataset)
        self._state = base
        self._limits = limits
        self._whole_blocks = whole_blocks
        self._resume = resume
        self._rules: VolumeRules | None = None
        self._last_write: tuple[int, int] | None = None
        self._applied = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Apply what of this piece is certain."""
        for checked in self._reader.feed_runs(data):
            if not isinstance(checked, WriteRun):
                self._take(checked)
            elif not self._set.take(checked.first):
                assert self._rules is not None
                self._apply_run(self._rules, checked)

    def finish(self) -> VolumeState:
        """The input ended: the new state, or BadDataError if the stream did not."""
        self._reader.finish()
        if not self._applied or self._state is None:
            raise BadDataError("the package holds no stream of the volume")
        return self._state

    def interrupted(self) -> ResumePoint | None:
        """After the input broke off: where a resuming stream has to go on, or None if nothing was applied yet."""
        rules = self._rules
        if rules is None or self._last_write is None or not rules.block_bytes:
            return None
        self._image.flush()
        begin = rules.begin
        return ResumePoint(
            begin.toguid,
            begin.fromguid,
            begin.toname,
            *self._last_write,
            rules.block_bytes,
            begin.features & ~Feature.RESUMING,
            rules.volume_size_bytes,
        )

    # -- frames --------------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        if self._set.take(frame):
            return
        if self._rules is None:
            record = frame.record()
            assert isinstance(record, Begin)
            self._rules = self._open(record, frame.payload)
        else:
            self._apply(self._rules, frame)

    def _open(self, begin: Begin, payload: memoryview) -> VolumeRules:
        resume = self._resume
        if begin.features & Feature.RESUMING:
            _check_resume(begin, payload, resume)
        elif resume is not None:
            raise ConflictError("the stream does not continue the interrupted one")
        rules = VolumeRules(begin, self._state, limits=self._limits, whole_blocks=self._whole_blocks, resume=resume)
        if not begin.fromguid and resume is None:
            self._image.clear()
        self._resume = None
        return rules

    def _apply(self, rules: VolumeRules, frame: Frame) -> None:
        record, block = rules.admit(frame)
        if block is not None:
            assert isinstance(record, (Write, WriteEmbedded))
            if record.object == DATA_OBJECT:
                self._image.write(record.offset, block)
            self._last_write = (record.object, record.offset)
        elif type(record) is Free:
            if record.object == DATA_OBJECT:
                self._image.free(record.offset, record.length)
        elif type(record) is End:
            self._close(rules)

    def _apply_run(self, rules: VolumeRules, run: WriteRun) -> None:
        first = rules.admit_run(run)
        self._image.write_run(first.offset, run)
        self._last_write = (first.object, first.offset + first.logical_bytes * (run.blocks - 1))

    def _close(self, rules: VolumeRules) -> None:
        self._state = rules.state()
        self._image.resize(self._state.volsize_bytes)
        self._rules, self._last_write, self._applied = None, None, True


def _check_resume(begin: Begin, payload: memoryview, resume: ResumePoint | None) -> None:
    """A resuming stream has to start no later than the interrupted one got."""
    if resume is None:
        raise UnsupportedError("the stream continues an interrupted transfer that did not happen here [rule resume]")
    number, offset = resume_position(payload)
    if (begin.toguid, begin.fromguid) != (resume.toguid, resume.fromguid):
        raise ConflictError(f"the stream continues another transfer, of guid {begin.toguid} [rule resume]")
    if number != resume.object or offset > resume.offset + resume.volblocksize_bytes:
        raise ConflictError(
            f"the stream goes on at {number}:{offset}, but the transfer ended at {resume.object}:{resume.offset} [rule resume]"
        )


def apply_stream(
    source: Readable,
    fd: int,
    base: VolumeState | None = None,
    *,
    dataset: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    whole_blocks: bool = True,
    resume: ResumePoint | None = None,
) -> VolumeState:
    """Apply a plain stream or a package from ``source`` to the image behind ``fd`` and return the volume's new state.

    ``base`` is the state of what the image holds now: None for a full stream (whatever the image held is discarded), the state
    returned earlier for an increment. ``dataset`` chooses one volume of a package that holds several. The source is read to
    its end. Holes stay holes, blocks of zeros become holes, the file gets the volume's size. Nothing is synced.

    **The image must be a private copy**: records are applied as their checksums are confirmed, and only the return says that
    END was. If this raises, throw the image away (or keep it for a resume, see :class:`VolumeReceiver`).

    Errors: BadDataError (damaged, cut off, breaks a rule), UnsupportedError (encrypted, redacted, deduplicated, unknown feature),
    ConflictError (the increment builds on another guid, or a full stream meets a base), TooLargeError (a limit),
    InvalidArgumentError (the package holds several volumes and none was chosen), NoSpaceError.
    """
    receiver = VolumeReceiver(fd, base, dataset=dataset, limits=limits, whole_blocks=whole_blocks, resume=resume)
    while piece := source.read(READ_BYTES):
        receiver.feed(piece)
    return receiver.finish()
