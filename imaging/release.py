"""Which release of the image stack this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "mistify-image-stack"
UNKNOWN = "0"
"""Of a checkout that was never installed."""


def release() -> str:
    """The version of the installed distribution."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return UNKNOWN
