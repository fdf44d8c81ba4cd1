"""Booting a disk with qemu and listening to its serial console.

KVM is used where it works *and* is quick: on some machines ``/dev/kvm`` is there but every exit takes the long way through another
hypervisor. A boot sector of nine bytes finds out within ``PROBE_TIMEOUT_S``; else qemu's own translator (TCG) runs the guest, which every
machine can.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from demo.errors import DemoError

PROGRAM = "qemu-system-x86_64"
MEMORY_MIB = 256
PROBE_TIMEOUT_S = 2.0  # a working KVM needs 0.2 s; one that needs longer would boot slower than TCG
FIRST_WORD_TIMEOUT_S = 20.0  # a guest under a KVM that passed the probe has said something by then
BOOT_TIMEOUT_S = 180.0  # TCG on a busy two-core machine: usually under 15 s
STOP_TIMEOUT_S = 10.0

_PROBE_PORT = 0x501
_PROBE_VALUE = 0x31
_PROBE_STATUS = (_PROBE_VALUE << 1) | 1  # how isa-debug-exit turns a value into an exit status
# mov dx, port; mov al, value; out dx, al; hlt; jmp back
_PROBE_CODE = bytes([0xBA, _PROBE_PORT & 0xFF, _PROBE_PORT >> 8, 0xB0, _PROBE_VALUE, 0xEE, 0xF4, 0xEB, 0xFD])


@dataclass(frozen=True)
class Boot:
    """What a guest said until the awaited text came."""

    accelerator: str
    seconds: float
    matched: str
    console: str


def boot(
    disks: Sequence[Path],
    expected: str,
    *,
    timeout_s: float = BOOT_TIMEOUT_S,
    say: Callable[[str], None] = lambda _: None,
) -> Boot:
    """Boot the first of ``disks`` and wait until the serial console shows the pattern ``expected``; then stop the guest.

    A guest that powers itself off is let finish. ``say`` is told when KVM looked usable but was not.
    """
    if kvm_works():
        try:
            return _boot("kvm", disks, expected, timeout_s, FIRST_WORD_TIMEOUT_S)
        except DemoError:
            say("KVM did not get the guest to speak; once more with qemu's own translator")
    return _boot("tcg", disks, expected, timeout_s, timeout_s)


def is_installed() -> bool:
    """Whether qemu for x86-64 is on this machine."""
    return shutil.which(PROGRAM) is not None


@cache
def kvm_works() -> bool:
    """Whether KVM runs a nine-byte boot sector quickly on this machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or not is_installed():
        return False
    with tempfile.NamedTemporaryFile(suffix=".raw") as disk:
        disk.write(_PROBE_CODE.ljust(510, b"\0") + b"\x55\xaa")
        disk.flush()
        command = [PROGRAM, "-accel", "kvm", "-display", "none", "-nodefaults", "-m", "16"]
        command += ["-device", f"isa-debug-exit,iobase={_PROBE_PORT:#x},iosize=1"]
        command += ["-drive", f"file={disk.name},format=raw,if=ide"]
        try:
            ended = subprocess.run(  # noqa: S603 - no shell, arguments of our own making
                command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return ended.returncode == _PROBE_STATUS


def dies_with_parent(command: Sequence[str]) -> list[str]:
    """Prefix ``command`` so that it is killed with this process, even if this process is killed itself (where setpriv can)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else list(command)


def _boot(accelerator: str, disks: Sequence[Path], expected: str, timeout_s: float, first_word_s: float) -> Boot:
    pattern = re.compile(expected)
    begun = time.monotonic()
    text = ""
    with _running(accelerator, disks) as process:
        for chunk in _chunks(process, begun + first_word_s, begun + timeout_s):
            text += chunk
            match = pattern.search(text)
            if match:
                return Boot(accelerator, time.monotonic() - begun, match.group(0), text + _rest(process))
    raise DemoError(
        f"the guest did not say {expected!r} in {time.monotonic() - begun:.0f} s; its console: {text[-600:]!r}"
    )


@contextmanager
def _running(accelerator: str, disks: Sequence[Path]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(  # noqa: S603 - no shell, arguments of our own making
        dies_with_parent(_command(accelerator, disks)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the demo, which then stops the guest
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=STOP_TIMEOUT_S)


def _command(accelerator: str, disks: Sequence[Path]) -> list[str]:
    command = [PROGRAM, "-accel", accelerator, "-m", str(MEMORY_MIB), "-display", "none", "-nodefaults", "-no-reboot"]
    command += ["-serial", "stdio", "-monitor", "none"]
    if accelerator == "kvm":
        command += ["-cpu", "host"]
    for disk in disks:
        name = str(disk).replace(",", ",,")  # qemu's own escape
        command += ["-drive", f"file={name},format=raw,if=virtio,cache=writeback,discard=unmap"]
    return command


def _chunks(process: subprocess.Popen[bytes], first_deadline: float, deadline: float) -> Iterator[str]:
    """Yield what the console says, as it comes, until the guest ends or a deadline has passed."""
    stream = process.stdout
    assert stream is not None
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        limit = first_deadline
        while selector.select(max(0.0, limit - time.monotonic())):
            data = os.read(stream.fileno(), 65536)
            if not data:
                return
            limit = deadline
            yield data.decode("utf-8", "replace")


def _rest(process: subprocess.Popen[bytes]) -> str:
    """Let a guest that is powering off do so, and return its last words; the caller ends any other."""
    now = time.monotonic()
    return "".join(_chunks(process, now + STOP_TIMEOUT_S, now + STOP_TIMEOUT_S))
