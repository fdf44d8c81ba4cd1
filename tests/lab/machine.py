"""The lab's virtual machine: qemu and virtiofsd, started, bounded, ended."""

from __future__ import annotations

import argparse
import contextlib
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.lab.boot_files import BootFiles, LabError

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
PROBE_TIMEOUT_S = 10.0
"""A guest under a working KVM speaks within one second."""
SOCKET_TIMEOUT_S = 10.0
END_TIMEOUT_S = 10.0
SECTOR_BYTES = 512
PARTITION_START = 2048
ZFS_PARTITION_TYPE = 0xBF

# init_on_alloc=1 must stay: virtiofsd writes guest memory behind the emulator's back, and a page that was code before and
# is reused for a file would run stale translations.
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet init_on_alloc=1 printk.devkmsg=on panic=-1 oops=panic nokaslr mitigations=off nowatchdog "
    "no_timer_check tsc=reliable random.trust_cpu=on apparmor=0 audit=0 net.ifnames=0 raid=noautodetect"
)
ACCELS = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"],
    # The guest's clock counts instructions: slow, but what is timed inside repeats whatever the host does.
    "icount": ["-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=0", "-cpu", "max"],
}


def base_command(files: BootFiles, accel: str, memory_mib: int, arguments: str) -> list[str]:
    """qemu with a kernel and nothing else; it dies with us."""
    command = ["setpriv", "--pdeathsig", "KILL", files.qemu, "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-no-reboot", "-monitor", "none", "-machine", "q35", *ACCELS[accel], "-m", f"{memory_mib}M"]
    command += ["-kernel", str(files.kernel), "-initrd", str(files.initramfs)]
    return [*command, "-append", f"{KERNEL_ARGUMENTS} {arguments}"]


def choose_accel(files: BootFiles) -> str:
    """``kvm`` if a guest really runs under it, else ``tcg``; found out once per boot of the host."""
    if not Path("/dev/kvm").exists():
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = files.cache / f"accel-{boot_id}"
    if not known.exists():
        for older in files.cache.glob("accel-*"):
            older.unlink()
        known.write_text("kvm" if kvm_works(files) else "tcg")
    return known.read_text()


def kvm_works(files: BootFiles) -> bool:
    """Boot only as far as the initramfs: /dev/kvm may be there and yet run nothing."""
    command = [*base_command(files, "kvm", 512, "lab.probe=1"), "-serial", "stdio"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        output, _ = process.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    return b"MISTIFY-LAB-ALIVE" in output


def make_disk(path: Path, size_bytes: int) -> None:
    """A sparse disk with one partition ready, so that making the pool need not wait for udev."""
    sectors = min(size_bytes // SECTOR_BYTES - PARTITION_START, 0xFFFFFFFF)
    entry = struct.pack("<B3sB3sII", 0, b"\0\0\0", ZFS_PARTITION_TYPE, b"\0\0\0", PARTITION_START, sectors)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        file.seek(446)
        file.write(entry)
        file.seek(510)
        file.write(b"\x55\xaa")


@contextlib.contextmanager
def shared_root(run: Path) -> Iterator[Path]:
    """The host's root, served to the guest by virtiofsd; yields the socket."""
    if not VIRTIOFSD.exists():
        raise LabError(f"no {VIRTIOFSD}: run tests/lab/setup once (Debian 12)")
    socket = run / "virtiofs.socket"
    command = ["setpriv", "--pdeathsig", "KILL", str(VIRTIOFSD), f"--socket-path={socket}", "-o", "source=/"]
    command += ["-o", "cache=always", "-o", "sandbox=chroot", "-o", "xattr", "--thread-pool-size=4"]
    with (run / "virtiofsd.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for_socket(socket, process)
        yield socket
    finally:
        end(process)


def wait_for_socket(socket: Path, process: subprocess.Popen[bytes]) -> None:
    """Bounded wait for virtiofsd to listen."""
    tick = threading.Event()
    for _ in range(int(SOCKET_TIMEOUT_S / 0.02)):
        if socket.exists():
            return
        if process.poll() is not None:
            break
        tick.wait(0.02)
    raise LabError("virtiofsd does not listen; must be root")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process we started."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def guest_command(
    files: BootFiles, run: Path, options: argparse.Namespace, accel: str, socket: Path, out: int, err: int
) -> list[str]:
    """qemu with the pool's disk, the shared root and two ports for the command's output."""
    memory = options.memory_mib
    command = base_command(files, accel, memory, f"lab.run={run}")
    command += ["-smp", str(1 if accel == "icount" else options.cpus)]
    command += ["-drive", f"if=none,id=pool,file={run}/disk,format=raw,cache=unsafe,discard=unmap,aio=threads"]
    command += ["-device", "virtio-blk-pci,drive=pool,serial=pool"]
    command += ["-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on", "-numa", "node,memdev=memory"]
    command += ["-chardev", f"socket,id=root,path={socket}"]
    command += ["-device", "vhost-user-fs-pci,chardev=root,tag=host,queue-size=1024", "-device", "virtio-serial-pci"]
    for number, (name, fd) in enumerate((("out", out), ("err", err)), 1):
        command += [
            "-add-fd",
            f"fd={fd},set={number}",
            "-chardev",
            f"file,id={name},path=/dev/fdset/{number},append=on",
        ]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    return [*command, "-serial", f"file:{run}/console.log"]


def boot(files: BootFiles, run: Path, options: argparse.Namespace, accel: str, out: int, err: int) -> bool:
    """Run the guest to its end; False if it had to be stopped after the time-out."""
    make_disk(run / "disk", options.disk_gib << 30)
    with shared_root(run) as socket, (run / "qemu.log").open("wb") as log:
        command = guest_command(files, run, options, accel, socket, out, err)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(out, err))
        try:
            process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(process)
    return True
