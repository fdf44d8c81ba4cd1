"""What the lab's guest boots from: an uncompressed kernel and a small initramfs, built once and kept.

Uncompressed, because unpacking a bzImage under emulation takes longer than the rest of the boot.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = Path("/lib/modules")
TOOL_TIMEOUT_S = 300
BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtiofs", "overlay")
"""Needed to reach the host's root; zfs itself is loaded after that."""
XZ_MAGIC = b"\xfd7zXZ\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ELF_MAGIC = b"\x7fELF"


class LabError(Exception):
    """The lab cannot work here; the message says what to do."""


@dataclass(frozen=True)
class BootFiles:
    """A kernel and the initramfs made for it."""

    kernel: Path
    initramfs: Path
    cache: Path
    qemu: str


def cache_directory() -> Path:
    """Where things are kept between runs."""
    return Path(os.environ.get("MISTIFY_LAB_CACHE") or Path.home() / ".cache" / "mistify-lab")


def version_key(version: str) -> list[tuple[int, str]]:
    """Order kernel versions as people do: 6.1.0-9 before 6.1.0-37."""
    parts = version.replace("-", ".").split(".")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def newest_kernel() -> str:
    """The newest installed kernel that has zfs modules."""
    found = [path.parent.parent.parent.name for path in MODULES.glob("*/updates/dkms/zfs.ko*")]
    if not found:
        raise LabError(f"no zfs module below {MODULES}: run tests/lab/setup once")
    return max(found, key=version_key)


def ensure(cache: Path) -> BootFiles:
    """The boot files of the newest kernel, made if they are not there yet."""
    version = newest_kernel()
    cache.mkdir(parents=True, exist_ok=True)
    kernel = cache / f"vmlinux-{version}"
    if not kernel.exists():
        publish(kernel, unpack_kernel(Path(f"/boot/vmlinuz-{version}")))
    initramfs = cache / f"initramfs-{version}-{fingerprint(version)}"
    if not initramfs.exists():
        publish(initramfs, build_initramfs(version))
    newer = cache / "qemu/usr/bin/qemu-system-x86_64"
    qemu = str(newer) if newer.exists() else shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise LabError("no qemu-system-x86_64: run tests/lab/setup once")
    return BootFiles(kernel, initramfs, cache, qemu)


def publish(path: Path, data: bytes) -> None:
    """Whole or not at all, also when two labs start at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).rename(path)


def fingerprint(version: str) -> str:
    """Changes when the modules or what the initramfs is made of do."""
    digest = hashlib.sha256()
    for path in [HERE / "guest/init", Path(__file__), *sorted(MODULES.glob(f"{version}/updates/dkms/*"))]:
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def unpack_kernel(image: Path) -> bytes:
    """The ELF kernel inside a bzImage."""
    data = image.read_bytes()
    start = data.find(XZ_MAGIC)
    if start >= 0:
        kernel = lzma.LZMADecompressor().decompress(data[start:])
    else:  # zstd complains about what follows its frame, so its status says nothing; the magic below does
        payload = data[max(data.find(ZSTD_MAGIC), 0) :]
        kernel = subprocess.run(
            ["zstd", "-qdc"], input=payload, capture_output=True, timeout=TOOL_TIMEOUT_S, check=False
        ).stdout
    if not kernel.startswith(ELF_MAGIC):
        raise LabError(f"cannot unpack {image}: neither xz nor zstd")
    return kernel


def module_files(version: str, *names: str) -> list[Path]:
    """Files of the modules and what they depend on, in load order."""
    found: dict[Path, None] = {}
    for name in names:
        command = ["modprobe", "--show-depends", "-S", version, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
        if done.returncode:
            raise LabError(f"no module {name} for kernel {version}: {done.stderr.strip()}")
        lines = (line.split() for line in done.stdout.splitlines())
        found.update((Path(words[1]), None) for words in lines if words[0] == "insmod")
    return list(found)


def add_module(source: Path, directory: Path) -> str:
    """Copy one module uncompressed and without debug symbols; its file name."""
    data = source.read_bytes()
    target = directory / source.name.removesuffix(".xz")
    target.write_bytes(lzma.decompress(data) if source.suffix == ".xz" else data)
    subprocess.run(["objcopy", "--strip-debug", str(target)], check=True, timeout=TOOL_TIMEOUT_S)
    return target.name


def build_initramfs(version: str) -> bytes:
    """A cpio archive with busybox, the modules and the guest's init."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for directory in ("bin", "modules", "proc", "sys", "dev", "host", "changes", "root"):
            (tree / directory).mkdir()
        boot = module_files(version, *BOOT_MODULES)
        late = [path for path in module_files(version, "zfs") if path not in boot]
        for label, files in (("boot", boot), ("late", late)):
            names = [add_module(path, tree / "modules") for path in files]
            (tree / "modules" / label).write_text("".join(f"{module}\n" for module in names))
        shutil.copy(shutil.which("busybox") or "/bin/busybox", tree / "bin/busybox")
        shutil.copy(HERE / "guest/init", tree / "init")
        (tree / "init").chmod(0o755)
        listing = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        command = ["cpio", "--quiet", "-o", "-H", "newc"]
        packed = subprocess.run(
            command, cwd=tree, input=listing.encode(), capture_output=True, timeout=TOOL_TIMEOUT_S, check=True
        )
        return packed.stdout
