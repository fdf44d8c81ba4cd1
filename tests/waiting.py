"""Waiting for a condition with a bound. Tests never sleep for a fixed time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = float(os.environ.get("MISTIFY_PATIENCE", "1"))
"""By how much every bound is longer than said: on an emulated machine all takes ten times as long."""

_TICK = threading.Event()


def wait_until(condition: Callable[[], T], what: str, *, timeout_s: float = 30.0, poll_s: float = 0.02) -> T:
    """Call ``condition`` until it gives something true and return that; AssertionError names ``what`` after the bound."""
    timeout_s *= PATIENCE
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for: {what}")
        _TICK.wait(poll_s)
