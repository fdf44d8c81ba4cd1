"""Storage drivers by name. To add one: write it, add a line to DRIVERS, run the contract suite on it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from agent_image.drivers.base import StorageDriver
from imaging.errors import InvalidArgumentError, UnsupportedError
from imaging.names import PoolName

DRIVERS: dict[str, tuple[str, str]] = {
    "file": ("agent_image.drivers.file", "FileDriver"),
    "zfs": ("agent_image.drivers.zfs", "ZfsDriver"),
}
"""Name -> module and class. Imported on demand: the zfs driver needs libraries a machine without ZFS lacks."""


def make_driver(name: str, pool: PoolName, state_dir: Path, **options: Any) -> StorageDriver:
    """Construct the driver of that name, not yet open.

    InvalidArgumentError lists the names there are; UnsupportedError if this machine lacks what the driver needs.
    """
    if name not in DRIVERS:
        raise InvalidArgumentError(f"unknown storage driver {name[:64]!r}; there are: {', '.join(sorted(DRIVERS))}")
    module_name, class_name = DRIVERS[name]
    try:
        constructor = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, OSError) as err:  # OSError: a shared library that does not load
        raise UnsupportedError(f"the {name} driver cannot run on this machine") from err
    driver: StorageDriver = constructor(pool, state_dir, **options)
    return driver
