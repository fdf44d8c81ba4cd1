"""A small bootable disk made from Debian's own packages: kernel, busybox, syslinux. No root, no loop device, no network but apt.

The disk: a master boot record, a *marker* sector in the gap behind it, and one FAT partition with syslinux, the kernel and an
initramfs. The guest prints a greeting on its serial console that contains what its marker sector says, copies the marker onto a
second disk if it has one, and powers off. So whoever wrote the marker knows from the greeting that the guest read *this* disk.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

from demo import debian
from demo.cpio import Initramfs
from demo.errors import DemoError

SECTOR_BYTES = 512
DISK_BYTES = 24 << 20  # kernel 7 MiB, initramfs 1 MiB, room for kernels to grow
PARTITION_LBA = 2048  # 1 MiB, where every partitioning tool starts
MARKER_LBA = PARTITION_LBA - 1  # the gap belongs to nobody; its last sector is out of every boot loader's way
MARKER_OFFSET_BYTES = MARKER_LBA * SECTOR_BYTES
GREETING = "mistify-guest: hello, my disk says"
FAREWELL = "mistify-guest: good-bye"
TOOL_TIMEOUT_S = 120
PACKAGES = ("busybox-static", "mtools", "syslinux", "syslinux-common")
MODULES = ("virtio_pci", "virtio_blk")  # Debian's kernel has the serial port built in, virtio as modules
_FAT16_LBA = 0x0E

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do tries=$((tries + 1)); usleep 100000; done
marker=$(dd if=/dev/vda bs={SECTOR_BYTES} skip={MARKER_LBA} count=1 2>/dev/null | tr -d '\\000')
echo "{GREETING} [$marker]"
if [ -b /dev/vdb ]; then
    printf '%s' "$marker" | dd of=/dev/vdb bs={SECTOR_BYTES} conv=sync 2>/dev/null
    sync
    echo "mistify-guest: wrote the same to my second disk of $(( $(cat /sys/block/vdb/size) / 2048 )) MiB"
fi
echo "{FAREWELL}"
poweroff -f
"""

_SYSLINUX_CFG = """SERIAL 0 115200
DEFAULT guest
PROMPT 0
TIMEOUT 0
LABEL guest
  KERNEL vmlinuz
  INITRD initrd.gz
  APPEND console=ttyS0,115200 quiet panic=-1 rdinit=/init
"""


def ensure_image(cache: Path) -> Path:
    """Return the bootable raw disk in ``cache``, made now if this recipe has not been followed there before."""
    target = cache / f"guest-{_recipe_id()}.raw"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _clean(cache)
        work = cache / f"making-{os.getpid()}"
        try:
            _make(target, work, cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _clean(cache: Path) -> None:
    """Remove disks of earlier recipes, and what a killed process left half-made."""
    for old in cache.glob("guest-*.raw"):
        old.unlink(missing_ok=True)
    for left in cache.glob("making-*"):
        if not Path("/proc", left.name.partition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)


def read_marker(disk: Path, offset_bytes: int = MARKER_OFFSET_BYTES) -> str:
    """Return the marker text at ``offset_bytes`` of a disk file or device."""
    with disk.open("rb") as file:
        file.seek(offset_bytes)
        return file.read(SECTOR_BYTES).rstrip(b"\0").decode("utf-8", "replace")


def write_marker(disk: Path, text: str) -> None:
    """Write the marker sector of a disk file or device, durably."""
    data = text.encode().ljust(SECTOR_BYTES, b"\0")
    if len(data) > SECTOR_BYTES:
        raise DemoError(f"a marker has at most {SECTOR_BYTES} bytes")
    with disk.open("r+b") as file:
        file.seek(MARKER_OFFSET_BYTES)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _recipe_id() -> str:
    """Name the recipe: change anything in these three files and the image is made anew."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("guest.py", "cpio.py", "debian.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:12]


def _make(target: Path, work: Path, cache: Path) -> None:
    root = work / "root"
    root.mkdir(parents=True)
    debian.fetch([debian.kernel_package(cache), *PACKAGES], root)
    kernel = _only(root / "boot", "vmlinuz-*")
    boot = work / "boot"
    boot.mkdir()
    (boot / "vmlinuz").write_bytes(kernel.read_bytes())
    (boot / "initrd.gz").write_bytes(gzip.compress(_initramfs(root), mtime=0))
    (boot / "syslinux.cfg").write_text(_SYSLINUX_CFG)
    disk = work / "disk.raw"
    _partition(disk, _only(root, "**/mbr/mbr.bin").read_bytes())
    _fill(disk, boot, root)
    write_marker(disk, "an image nobody has written to")
    disk.rename(target)


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if not found:
        raise DemoError(f"Debian's packages have no {pattern}; did their layout change?")
    return found[0]


def _initramfs(root: Path) -> bytes:
    archive = Initramfs()
    for directory in ("bin", "dev", "modules", "proc", "sys"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", _only(root, "**/bin/busybox").read_bytes(), 0o755)
    archive.file("init", _INIT.encode(), 0o755)
    modules = _modules(root)
    for name, data in modules.items():
        archive.file(f"modules/{name}.ko", data)
    archive.file("modules/order", "\n".join(f"{name}.ko" for name in modules).encode())
    return archive.to_bytes()


def _modules(root: Path) -> dict[str, bytes]:
    """Return the wanted modules and what they need, in the order to load them."""
    tree = _only(root, "**/lib/modules/*/kernel")
    files = {path.name.split(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:  # not a file: built into this kernel
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        needs = re.search(rb"\0depends=([^\0]*)\0", data)
        for need in needs.group(1).decode().split(",") if needs else ():
            load(need.replace("-", "_"))
        loaded[name] = data

    for name in MODULES:
        load(name)
    return loaded


def _partition(disk: Path, boot_code: bytes) -> None:
    """Write the master boot record: boot code, one active FAT partition to the end of the disk, the signature."""
    sectors = DISK_BYTES // SECTOR_BYTES - PARTITION_LBA
    no_chs = b"\xfe\xff\xff"  # cylinders and heads are not used: the loader asks for LBA
    entry = struct.pack("<B3sB3sII", 0x80, no_chs, _FAT16_LBA, no_chs, PARTITION_LBA, sectors)
    record = boot_code[:440].ljust(440, b"\0") + bytes(6) + entry + bytes(48) + b"\x55\xaa"
    with disk.open("wb") as file:
        file.write(record)
        file.truncate(DISK_BYTES)


def _fill(disk: Path, boot: Path, root: Path) -> None:
    """Make the FAT file system, copy the boot files into it and install syslinux; the tools are the unpacked ones."""
    offset = PARTITION_LBA * SECTOR_BYTES
    inside = f"{disk}@@{offset}"
    sectors = DISK_BYTES // SECTOR_BYTES - PARTITION_LBA
    geometry = ["-h", "16", "-s", "63", "-T", str(sectors), "-H", str(PARTITION_LBA)]
    _tool(root, "mformat", "-i", inside, *geometry, "-N", "4d495354", "::")
    for path in sorted(boot.iterdir()):
        _tool(root, "mcopy", "-i", inside, str(path), f"::{path.name}")
    _tool(root, "syslinux", "--install", "--offset", str(offset), str(disk))


def _tool(root: Path, name: str, *arguments: str) -> None:
    path = f"{root}/usr/bin:{os.environ.get('PATH', '/usr/bin:/bin')}"
    environment = {**os.environ, "PATH": path, "MTOOLS_SKIP_CHECK": "1"}
    command = [str(_only(root, f"**/bin/{name}")), *arguments]
    try:
        subprocess.run(  # noqa: S603 - no shell, arguments of our own making
            command, env=environment, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as err:
        detail = getattr(err, "stderr", None) or err
        raise DemoError(f"{name} could not make the guest image: {detail}") from err
