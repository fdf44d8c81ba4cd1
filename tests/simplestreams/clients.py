"""The real clients of image servers: incus (Debian's backports) and lxc, unpacked, not installed; no daemon is needed.

The packages are fetched with apt-get into a cache of the user's, with package lists of their own, so a fresh machine needs nothing but apt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from imaging.errors import BusyError
from imaging.files import LockFile
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]

APT_TIMEOUT_S = 600
CLIENT_TIMEOUT_S = 300

_SOURCES = """\
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} bookworm-backports main
"""
PACKAGES = {"incus": "incus-client/bookworm-backports", "lxc": "lxd-client/bookworm"}


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mistify-test-clients"


def _mirror() -> str:
    """Where this machine's own apt takes Debian from."""
    command = [str(ROOT / "scripts" / "debian-mirror")]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=APT_TIMEOUT_S).stdout.strip()


def _apt(root: Path, *arguments: str, cwd: Path) -> None:
    """apt-get with lists and sources of its own below ``root``."""
    for name in ("lists/partial", "cache/archives/partial"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "sources.list").write_text(_SOURCES.format(mirror=_mirror()))
    options = {
        "Dir::Etc::sourcelist": root / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": root / "lists",
        "Dir::Cache": root / "cache",
        "APT::Sandbox::User": "root",
    }
    flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    done = subprocess.run(
        ["apt-get", "-q", *flags, *arguments], cwd=cwd, capture_output=True, check=False, timeout=APT_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr.decode()


def client_program(name: str) -> Path:
    """The program, unpacked once into the cache."""
    home = _cache()
    program = home / name / "usr" / "bin" / name
    home.mkdir(parents=True, exist_ok=True)
    lock = LockFile(home / "lock")

    def locked() -> bool:
        try:
            lock.acquire()
        except BusyError:
            return False
        return True

    wait_until(locked, "another run to unpack the clients", timeout_s=2 * APT_TIMEOUT_S, poll_s=0.5)
    try:
        if not program.exists():
            _unpack(home, name)
    finally:
        lock.release()
    return program


def _unpack(home: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=home) as work:
        _apt(home / "apt", "update", cwd=Path(work))
        _apt(home / "apt", "download", PACKAGES[name], cwd=Path(work))
        [package] = Path(work).glob("*.deb")
        target = Path(work) / "root"
        subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True, timeout=120)
        shutil.move(target, home / name)


class Client:
    """One client with a fresh home, and a remote ``x`` for the server."""

    def __init__(self, name: str, url: str, certificate: Path, home: Path) -> None:
        self.program = client_program(name)
        self.home = home
        (home / "conf").mkdir(parents=True)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "INCUS_CONF": str(home / "conf"),
            "LXD_CONF": str(home / "conf"),
            "SSL_CERT_FILE": str(certificate),
            "LC_ALL": "C.UTF-8",
        }
        self.run("remote", "add", "x", url, "--protocol", "simplestreams")

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.program), *arguments],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=CLIENT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def images(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self.run("image", "list", "x:", "--format", "json").stdout)
        return listed
