"""The taxonomy: every class has its own code, every errno its class, the unknown one too."""

from __future__ import annotations

import errno
import inspect

import pytest

from imaging import errors
from imaging.errors import (
    AlreadyExistsError,
    BusyError,
    InternalError,
    InvalidNameError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    from_os_error,
)

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, MistifyError) and kind is not MistifyError
]

OS_ERRORS = [
    (errno.ENOENT, NotFoundError),
    (errno.EEXIST, AlreadyExistsError),
    (errno.ENOTEMPTY, BusyError),
    (errno.EBUSY, BusyError),
    (errno.ENOSPC, NoSpaceError),
    (errno.EDQUOT, NoSpaceError),
    (errno.EFBIG, NoSpaceError),
    (errno.EACCES, NotPermittedError),
    (errno.EROFS, NotPermittedError),
    (errno.ENAMETOOLONG, InvalidNameError),
    (errno.EMFILE, UnavailableError),
    (errno.ECONNREFUSED, UnavailableError),
    (errno.EIO, UnavailableError),
    (errno.EXDEV, InternalError),
    (None, InternalError),
]


def test_every_class_has_its_own_code_and_an_http_status() -> None:
    assert len(CLASSES) >= 13
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)
    assert all(400 <= kind.http_status <= 599 for kind in CLASSES)


def test_only_what_may_pass_by_itself_is_retryable() -> None:
    assert {kind for kind in CLASSES if kind.retryable} == {BusyError, UnavailableError}


@pytest.mark.parametrize("kind", CLASSES)
def test_message_is_the_first_argument_or_the_code(kind: type[MistifyError]) -> None:
    assert kind("cannot do it").message == "cannot do it"
    if kind is not BusyError:
        assert kind().message == kind.code


def test_busy_names_what_stands_in_the_way() -> None:
    assert BusyError("busy").dependants == ()
    assert BusyError("busy", ["tank/clone", "hold keep"]).dependants == ("tank/clone", "hold keep")


@pytest.mark.parametrize(("code", "expected"), OS_ERRORS)
def test_os_error_is_translated(code: int | None, expected: type[MistifyError]) -> None:
    err = OSError(code, "text of the system") if code is not None else OSError("no number")
    translated = from_os_error(err, "cannot open /x")
    assert type(translated) is expected
    assert translated.message.startswith("cannot open /x")
    assert "text of the system" not in translated.message
    assert ("no space left on device" in translated.message) is (expected is NoSpaceError)
