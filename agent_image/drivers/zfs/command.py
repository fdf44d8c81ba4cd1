"""The zfs program, for what libzfs_core of 2.1 cannot: listing the pool in bulk and setting properties that are not the user's.

Arguments are parsed names and values we made ourselves, they stand behind ``--`` where the program takes one, the environment is ours,
the run is bounded in time, its output in size.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from agent_image.drivers.zfs.errors import Operation, translate_command
from imaging.errors import InternalError, UnavailableError, UnsupportedError

PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
SET_TIMEOUT_S = 60.0
"""A property change waits for one transaction group: seconds on a loaded pool of disks."""
LIST_TIMEOUT_S = 600.0
"""10,000 objects took 98 s on an emulated machine; a real one needs a few seconds."""
OUTPUT_MAX_BYTES = 256 << 20
"""About 250 bytes an object: a million objects."""
STDERR_MAX_BYTES = 64 << 10


def program(name: str) -> str:
    """The absolute path of ``zfs`` or ``zpool``."""
    found = shutil.which(name, path=PATH)
    if found is None:
        raise UnsupportedError(f"the program {name} is not installed; install it with: apt-get install zfsutils-linux")
    return found


def run_zfs(arguments: Sequence[str], *, operation: Operation, subject: str, timeout_s: float) -> str:
    """Run ``zfs`` and return what it printed."""
    command = [program("zfs"), *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - absolute path, arguments of ours
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT
        )
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.start()
        try:
            output = _read(process)
        finally:
            timer.cancel()
        errors.seek(0)
        stderr = errors.read(STDERR_MAX_BYTES).decode("utf-8", "replace")
    if expired.is_set():
        raise UnavailableError(f"cannot {operation} {subject}: the zfs program did not end within {timeout_s:.0f} s")
    if process.returncode:
        error = translate_command(stderr, operation, subject)
        error.add_note(stderr.strip())
        raise error
    return output


def _read(process: subprocess.Popen[bytes]) -> str:
    with process:
        if process.stdout is None:
            raise InternalError("the zfs program has no output")
        output = process.stdout.read(OUTPUT_MAX_BYTES + 1)
        if len(output) > OUTPUT_MAX_BYTES:
            process.kill()
            raise UnavailableError(f"the zfs program printed more than {OUTPUT_MAX_BYTES} bytes")
    return output.decode("utf-8", "surrogateescape")
