"""The stream firewall: bytes in, the same bytes out, but only those of records that keep every rule.

Put it in front of anything that receives streams from outside. Each record is released after its checksum and the rules of
:mod:`imaging.sendstream.rules` held; the last END is held back until the input ended, so that no receiver finishes a stream that
is damaged, dangerous or followed by something else. It does no input or output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from imaging.errors import BadDataError, UnsupportedError
from imaging.sendstream.checksum import Buffer
from imaging.sendstream.package import packaged_datasets
from imaging.sendstream.reader import Checked, Frame, StreamReader, WriteRun, single_frames
from imaging.sendstream.records import (
    DATA_TYPE,
    PROPERTIES_TYPE,
    Begin,
    End,
    Feature,
    HeaderType,
    Object,
    RecordType,
    StreamKind,
    feature_names,
)
from imaging.sendstream.rules import (
    DEFAULT_LIMITS,
    Admitted,
    Limits,
    VolumeRules,
    check_begin,
    reason_not_applicable,
)
from imaging.sendstream.state import VolumeState


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """One verified stream."""

    toname: str
    kind: str
    """``volume`` or ``filesystem``."""
    guid: int
    fromguid: int
    creation_s: int
    features: tuple[str, ...]
    records: int = 0
    volsize_bytes: int | None = None
    """None if the stream does not tell: an increment that keeps the size, or opaque contents."""
    volblocksize_bytes: int | None = None
    not_applicable: str | None = None
    """Why it can be verified but not applied; then only its checksums were checked."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a validator lets pass."""

    limits: Limits = DEFAULT_LIMITS
    whole_blocks: bool = True
    opaque: bool = False
    """Also verify what cannot be applied (encrypted, redacted, filesystems, resuming streams), by checksums alone."""
    base_known: bool = False
    """Refuse increments that do not build on the given base; otherwise one without a base is checked as far as possible."""


class StreamValidator:
    """``feed`` gives the bytes that may be passed on, ``finish`` the last ones; both raise at the first broken rule.

    ``base`` is the volume an increment must build on: its guid, block size and size. ``observe`` is called with every
    record of a volume that keeps the rules; what it is given must not be kept longer than the bytes that were fed.

    Errors: BadDataError (damaged or dangerous), UnsupportedError (unknown features, cannot be applied), ConflictError (base),
    TooLargeError (limits). The message names the rule, the record's number and its byte offset.
    """

    def __init__(
        self,
        base: VolumeState | None = None,
        policy: Policy = Policy(),
        *,
        observe: Callable[[Admitted], None] | None = None,
    ) -> None:
        self._reader = StreamReader()
        self._observe = observe
        self._policy = policy
        self._base = base
        self._rules: VolumeRules | None = None
        self._summary: StreamSummary | None = None
        self._first_record = 0
        self._held: list[memoryview] = []
        self._dataset: str | None = None
        self.is_package = False
        self.summaries: list[StreamSummary] = []
        """The streams that ended so far."""

    def feed(self, data: Buffer) -> bytes:
        """Add a piece; what may be passed on."""
        return b"".join(self.feed_views(data))

    def feed_views(self, data: Buffer) -> list[memoryview]:
        """The same as parts of the pieces that were fed, not copied."""
        out: list[memoryview] = []
        for checked in self._reader.feed_runs(data):
            self._check_all(checked)
            out += self._held
            self._held = []
            if isinstance(checked, WriteRun):
                out.append(checked.view)
            else:
                target = self._held if checked.type == RecordType.END else out
                target += (checked.header, checked.payload)
        return out

    def verify(self, data: Buffer) -> None:
        """Add a piece whose bytes nobody waits for."""
        for checked in self._reader.feed_runs(data):
            self._check_all(checked)

    def finish(self) -> bytes:
        """The input ended; the last END, or the error."""
        self._reader.finish()
        held, self._held = self._held, []
        if not self.summaries:
            raise BadDataError("the package holds no stream")
        return b"".join(held)

    # -- records -------------------------------------------------------------------------------------------------------

    def _check_all(self, checked: Checked) -> None:
        if isinstance(checked, WriteRun) and self._rules is not None and self._observe is None:
            self._rules.admit_run(checked)
            return
        for frame in single_frames(checked):
            self._check(frame)

    def _check(self, frame: Frame) -> None:
        if self._rules is not None:
            admitted = self._rules.admit(frame)
            if self._observe is not None:
                self._observe(admitted)
            if type(admitted.record) is End:
                self._end_volume(self._rules, frame)
        elif frame.type == RecordType.BEGIN:
            begin = frame.record()
            assert isinstance(begin, Begin)
            self._begin(begin, frame)
        elif self._summary is not None:
            self._check_opaque(self._summary, frame)

    def _begin(self, begin: Begin, frame: Frame) -> None:
        if begin.header_type == HeaderType.PACKAGE:
            self.is_package = True
            packaged_datasets(frame.payload)  # raises if the list is malformed
            return
        check_begin(begin)
        self._check_dataset(begin)
        self._first_record = frame.number
        reason = reason_not_applicable(begin)
        if reason is None and begin.features & Feature.RESUMING:
            reason = "it continues an interrupted transfer"
        self._summary = StreamSummary(
            begin.toname,
            StreamKind(begin.kind).name.lower(),
            begin.toguid,
            begin.fromguid,
            begin.creation_s,
            tuple(feature_names(begin.features)),
            not_applicable=reason,
        )
        if reason is not None and self._policy.opaque:
            return
        if reason is not None and begin.kind != StreamKind.FILESYSTEM:
            raise UnsupportedError(f"the stream cannot be applied: {reason} [rule kind]: {frame.where}")
        policy = self._policy
        known = policy.base_known or self._base is not None
        self._rules = VolumeRules(
            begin, self._base, base_known=known, limits=policy.limits, whole_blocks=policy.whole_blocks
        )

    def _check_dataset(self, begin: Begin) -> None:
        if self._dataset not in {None, begin.dataset} and not self._policy.opaque:
            raise BadDataError(
                f"the package holds several datasets: {self._dataset!r}, {begin.dataset!r} [rule dataset]"
            )
        if self._dataset != begin.dataset:
            self._base = self._base if self._dataset is None else None
        self._dataset = begin.dataset

    def _end_volume(self, rules: VolumeRules, frame: Frame) -> None:
        assert self._summary is not None
        size, block_bytes = rules.volume_size_bytes, rules.block_bytes or None
        self._close(replace(self._summary, volsize_bytes=size, volblocksize_bytes=block_bytes), frame)
        self._rules = None
        complete = size is not None or self._base is not None
        self._base = rules.state() if complete else None

    def _check_opaque(self, summary: StreamSummary, frame: Frame) -> None:
        record = frame.record()
        if type(record) is Object and summary.kind == "filesystem" and record.type in {DATA_TYPE, PROPERTIES_TYPE}:
            raise BadDataError(f"a stream of kind filesystem with a volume's contents [rule kind]: {frame.where}")
        if type(record) is End:
            if record.toguid != summary.guid:
                raise BadDataError(f"END is of another snapshot, guid {record.toguid} [rule end]: {frame.where}")
            self._close(summary, frame)

    def _close(self, summary: StreamSummary, frame: Frame) -> None:
        self.summaries.append(replace(summary, records=frame.number - self._first_record + 1))
        self._summary = None
