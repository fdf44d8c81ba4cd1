"""What an errno of ZFS means, per operation: pure tables, no IO.

The same number says different things: EEXIST is "the name is taken" to create, "has newer snapshots" to rollback and "has clones" to
destroy. A row is found by the class pyzfs raised (some classes say more than their number, others hide it), then by the number for
this operation, then by the number for all; what no row knows is InternalError with the number in its text.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum

from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    BusyError,
    ConflictError,
    InternalError,
    InvalidArgumentError,
    InvalidNameError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UnsupportedError,
    WrongKindError,
)

# Numbers of ZFS's own (sys/fs/zfs.h); libzfs_core hands them out as if they were errnos.
ZFS_ERR_WRONG_PARENT = 1033
ZFS_ERR_FROM_IVSET_GUID_MISSING = 1034
ZFS_ERR_FROM_IVSET_GUID_MISMATCH = 1035
ZFS_ERR_UNKNOWN_SEND_STREAM_FEATURE = 1037
ZFS_ERR_EXPORT_IN_PROGRESS = 1038
ZFS_ERR_BOOKMARK_SOURCE_NOT_ANCESTOR = 1039
ZFS_ERR_STREAM_TRUNCATED = 1040
ZFS_ERR_STREAM_LARGE_BLOCK_MISMATCH = 1041
ZFS_ERR_BADPROP = 1044
ECKSUM = errno.EBADE
"""ZFS on Linux says EBADE for a checksum that does not match."""


class Operation(StrEnum):
    """What was asked of ZFS; the word stands in messages."""

    CREATE = "create"
    CLONE = "clone"
    SNAPSHOT = "snapshot"
    DESTROY = "destroy"
    DESTROY_SNAPSHOTS = "destroy snapshot"
    ROLLBACK = "roll back"
    RENAME = "rename"
    PROMOTE = "promote"
    HOLD = "hold"
    RELEASE = "release"
    LIST_HOLDS = "list holds of"
    BOOKMARK = "bookmark"
    SEND = "send"
    RECEIVE = "receive"
    SET = "set properties of"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure as pyzfs reported it."""

    errno: int
    raised: str = ""
    """Name of the pyzfs exception class."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a caller gets; the text may use ``{name}`` and ``{other}`` (the call's arguments)."""

    kind: type[MistifyError]
    text: str


_EXISTS = Row(AlreadyExistsError, "{name} exists already")
_MISSING = Row(NotFoundError, "{name} not found")
_BAD_PROPERTY = Row(InvalidArgumentError, "ZFS refuses a property of {name}")
_BAD_STREAM = Row(BadDataError, "the kernel refuses the stream for {name}")
_OTHER_BASE = Row(ConflictError, "the stream does not build on what {name} is made of")
_BROKEN_PIPE = Row(UnavailableError, "the reader of {name} went away")

ROWS: dict[Operation, dict[int | str, Row]] = {
    Operation.CREATE: {
        errno.EEXIST: _EXISTS,
        errno.ENOENT: Row(NotFoundError, "the parent of {name} does not exist"),
        errno.EINVAL: _BAD_PROPERTY,
        ZFS_ERR_BADPROP: _BAD_PROPERTY,
        ZFS_ERR_WRONG_PARENT: Row(WrongKindError, "the parent of {name} is not a filesystem"),
        errno.ERANGE: Row(InvalidArgumentError, "the block size of {name} is out of range"),
        errno.EOVERFLOW: Row(InvalidArgumentError, "the size of {name} is too large"),
        errno.EDOM: Row(InvalidArgumentError, "the block size of {name} is too large for the pool"),
    },
    Operation.CLONE: {
        errno.EEXIST: _EXISTS,
        errno.ENOENT: Row(NotFoundError, "{other} or the parent of {name} does not exist"),
        errno.EINVAL: _BAD_PROPERTY,
        ZFS_ERR_BADPROP: _BAD_PROPERTY,
        ZFS_ERR_WRONG_PARENT: Row(WrongKindError, "the parent of {name} is not a filesystem"),
        errno.EAGAIN: Row(UnavailableError, "the pool of {name} is suspended"),
    },
    Operation.SNAPSHOT: {
        errno.EEXIST: _EXISTS,
        errno.ENOENT: _MISSING,
        errno.EINVAL: _BAD_PROPERTY,
        "NameInvalid": Row(InvalidNameError, "not a valid snapshot name: {name}"),
        errno.EXDEV: Row(InvalidArgumentError, "{name} asked for twice at once"),
    },
    Operation.DESTROY: {
        errno.ENOENT: _MISSING,
        errno.EEXIST: Row(BusyError, "{name} has children"),
        errno.ENOTEMPTY: Row(BusyError, "{name} has children"),
        errno.EBUSY: Row(BusyError, "{name} is in use"),
    },
    Operation.DESTROY_SNAPSHOTS: {
        "SnapshotIsCloned": Row(BusyError, "{name} has clones"),
        "SnapshotIsHeld": Row(BusyError, "{name} is held or in use"),
        "PoolNotFound": Row(UnavailableError, "the pool of {name} is not imported"),
        errno.EEXIST: Row(BusyError, "{name} has clones"),
        errno.EBUSY: Row(BusyError, "{name} is held or in use"),
        errno.ENOENT: _MISSING,
    },
    Operation.ROLLBACK: {
        errno.EEXIST: Row(BusyError, "{name} has snapshots newer than {other}"),
        errno.ESRCH: Row(NotFoundError, "{other} not found"),
        errno.EXDEV: Row(NotFoundError, "{other} is not a snapshot of {name}"),
        errno.ENOENT: _MISSING,
        errno.EBUSY: Row(BusyError, "{name} is in use"),
        errno.ETXTBSY: Row(BusyError, "{name} is in use"),
        "NameInvalid": Row(InvalidArgumentError, "cannot roll {name} back to {other}"),
    },
    Operation.RENAME: {
        errno.EEXIST: Row(AlreadyExistsError, "{other} exists already"),
        errno.ENOENT: Row(NotFoundError, "{name} or the parent of {other} does not exist"),
        errno.EINVAL: Row(InvalidArgumentError, "cannot rename {name} to {other}"),
        errno.EXDEV: Row(InvalidNameError, "{other} is in another pool than {name}"),
        ZFS_ERR_WRONG_PARENT: Row(WrongKindError, "the parent of {other} is not a filesystem"),
        errno.ENAMETOOLONG: Row(InvalidNameError, "a name below {other} would be too long"),
        errno.EBUSY: Row(BusyError, "{name} is in use"),
    },
    Operation.PROMOTE: {
        "NotClone": Row(InvalidArgumentError, "{name} is not a clone"),
        errno.EINVAL: Row(InvalidArgumentError, "{name} is not a clone"),
        errno.ENOTSOCK: Row(InvalidArgumentError, "{name} is not a clone"),
        errno.EEXIST: Row(AlreadyExistsError, "{name} and its origin have a snapshot of the same name"),
        errno.ENOENT: _MISSING,
    },
    Operation.HOLD: {
        errno.EEXIST: Row(AlreadyExistsError, "{name} is held with tag {other} already"),
        errno.ENOENT: _MISSING,
        errno.E2BIG: Row(InvalidArgumentError, "the tag for {name} is too long"),
        errno.EINVAL: Row(InvalidArgumentError, "not a valid hold of {name}"),
        errno.ENOTSUP: Row(UnsupportedError, "the pool of {name} has no holds"),
    },
    Operation.RELEASE: {
        "HoldNotFound": Row(NotFoundError, "{name} is not held with tag {other}"),
        errno.ENOENT: Row(NotFoundError, "{name} is not held with tag {other}"),
        errno.ESRCH: Row(NotFoundError, "{name} is not held with tag {other}"),
        errno.E2BIG: Row(InvalidArgumentError, "the tag for {name} is too long"),
        errno.EINVAL: Row(InvalidArgumentError, "not a valid hold of {name}"),
    },
    Operation.LIST_HOLDS: {
        errno.ENOENT: _MISSING,
    },
    Operation.BOOKMARK: {
        errno.EEXIST: Row(AlreadyExistsError, "{name} exists already"),
        errno.ENOENT: Row(NotFoundError, "{other} not found"),
        errno.EINVAL: Row(InvalidArgumentError, "cannot make {name} from {other}"),
        errno.ENOTSUP: Row(UnsupportedError, "the pool of {name} has no bookmarks"),
        ZFS_ERR_BOOKMARK_SOURCE_NOT_ANCESTOR: Row(ConflictError, "{other} is not a snapshot of what {name} belongs to"),
    },
    Operation.SEND: {
        errno.ENOENT: Row(NotFoundError, "{name} or its base {other} not found"),
        errno.ESRCH: Row(NotFoundError, "the base {other} of {name} not found"),
        errno.EXDEV: Row(InvalidArgumentError, "{other} is no earlier state of {name}"),
        errno.ENODEV: Row(InvalidArgumentError, "{other} is no earlier state of {name}"),
        errno.EPIPE: _BROKEN_PIPE,
        errno.ECONNRESET: _BROKEN_PIPE,
        errno.EINTR: Row(UnavailableError, "sending {name} was interrupted"),
        errno.EACCES: Row(NotPermittedError, "the key of {name} is not loaded"),
        errno.ENOTSUP: Row(UnsupportedError, "{name} cannot be sent with these flags"),
        errno.EINVAL: Row(InvalidArgumentError, "{name} cannot be sent from {other}"),
    },
    Operation.RECEIVE: {
        "NameInvalid": Row(InvalidNameError, "not a valid dataset"),
        "BadStream": _BAD_STREAM,
        errno.EINVAL: _BAD_STREAM,
        ECKSUM: _BAD_STREAM,
        ZFS_ERR_STREAM_TRUNCATED: Row(BadDataError, "the stream for {name} ends early"),
        ZFS_ERR_UNKNOWN_SEND_STREAM_FEATURE: Row(UnsupportedError, "the stream for {name} has a feature unknown here"),
        errno.ENOTSUP: Row(UnsupportedError, "the stream for {name} has a feature the pool lacks"),
        ZFS_ERR_STREAM_LARGE_BLOCK_MISMATCH: _OTHER_BASE,
        ZFS_ERR_FROM_IVSET_GUID_MISSING: _OTHER_BASE,
        ZFS_ERR_FROM_IVSET_GUID_MISMATCH: _OTHER_BASE,
        errno.ENODEV: _OTHER_BASE,
        errno.ETXTBSY: Row(ConflictError, "{name} was written or has newer snapshots since its last common snapshot"),
        errno.EEXIST: _EXISTS,
        errno.ENOENT: Row(NotFoundError, "{name}, its parent or its origin does not exist"),
        ZFS_ERR_WRONG_PARENT: Row(WrongKindError, "the parent of {name} is not a filesystem"),
        ZFS_ERR_BADPROP: _BAD_PROPERTY,
        errno.EBUSY: Row(BusyError, "{name} is being received or in use"),
        errno.EINTR: Row(UnavailableError, "receiving {name} was interrupted"),
    },
    Operation.SET: {
        errno.ENOENT: _MISSING,
        errno.EINVAL: _BAD_PROPERTY,
        ZFS_ERR_BADPROP: _BAD_PROPERTY,
    },
    Operation.READ: {
        errno.ENOENT: _MISSING,
        errno.EXDEV: Row(UnavailableError, "the pool of {name} is not imported"),
        errno.ETIME: Row(UnavailableError, "reading {name} took too long"),
        errno.ENOMEM: Row(UnavailableError, "reading {name} needs too much memory"),
    },
}

COMMON: dict[int | str, Row] = {
    "PoolNotFound": Row(UnavailableError, "the pool of {name} is not imported"),
    errno.ENOSPC: Row(NoSpaceError, "no space left for {name}: no space left on device"),
    errno.EDQUOT: Row(NoSpaceError, "the quota of {name} is used up: no space left on device"),
    errno.EBUSY: Row(BusyError, "{name} is in use"),
    errno.ENAMETOOLONG: Row(InvalidNameError, "the name is too long: {name}"),
    errno.EROFS: Row(NotPermittedError, "the pool of {name} is read-only"),
    errno.EPERM: Row(NotPermittedError, "not allowed on {name}"),
    errno.EACCES: Row(NotPermittedError, "not allowed on {name}"),
    errno.EAGAIN: Row(UnavailableError, "the pool of {name} is suspended"),
    errno.EIO: Row(UnavailableError, "an I/O error on {name}"),
    errno.ENXIO: Row(UnavailableError, "the pool of {name} lacks a device"),
    errno.ENOMEM: Row(UnavailableError, "out of memory at {name}"),
    errno.EXDEV: Row(InvalidNameError, "{name} is in another pool"),
    errno.ENOTSUP: Row(UnsupportedError, "this pool cannot do that to {name}"),
    ZFS_ERR_EXPORT_IN_PROGRESS: Row(UnavailableError, "the pool of {name} is being exported"),
}

# What the zfs program says at the end of its line, where it has to be used (`zfs set`, `zfs list`).
COMMAND_ROWS: tuple[tuple[str, Row], ...] = (
    ("dataset does not exist", _MISSING),
    ("no such pool", Row(UnavailableError, "the pool of {name} is not imported")),
    ("pool I/O is currently suspended", Row(UnavailableError, "the pool of {name} is suspended")),
    ("dataset is read-only", Row(NotPermittedError, "{name} is read-only")),
    ("dataset is busy", Row(BusyError, "{name} is in use")),
    ("size is less than current used or reserved space", Row(NoSpaceError, "{name} uses more than that already")),
    ("size is greater than available space", Row(NoSpaceError, "no space left for {name}: no space left on device")),
    ("out of space", Row(NoSpaceError, "no space left for {name}: no space left on device")),
    ("permission denied", Row(NotPermittedError, "not allowed on {name}")),
    ("bad numeric value", _BAD_PROPERTY),
    ("invalid property", _BAD_PROPERTY),
    (
        "must be a multiple of volume block size",
        Row(InvalidArgumentError, "the size of {name} is no multiple of its blocks"),
    ),
    ("property value too long", _BAD_PROPERTY),
)


def translate(operation: Operation, failure: Failure, name: str, other: str = "") -> MistifyError:
    """The error for the caller; raise it from what pyzfs raised."""
    rows = ROWS[operation]
    for row in (
        rows.get(failure.raised),
        rows.get(failure.errno),
        COMMON.get(failure.raised),
        COMMON.get(failure.errno),
    ):
        if row is not None:
            return row.kind(row.text.format(name=name, other=other))
    return InternalError(
        f"cannot {operation} {name}: ZFS says {failure.errno} ({errno.errorcode.get(failure.errno, '?')})"
    )


def translate_command(stderr: str, operation: Operation, name: str) -> MistifyError:
    """The error for the caller when the zfs program failed; only known sentences are recognised, never shown."""
    for sentence, row in COMMAND_ROWS:
        if sentence in stderr:
            return row.kind(row.text.format(name=name, other=""))
    return InternalError(f"cannot {operation} {name}: the zfs program refused")
