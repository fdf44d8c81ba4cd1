"""The error taxonomy: one class per thing a caller would *do differently*.

Nothing else in the project defines a public exception. Rules:

* A message says what failed and on what, never its cause; ``raise ... from err`` keeps the cause.
* The outermost class decides the code and the HTTP status.
* ``retryable`` says whether the same call may succeed later without anybody changing the request.
* A foreign exception (OSError, sqlite3.Error, ...) is translated at one border, by :func:`from_os_error` or a table
  beside the call.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar


class MistifyError(Exception):
    """Base of every error that may leave a public function. Never raised itself."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        """The sentence a caller sees."""
        return str(self.args[0]) if self.args else self.code


class InvalidArgumentError(MistifyError):
    """The request itself is wrong; change it."""

    code = "invalid_argument"
    http_status = 400


class InvalidNameError(InvalidArgumentError):
    """A name breaks the grammar or leaves its place (another pool, ``..``)."""

    code = "invalid_name"


class WrongKindError(InvalidArgumentError):
    """The thing exists but is of another kind (``not a volume``, ``not a snapshot``)."""

    code = "wrong_kind"


class NotFoundError(MistifyError):
    """The thing does not exist."""

    code = "not_found"
    http_status = 404


class AlreadyExistsError(MistifyError):
    """The name is taken by something else."""

    code = "already_exists"
    http_status = 409


class BusyError(MistifyError):
    """Something else needs the thing; ``dependants`` names what (clones, holds, open devices, running sends)."""

    code = "busy"
    http_status = 409
    retryable = True

    def __init__(self, message: str, dependants: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.dependants = tuple(dependants)


class ConflictError(MistifyError):
    """The record changed since it was read: read it again and decide anew."""

    code = "conflict"
    http_status = 409


class LeaseLostError(ConflictError):
    """The turn at something is over: somebody else goes on with it, so leave everything as it is."""

    code = "lease_lost"


class BadDataError(MistifyError):
    """Bytes are not what they claim: wrong digest, damaged stream, malformed or dangerous format."""

    code = "bad_data"
    http_status = 422


class TooLargeError(MistifyError):
    """A named limit on the size of the input would be passed."""

    code = "too_large"
    http_status = 413


class StoreRemovalError(MistifyError):
    """The thing is removed, but some of its files are not: nobody sees it any more, and a check of the store clears them away."""

    code = "stale_files"


class NoSpaceError(MistifyError):
    """No space left on the pool, disk or quota."""

    code = "no_space"
    http_status = 507


class UnsupportedError(MistifyError):
    """Valid, but not something this program (or this driver, or this pool) can do."""

    code = "unsupported"
    http_status = 501


class NotPermittedError(MistifyError):
    """Refused by policy: missing token, forbidden address, protected dataset."""

    code = "not_permitted"
    http_status = 403


class UnavailableError(MistifyError):
    """Something needed is down, slow or full right now; try again later."""

    code = "unavailable"
    http_status = 503
    retryable = True


class InternalError(MistifyError):
    """Our own fault. Callers see an incident id; the log has the chain."""

    code = "internal"


_BY_ERRNO: dict[int, type[MistifyError]] = {
    errno.ENOENT: NotFoundError,
    errno.EEXIST: AlreadyExistsError,
    errno.ENOTEMPTY: BusyError,
    errno.EBUSY: BusyError,
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EFBIG: NoSpaceError,
    errno.EACCES: NotPermittedError,
    errno.EPERM: NotPermittedError,
    errno.EROFS: NotPermittedError,
    errno.ENAMETOOLONG: InvalidNameError,
    errno.EMFILE: UnavailableError,
    errno.ENFILE: UnavailableError,
    errno.ENOMEM: UnavailableError,
    errno.ETIMEDOUT: UnavailableError,
    errno.ECONNREFUSED: UnavailableError,
    errno.ECONNRESET: UnavailableError,
    errno.EPIPE: UnavailableError,
    errno.EIO: UnavailableError,
}


def from_os_error(err: OSError, what: str) -> MistifyError:
    """Translate an OSError; ``what`` is the sentence that says what failed and on what.

    The caller raises the result ``from err``. Anything the table does not know becomes :class:`InternalError`.
    """
    kind = _BY_ERRNO.get(err.errno or 0, InternalError)
    return kind(what if kind is not NoSpaceError else f"{what}: no space left on device")
