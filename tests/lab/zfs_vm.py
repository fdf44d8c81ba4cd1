"""Run a command as root where real OpenZFS is loaded and an empty pool of its own is ready.

Where the running kernel has ZFS and we are root, the command runs right here, with a pool in a sparse file. Elsewhere a
throw-away virtual machine with Debian's kernel and OpenZFS modules (installed by tests/lab/setup) is booted for it.

What the command sees in the virtual machine
  /            the host's root file system, copy on write: writes go to memory and are lost at power off,
  --rw DIR     except below these directories, which are the host's own;
  $PWD, the environment, stdout, stderr and the exit status are the caller's; stdin is /dev/null;
  lo is the only network; udev keeps /dev/zvol (--no-udev: nothing does, only /dev/zdN appear).

Environment of the command
  MISTIFY_LAB_POOL   name of the pool
  MISTIFY_LAB_KIND   "native" or "vm"

Exit status: the command's; 124 after --timeout; 125 if the lab itself failed.
The unpacked kernel and the initramfs are kept in ~/.cache/mistify-lab ($MISTIFY_LAB_CACHE) between runs.
Call real interpreters, not shims that search for one: under emulation a search takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.lab import boot_files, machine

LAB_FAILED = 125
TIMED_OUT = 124
NATIVE_POOL_BYTES = 16 << 30
"""Sparse; the tests write a few hundred MiB."""
ZFS_MODULE = "zfs_arc_max=536870912"
"""The cache's own limit, half of the memory, leaves too little to tests whose files live in memory too."""
ZPOOL_TIMEOUT_S = 60
MODPROBE_TIMEOUT_S = 60


def say(text: str) -> None:
    """One line about the lab itself."""
    sys.stderr.write(f"zfs-vm: {text}\n")
    sys.stderr.flush()


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="zfs-vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rw", action="append", default=[], metavar="DIR", help="host directory the guest may write")
    parser.add_argument("--vm", action="store_true", help="boot the virtual machine even where ZFS is loaded")
    parser.add_argument(
        "--accel", choices=["auto", "kvm", "tcg", "icount"], default="auto", help="default: %(default)s"
    )
    parser.add_argument("--memory-mib", type=int, default=6144, help="guest memory, default %(default)s")
    parser.add_argument("--cpus", type=int, default=2, help="guest processors, default %(default)s")
    parser.add_argument("--disk-gib", type=int, default=16, help="sparse disk of the pool, default %(default)s")
    parser.add_argument("--pool", default=f"lab{os.getpid()}", help="name of the pool, default labPID")
    parser.add_argument("--pool-options", default="", help="further options of zpool create")
    parser.add_argument("--no-udev", dest="udev", action="store_const", const="no", help="no udevd in the guest")
    parser.add_argument(
        "--udev",
        choices=["full", "light", "no"],
        default="full",
        help="which rules udevd follows; light: only those that make links, no looking into disks; default %(default)s",
    )
    parser.add_argument(
        "--zfs-module",
        default=ZFS_MODULE,
        metavar="'NAME=VALUE ...'",
        help="parameters of the guest's module, default %(default)s",
    )
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="wall clock, default %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep the run directory (console.log)")
    parser.add_argument("--verbose", action="store_true", help="say when each phase of the boot was reached")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    options = parser.parse_args(argv)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("needs a command to run")
    return options


def kernel_has_zfs() -> bool:
    """Whether we may use ZFS right here; loads the module if there is one for this kernel."""
    loaded = Path("/sys/module/zfs/version")
    if not loaded.exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "zfs"], check=False, timeout=MODPROBE_TIMEOUT_S, stderr=subprocess.DEVNULL)
    return loaded.exists() and Path("/dev/zfs").exists()


def run_native(options: argparse.Namespace) -> int:
    """Run the command on this kernel with a pool in a sparse file."""
    with tempfile.TemporaryDirectory(prefix="mistify-lab.") as directory:
        disk = Path(directory, "disk")
        with disk.open("wb") as file:
            file.truncate(NATIVE_POOL_BYTES)
        create = ["zpool", "create", "-f", "-o", "ashift=12", "-o", "cachefile=none", "-O", "mountpoint=none"]
        create += ["-O", "atime=off", *shlex.split(options.pool_options), options.pool, str(disk)]
        subprocess.run(create, check=True, timeout=ZPOOL_TIMEOUT_S)
        try:
            environment = os.environ | {"MISTIFY_LAB_POOL": options.pool, "MISTIFY_LAB_KIND": "native"}
            done = subprocess.run(
                options.command, stdin=subprocess.DEVNULL, env=environment, timeout=options.timeout, check=False
            )
            return done.returncode if done.returncode >= 0 else 128 - done.returncode
        except subprocess.TimeoutExpired:
            say(f"the command did not end within {options.timeout:.0f} s")
            return TIMED_OUT
        finally:
            subprocess.run(["zpool", "destroy", "-f", options.pool], check=False, timeout=ZPOOL_TIMEOUT_S)


@contextlib.contextmanager
def pump(target: int) -> Iterator[int]:
    """A pipe whose bytes go to ``target``: qemu wants a descriptor that is only writable."""
    read_end, write_end = os.pipe()

    def copy() -> None:
        while data := os.read(read_end, 1 << 16):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        thread.join()
        os.close(read_end)


NOT_FOR_THE_GUEST = frozenset({"PWD", "OLDPWD", "SHLVL", "_"})


def write_run_files(run: Path, options: argparse.Namespace) -> None:
    """What the guest reads: settings, writable directories, the command with its environment."""
    settings = {"POOL": options.pool, "UDEV": options.udev, "ZFS_MODULE": options.zfs_module}
    settings["POOL_OPTIONS"] = options.pool_options
    lines = [f"LAB_{name}={shlex.quote(value)}" for name, value in settings.items()]
    (run / "settings").write_text("\n".join(lines) + "\n")
    writable = [str(Path(directory).resolve()) for directory in options.rw] + [str(run)]
    (run / "writable").write_text("".join(f"{directory}\n" for directory in writable))
    environment = {name: value for name, value in os.environ.items() if name.isidentifier()}
    environment |= {"MISTIFY_LAB_POOL": options.pool, "MISTIFY_LAB_KIND": "vm"}
    script = [f"export {n}={shlex.quote(v)}" for n, v in environment.items() if n not in NOT_FOR_THE_GUEST]
    script += [f"cd {shlex.quote(str(Path.cwd()))} || exit {LAB_FAILED}", f"exec {shlex.join(options.command)}"]
    (run / "command").write_text("\n".join(script) + "\n")
    (run / "stage2").write_bytes((Path(__file__).resolve().parent / "guest" / "stage2").read_bytes())


def report_phases(run: Path) -> None:
    """The times the guest wrote to its console."""
    for line in (run / "console.log").read_text(errors="replace").splitlines():
        if "MISTIFY-LAB " in line:
            say(line[line.index("MISTIFY-LAB ") :])


def report_failure(run: Path) -> int:
    """Say what is known about a guest that never gave a status."""
    say("the virtual machine failed; its last words:")
    for name in ("qemu.log", "virtiofsd.log", "console.log"):
        if (run / name).exists():
            tail = (run / name).read_text(errors="replace").splitlines()[-40:]
            sys.stderr.write("".join(f"{name}: {line}\n" for line in tail))
    return LAB_FAILED


def run_virtual(options: argparse.Namespace, run: Path) -> int:
    """Boot the guest, let it run the command, give its status."""
    files = boot_files.ensure(boot_files.cache_directory())
    accel = machine.choose_accel(files) if options.accel == "auto" else options.accel
    write_run_files(run, options)
    with pump(1) as out, pump(2) as err:
        ended = machine.boot(files, run, options, accel, out, err)
    if options.verbose:
        say(f"acceleration: {accel}")
        report_phases(run)
    if (run / "status").exists():
        return int((run / "status").read_text())
    if not ended:
        say(f"the command did not end within {options.timeout:.0f} s")
        return TIMED_OUT
    return report_failure(run)


def interrupted(number: int, frame: FrameType | None) -> None:
    """Unwind, so that what we started ends with us."""
    raise SystemExit(128 + number)


def main() -> int:
    """Entry point."""
    options = parse_arguments(sys.argv[1:])
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    if os.geteuid() != 0:
        say("must be root: it makes a pool, or shares the root file system with a virtual machine")
        return LAB_FAILED
    if not options.vm and kernel_has_zfs():
        return run_native(options)
    run = Path(tempfile.mkdtemp(prefix="mistify-lab.", dir="/var/tmp"))
    try:
        return run_virtual(options, run)
    except boot_files.LabError as err:
        say(str(err))
        return LAB_FAILED
    finally:
        if options.keep:
            say(f"kept {run}")
        else:
            subprocess.run(["rm", "-rf", "--", str(run)], check=False)
