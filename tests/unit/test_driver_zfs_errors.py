"""Every errno the zfs driver translates, per operation, and what happens to one nobody knows."""

from __future__ import annotations

import errno

import pytest

from agent_image.drivers.zfs.errors import (
    COMMAND_ROWS,
    COMMON,
    ECKSUM,
    ROWS,
    ZFS_ERR_BOOKMARK_SOURCE_NOT_ANCESTOR,
    ZFS_ERR_STREAM_TRUNCATED,
    ZFS_ERR_WRONG_PARENT,
    Failure,
    Operation,
    translate,
    translate_command,
)
from agent_image.drivers.zfs.lzc import failure_of
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

NAME, OTHER = "tank/v@s", "tank/other"

EXPECTED: list[tuple[Operation, int | str, type[MistifyError]]] = [
    (Operation.CREATE, errno.EEXIST, AlreadyExistsError),
    (Operation.CREATE, errno.ENOENT, NotFoundError),
    (Operation.CREATE, errno.EINVAL, InvalidArgumentError),
    (Operation.CREATE, 1044, InvalidArgumentError),
    (Operation.CREATE, ZFS_ERR_WRONG_PARENT, WrongKindError),
    (Operation.CREATE, errno.ERANGE, InvalidArgumentError),
    (Operation.CREATE, errno.EOVERFLOW, InvalidArgumentError),
    (Operation.CREATE, errno.EDOM, InvalidArgumentError),
    (Operation.CLONE, errno.EEXIST, AlreadyExistsError),
    (Operation.CLONE, errno.ENOENT, NotFoundError),
    (Operation.CLONE, errno.EINVAL, InvalidArgumentError),
    (Operation.CLONE, 1044, InvalidArgumentError),
    (Operation.CLONE, ZFS_ERR_WRONG_PARENT, WrongKindError),
    (Operation.CLONE, errno.EAGAIN, UnavailableError),
    (Operation.SNAPSHOT, errno.EEXIST, AlreadyExistsError),
    (Operation.SNAPSHOT, errno.ENOENT, NotFoundError),
    (Operation.SNAPSHOT, errno.EINVAL, InvalidArgumentError),
    (Operation.SNAPSHOT, "NameInvalid", InvalidNameError),
    (Operation.SNAPSHOT, errno.EXDEV, InvalidArgumentError),
    (Operation.DESTROY, errno.ENOENT, NotFoundError),
    (Operation.DESTROY, errno.EEXIST, BusyError),
    (Operation.DESTROY, errno.ENOTEMPTY, BusyError),
    (Operation.DESTROY, errno.EBUSY, BusyError),
    (Operation.DESTROY_SNAPSHOTS, "SnapshotIsCloned", BusyError),
    (Operation.DESTROY_SNAPSHOTS, "SnapshotIsHeld", BusyError),
    (Operation.DESTROY_SNAPSHOTS, "PoolNotFound", UnavailableError),
    (Operation.DESTROY_SNAPSHOTS, errno.EEXIST, BusyError),
    (Operation.DESTROY_SNAPSHOTS, errno.EBUSY, BusyError),
    (Operation.DESTROY_SNAPSHOTS, errno.ENOENT, NotFoundError),
    (Operation.ROLLBACK, errno.EEXIST, BusyError),
    (Operation.ROLLBACK, errno.ESRCH, NotFoundError),
    (Operation.ROLLBACK, errno.EXDEV, NotFoundError),
    (Operation.ROLLBACK, errno.ENOENT, NotFoundError),
    (Operation.ROLLBACK, errno.EBUSY, BusyError),
    (Operation.ROLLBACK, errno.ETXTBSY, BusyError),
    (Operation.ROLLBACK, "NameInvalid", InvalidArgumentError),
    (Operation.RENAME, errno.EEXIST, AlreadyExistsError),
    (Operation.RENAME, errno.ENOENT, NotFoundError),
    (Operation.RENAME, errno.EINVAL, InvalidArgumentError),
    (Operation.RENAME, errno.EXDEV, InvalidNameError),
    (Operation.RENAME, ZFS_ERR_WRONG_PARENT, WrongKindError),
    (Operation.RENAME, errno.ENAMETOOLONG, InvalidNameError),
    (Operation.RENAME, errno.EBUSY, BusyError),
    (Operation.PROMOTE, "NotClone", InvalidArgumentError),
    (Operation.PROMOTE, errno.EINVAL, InvalidArgumentError),
    (Operation.PROMOTE, errno.ENOTSOCK, InvalidArgumentError),
    (Operation.PROMOTE, errno.EEXIST, AlreadyExistsError),
    (Operation.PROMOTE, errno.ENOENT, NotFoundError),
    (Operation.HOLD, errno.EEXIST, AlreadyExistsError),
    (Operation.HOLD, errno.ENOENT, NotFoundError),
    (Operation.HOLD, errno.E2BIG, InvalidArgumentError),
    (Operation.HOLD, errno.EINVAL, InvalidArgumentError),
    (Operation.HOLD, errno.ENOTSUP, UnsupportedError),
    (Operation.RELEASE, "HoldNotFound", NotFoundError),
    (Operation.RELEASE, errno.ENOENT, NotFoundError),
    (Operation.RELEASE, errno.ESRCH, NotFoundError),
    (Operation.RELEASE, errno.E2BIG, InvalidArgumentError),
    (Operation.RELEASE, errno.EINVAL, InvalidArgumentError),
    (Operation.LIST_HOLDS, errno.ENOENT, NotFoundError),
    (Operation.BOOKMARK, errno.EEXIST, AlreadyExistsError),
    (Operation.BOOKMARK, errno.ENOENT, NotFoundError),
    (Operation.BOOKMARK, errno.EINVAL, InvalidArgumentError),
    (Operation.BOOKMARK, errno.ENOTSUP, UnsupportedError),
    (Operation.BOOKMARK, ZFS_ERR_BOOKMARK_SOURCE_NOT_ANCESTOR, ConflictError),
    (Operation.SEND, errno.ENOENT, NotFoundError),
    (Operation.SEND, errno.ESRCH, NotFoundError),
    (Operation.SEND, errno.EXDEV, InvalidArgumentError),
    (Operation.SEND, errno.ENODEV, InvalidArgumentError),
    (Operation.SEND, errno.EPIPE, UnavailableError),
    (Operation.SEND, errno.ECONNRESET, UnavailableError),
    (Operation.SEND, errno.EINTR, UnavailableError),
    (Operation.SEND, errno.EACCES, NotPermittedError),
    (Operation.SEND, errno.ENOTSUP, UnsupportedError),
    (Operation.SEND, errno.EINVAL, InvalidArgumentError),
    (Operation.RECEIVE, "NameInvalid", InvalidNameError),
    (Operation.RECEIVE, "BadStream", BadDataError),
    (Operation.RECEIVE, errno.EINVAL, BadDataError),
    (Operation.RECEIVE, ECKSUM, BadDataError),
    (Operation.RECEIVE, ZFS_ERR_STREAM_TRUNCATED, BadDataError),
    (Operation.RECEIVE, 1037, UnsupportedError),
    (Operation.RECEIVE, errno.ENOTSUP, UnsupportedError),
    (Operation.RECEIVE, 1041, ConflictError),
    (Operation.RECEIVE, 1034, ConflictError),
    (Operation.RECEIVE, 1035, ConflictError),
    (Operation.RECEIVE, errno.ENODEV, ConflictError),
    (Operation.RECEIVE, errno.ETXTBSY, ConflictError),
    (Operation.RECEIVE, errno.EEXIST, AlreadyExistsError),
    (Operation.RECEIVE, errno.ENOENT, NotFoundError),
    (Operation.RECEIVE, ZFS_ERR_WRONG_PARENT, WrongKindError),
    (Operation.RECEIVE, 1044, InvalidArgumentError),
    (Operation.RECEIVE, errno.EBUSY, BusyError),
    (Operation.RECEIVE, errno.EINTR, UnavailableError),
    (Operation.SET, errno.ENOENT, NotFoundError),
    (Operation.SET, errno.EINVAL, InvalidArgumentError),
    (Operation.SET, 1044, InvalidArgumentError),
    (Operation.READ, errno.ENOENT, NotFoundError),
    (Operation.READ, errno.EXDEV, UnavailableError),
    (Operation.READ, errno.ETIME, UnavailableError),
    (Operation.READ, errno.ENOMEM, UnavailableError),
]
EXPECTED_OF_ALL: list[tuple[int | str, type[MistifyError]]] = [
    ("PoolNotFound", UnavailableError),
    (errno.ENOSPC, NoSpaceError),
    (errno.EDQUOT, NoSpaceError),
    (errno.EBUSY, BusyError),
    (errno.ENAMETOOLONG, InvalidNameError),
    (errno.EROFS, NotPermittedError),
    (errno.EPERM, NotPermittedError),
    (errno.EACCES, NotPermittedError),
    (errno.EAGAIN, UnavailableError),
    (errno.EIO, UnavailableError),
    (errno.ENXIO, UnavailableError),
    (errno.ENOMEM, UnavailableError),
    (errno.EXDEV, InvalidNameError),
    (errno.ENOTSUP, UnsupportedError),
    (1038, UnavailableError),
]
UNKNOWN_ERRNO = 1999


def _failure(key: int | str) -> Failure:
    return Failure(key, "ZFSGenericError") if isinstance(key, int) else Failure(UNKNOWN_ERRNO, key)


@pytest.mark.parametrize(("operation", "key", "kind"), EXPECTED)
def test_row_of_an_operation_gives_its_error_with_the_arguments(
    operation: Operation, key: int | str, kind: type[MistifyError]
) -> None:
    error = translate(operation, _failure(key), NAME, OTHER)
    assert type(error) is kind
    row = ROWS[operation][key]
    assert error.message == row.text.format(name=NAME, other=OTHER)
    assert NAME in error.message or OTHER in error.message or kind is InvalidNameError


def test_every_row_of_every_operation_is_in_this_table() -> None:
    assert {(operation, key) for operation, rows in ROWS.items() for key in rows} == {row[:2] for row in EXPECTED}
    assert set(ROWS) == set(Operation)


@pytest.mark.parametrize(("key", "kind"), EXPECTED_OF_ALL)
def test_row_common_to_all_gives_its_error(key: int | str, kind: type[MistifyError]) -> None:
    error = translate(Operation.LIST_HOLDS, _failure(key), NAME)
    assert type(error) is kind
    assert NAME in error.message


def test_every_common_row_is_in_this_table() -> None:
    assert set(COMMON) == {key for key, _ in EXPECTED_OF_ALL}


@pytest.mark.parametrize("operation", list(Operation))
def test_unknown_number_is_internal_and_in_the_text(operation: Operation) -> None:
    error = translate(operation, Failure(UNKNOWN_ERRNO, "ZFSGenericError"), NAME, OTHER)
    assert type(error) is InternalError
    assert str(UNKNOWN_ERRNO) in error.message
    assert NAME in error.message


def test_class_of_the_failure_goes_before_its_number() -> None:
    """pyzfs calls a missing pool EXDEV, which to destroy means another pool."""
    error = translate(Operation.DESTROY_SNAPSHOTS, Failure(errno.EXDEV, "PoolNotFound"), NAME)
    assert type(error) is UnavailableError


@pytest.mark.parametrize(("sentence", "kind"), [(sentence, row.kind) for sentence, row in COMMAND_ROWS])
def test_sentence_of_the_zfs_program_gives_its_error(sentence: str, kind: type[MistifyError]) -> None:
    error = translate_command(f"cannot set property for '{NAME}': {sentence}\n", Operation.SET, NAME)
    assert type(error) is kind
    assert NAME in error.message


def test_unknown_sentence_of_the_zfs_program_is_internal_and_not_shown() -> None:
    error = translate_command("cannot: something new", Operation.SET, NAME)
    assert type(error) is InternalError
    assert "something new" not in error.message


class SwappedError(Exception):
    """As pyzfs raises for a number it does not know: text in the place of the name and the other way round."""

    errno = errno.EOPNOTSUPP
    name = "Failed to create clone"
    message = "tank/vm1"


class SeveralError(Exception):
    """As pyzfs raises when a call works on several objects."""

    errno = errno.EEXIST

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__()
        self.errors = errors


def test_failure_is_read_from_number_and_class_alone() -> None:
    assert failure_of(SwappedError()) == Failure(errno.EOPNOTSUPP, "SwappedError")
    assert failure_of(SeveralError([SwappedError()])) == Failure(errno.EOPNOTSUPP, "SwappedError")
    assert failure_of(SeveralError([])) == Failure(errno.EEXIST, "SeveralError")
    assert failure_of(ValueError("no number at all")) == Failure(0, "ValueError")
