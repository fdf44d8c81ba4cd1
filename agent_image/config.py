"""What the agent is told: flags, ``MISTIFY_*`` environment, a TOML file, in that order of precedence."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from agent_image.fetch_http import FetchLimits
from agent_image.jobs import PENDING_MAX
from imaging.names import PoolName

DEFAULT_PORT = 19999
DEFAULT_POOL = "mistify"
DEFAULT_IMAGE_SERVICE = "image.services.lochness.local"

DRIVER_AUTO = "auto"
"""ZFS where the kernel has it, files elsewhere."""

STATE_DIR_NAME = "mistify-agent-image"

VOLBLOCKSIZE_DEFAULT_BYTES = 16 << 10
"""ZFS's own default since 2.2."""

_ZFS_DEVICE = Path("/dev/zfs")


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Everything the composition root needs that is not about serving HTTP."""

    pool: PoolName
    driver: str
    state_dir: Path
    image_service: str = DEFAULT_IMAGE_SERVICE
    image_service_token: str = ""
    fetchers: int
    pending_max: int = PENDING_MAX
    volblocksize_bytes: int = VOLBLOCKSIZE_DEFAULT_BYTES
    limits: FetchLimits = field(default_factory=FetchLimits)


def default_fetchers() -> int:
    """As many as this process may use processors: decompression is what a fetch spends its time on."""
    return max(1, len(os.sched_getaffinity(0)))


def choose_driver(wanted: str) -> str:
    """The driver a machine gets when nobody chose one."""
    if wanted != DRIVER_AUTO:
        return wanted
    return "zfs" if _ZFS_DEVICE.exists() else "file"


def default_state_dir() -> Path:
    """The system's place for state if we may write there (or are given one by systemd), else the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    system = Path("/var/lib")
    if os.access(system / STATE_DIR_NAME, os.W_OK) or os.access(system, os.W_OK):
        return system / STATE_DIR_NAME
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / STATE_DIR_NAME
