"""Find and import libzfs_core, the distribution's Python binding.

It belongs to the ZFS of the running kernel, so it comes from the distribution (python3-pyzfs) and never from PyPI, whose build of that
name crashes. A virtual environment does not see the distribution's packages, and putting their whole directory on the path would
let its other packages shadow ours: this one package is loaded from where it lies.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

from imaging.errors import UnsupportedError

DIST_PACKAGES = (Path("/usr/lib/python3/dist-packages"), Path("/usr/lib/python3/site-packages"))
PACKAGE = "libzfs_core"
ADVICE = "install it with: apt-get install zfsutils-linux python3-pyzfs"

_loading = threading.Lock()


def load(places: tuple[Path, ...] = DIST_PACKAGES) -> ModuleType:
    """The libzfs_core package; UnsupportedError says how to get it."""
    with _loading:
        if PACKAGE in sys.modules:
            return sys.modules[PACKAGE]
        for place in places:
            if (place / PACKAGE / "__init__.py").exists():
                return _load_from(place / PACKAGE)
    raise UnsupportedError(f"the zfs driver needs libzfs_core, which is not installed; {ADVICE}")


def _load_from(directory: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    if spec is None or spec.loader is None:
        raise UnsupportedError(f"cannot load libzfs_core from {directory}; {ADVICE}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except Exception as err:
        _forget()
        raise UnsupportedError(
            f"cannot load libzfs_core from {directory} (cffi missing, or another ZFS); {ADVICE}"
        ) from err
    return module


def _forget() -> None:
    """A half-imported package must not look loaded."""
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]:
        del sys.modules[name]


def exceptions() -> ModuleType:
    """libzfs_core's exception classes, after :func:`load`."""
    return importlib.import_module(f"{PACKAGE}.exceptions")
