"""``make install``: staged with DESTDIR, moved to its PREFIX, and run from there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = ("mistify-agent-image", "mistify-image-service", "mistify-image")
UNITS = ("mistify-agent-image", "mistify-image-service")
INSTALL_TIMEOUT_S = 280


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that was staged elsewhere and unpacked at its prefix, as a package would be."""
    checkout = Path(__file__).resolve().parents[2]
    place = tmp_path_factory.mktemp("install")
    prefix = place / "opt" / "mistify"
    command = ["make", "-o", "venv", "install", f"DESTDIR={place / 'staging'}", f"PREFIX={prefix}", "SYSCONFDIR=/etc"]
    command.append(f"VENV={Path(sys.prefix)}")
    ended = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    staged = place / "staging" / prefix.relative_to("/")
    assert not prefix.exists(), "DESTDIR was left"
    prefix.parent.mkdir(parents=True)
    staged.rename(prefix)
    return place


@pytest.mark.parametrize("program", PROGRAMS)
def test_installed_program_runs_without_the_checkout(installed: Path, tmp_path: Path, program: str) -> None:
    command = [str(installed / "opt/mistify/bin" / program), "--help"]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "Usage:" in ended.stdout


@pytest.mark.parametrize("name", UNITS)
def test_installed_unit_starts_the_installed_program(installed: Path, name: str) -> None:
    unit = (installed / f"opt/mistify/lib/systemd/system/{name}.service").read_text()
    command = re.search(r"^ExecStart=(\S+)", unit, re.MULTILINE)
    assert command is not None
    assert Path(command.group(1)) == installed / "opt/mistify/bin" / name
    assert Path(command.group(1)).exists()


@pytest.mark.parametrize("name", UNITS)
def test_installed_settings_explain_themselves(installed: Path, name: str) -> None:
    settings = installed / "staging/etc/default" / name
    lines = settings.read_text().splitlines()
    assert lines
    assert all(line.startswith("#") or not line for line in lines), "an example must change nothing"
    assert any("MISTIFY_" in line for line in lines)
