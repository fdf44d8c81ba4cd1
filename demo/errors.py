"""The one error of the demo: a sentence for the person who typed ``make demo``."""

from __future__ import annotations


class DemoError(Exception):
    """A step did not do what it should; the message says which and what to do about it."""
