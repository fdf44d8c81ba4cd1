"""Debian packages as material: downloaded with apt, unpacked into a directory, never installed.

Nothing here needs root: ``apt-get download`` writes to the current directory, and ``dpkg-deb -x`` unpacks anywhere. The machine's own
package lists are used when they are there; a machine without any (a fresh container) gets private ones beside the cache.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from demo.errors import DemoError

APT_TIMEOUT_S = 600  # package lists and a 27 MB kernel over a slow mirror
UNPACK_TIMEOUT_S = 120


def fetch(packages: Sequence[str], into: Path) -> None:
    """Download ``packages`` and unpack them, one over the other, into the directory ``into``."""
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise DemoError(
                f"{program} is missing: the guest image is made of Debian packages. Give a disk instead: IMAGE=/path"
            )
    archives = into.parent / f"{into.name}.deb"
    archives.mkdir(parents=True, exist_ok=True)
    options = lists_options(into.parent / "apt")
    _run(["apt-get", *options, "download", "-qq", *packages], cwd=archives)
    for archive in sorted(archives.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(archive), str(into)], timeout_s=UNPACK_TIMEOUT_S)
    shutil.rmtree(archives)


def kernel_package(cache: Path, metapackage: str = "linux-image-cloud-amd64") -> str:
    """Return the name of the kernel package that ``metapackage`` stands for today."""
    options = lists_options(cache / "apt")
    answer = _run(["apt-cache", *options, "depends", "--important", metapackage])
    for line in answer.splitlines():
        if line.strip().startswith("Depends: linux-image-"):
            return line.split()[-1]
    raise DemoError(f"apt knows no kernel behind {metapackage}: the package lists of this machine lack Debian's main")


def lists_options(private: Path) -> list[str]:
    """Return apt options: none if the machine's package lists know Debian, else private lists (made here once)."""
    if _knows(()):
        return []
    options = ["-o", f"Dir::State={private}/state", "-o", f"Dir::Cache={private}/cache"]
    if not _knows(options):
        (private / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (private / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        _run(["apt-get", *options, "update", "-qq"])
    return options


def _knows(options: Sequence[str]) -> bool:
    command = ["apt-cache", *options, "show", "--no-all-versions", "syslinux"]
    answer = subprocess.run(command, capture_output=True, timeout=APT_TIMEOUT_S, check=False)  # noqa: S603 - fixed words
    return answer.returncode == 0 and b"Filename:" in answer.stdout


def _run(command: Sequence[str], cwd: Path | None = None, timeout_s: float = APT_TIMEOUT_S) -> str:
    try:
        answer = subprocess.run(  # noqa: S603 - no shell, arguments of our own making
            command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=True
        )
    except subprocess.CalledProcessError as err:
        raise DemoError(f"{' '.join(command[:4])} … failed: {err.stderr.strip()[-400:]}") from err
    except (OSError, subprocess.TimeoutExpired) as err:
        raise DemoError(f"{' '.join(command[:4])} … could not run") from err
    return answer.stdout
