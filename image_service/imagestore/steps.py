"""Errors in two parts: what step failed, caused by why. The class, and so the code, is the cause's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from imaging.errors import MistifyError, from_os_error


@contextmanager
def step(text: str) -> Iterator[None]:
    """Whatever goes wrong inside is told as ``text``, with the reason as its cause."""
    try:
        yield
    except MistifyError as err:
        raise type(err)(text) from err
    except OSError as err:
        raise type(from_os_error(err, text))(text) from err


def chain(err: BaseException) -> str:
    """The whole story in one line: each part after the one it caused."""
    parts: list[str] = []
    cause: BaseException | None = err
    while cause is not None:
        text = cause.message if isinstance(cause, MistifyError) else (getattr(cause, "strerror", None) or str(cause))
        if text and text not in parts:
            parts.append(" ".join(text.split()))
        cause = cause.__cause__
    return ": ".join(parts)
