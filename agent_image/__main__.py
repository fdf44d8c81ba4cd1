"""``mistify-agent-image``: the agent as a program."""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from aiohttp import web

from agent_image.app import create_agent
from agent_image.config import (
    DEFAULT_IMAGE_SERVICE,
    DEFAULT_POOL,
    DEFAULT_PORT,
    DRIVER_AUTO,
    VOLBLOCKSIZE_DEFAULT_BYTES,
    AgentSettings,
    choose_driver,
    default_fetchers,
    default_state_dir,
)
from agent_image.drivers.registry import DRIVERS
from agent_image.fetch_http import FetchLimits
from agent_image.fetch_server import ImageServer
from agent_image.jobs import PENDING_MAX
from imaging.errors import InvalidNameError, MistifyError
from imaging.names import PoolName
from imaging.release import release
from rpc.auth import load_token
from rpc.daemon import run_daemon
from rpc.options import CONTEXT_SETTINGS, config_option, daemon_options, daemon_settings
from rpc.server import ServerSettings

COMPONENT = "mistify-agent-image"

log = logging.getLogger("agent_image")


@click.command(context_settings=CONTEXT_SETTINGS)
@daemon_options(default_port=DEFAULT_PORT)
@click.option("-z", "--zpool", default=DEFAULT_POOL, metavar="POOL", help="Pool that images and guests live in.")
@click.option(
    "-i",
    "--image-service",
    default=DEFAULT_IMAGE_SERVICE,
    metavar="HOST[:PORT]",
    help="Server of images. Without a port the DNS is asked for SRV records of HOST; without those port 20000 is meant.",
)
@click.option("--image-service-token-file", type=click.Path(path_type=Path, dir_okay=False), help="Token to show it.")
@click.option(
    "--driver",
    type=click.Choice([DRIVER_AUTO, *sorted(DRIVERS)]),
    default=DRIVER_AUTO,
    help="Where volumes live: zfs, or file (sparse files in the state directory). auto: zfs if the kernel has it.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Records, jobs, and the file driver's pool. Default: /var/lib/mistify-agent-image, or the user's state directory.",
)
@click.option(
    "--fetchers", type=click.IntRange(1, 64), help="Images fetched at once. Default: the number of processors."
)
@click.option(
    "--volblocksize",
    type=click.Choice([str(512 << power) for power in range(12)]),
    default=str(VOLBLOCKSIZE_DEFAULT_BYTES),
    help="Block size of new volumes, in bytes.",
)
@click.option(
    "--max-pending", type=click.IntRange(1, 100_000), default=PENDING_MAX, help="Fetches accepted and not finished."
)
@click.option(
    "--max-image-bytes",
    type=click.IntRange(1),
    default=FetchLimits().image_max_bytes,
    help="Largest image: ends one that decompresses for ever.",
)
@click.option("--connect-timeout", type=click.FloatRange(0.1), default=FetchLimits().connect_s, help="Seconds.")
@click.option(
    "--stall-timeout", type=click.FloatRange(0.1), default=FetchLimits().stall_s, help="Seconds without a byte."
)
@click.option(
    "--fetch-timeout", type=click.FloatRange(0.1), default=FetchLimits().total_s, help="Seconds for one image."
)
@config_option()
@click.version_option(release(), message="%(version)s")
def main(**params: Any) -> None:
    """Give guests their disks: images, volumes, snapshots and clones of one pool, by JSON-RPC over HTTP.

    Every option can be set in the environment too: --max-pending as MISTIFY_MAX_PENDING, and so on.
    """
    daemon = daemon_settings(params, component=COMPONENT, version=release(), use_uvloop=True)
    try:
        settings = _agent_settings(params)
    except MistifyError as err:
        raise click.UsageError(err.message) from err

    async def create(server: ServerSettings) -> web.Application:
        _announce(settings, chosen=params["driver"] == DRIVER_AUTO)
        return await create_agent(settings, server)

    status = run_daemon(daemon, create)
    _leave(status)


def _agent_settings(params: dict[str, Any]) -> AgentSettings:
    token_file = params["image_service_token_file"]
    try:
        pool = PoolName.parse(params["zpool"])
    except InvalidNameError as err:
        raise click.BadParameter(err.message, param_hint="--zpool") from err
    ImageServer(params["image_service"])  # refuse a bad address before anything is opened
    limits = replace(
        FetchLimits(),
        connect_s=params["connect_timeout"],
        stall_s=params["stall_timeout"],
        total_s=params["fetch_timeout"],
        image_max_bytes=params["max_image_bytes"],
    )
    return AgentSettings(
        pool=pool,
        driver=choose_driver(params["driver"]),
        state_dir=params["state_dir"] or default_state_dir(),
        image_service=params["image_service"],
        image_service_token="" if token_file is None else load_token(token_file),
        fetchers=params["fetchers"] or default_fetchers(),
        pending_max=params["max_pending"],
        volblocksize_bytes=int(params["volblocksize"]),
        limits=limits,
    )


def _announce(settings: AgentSettings, *, chosen: bool) -> None:
    """Say where volumes go; at the default log level only if nobody asked for this driver."""
    words = (
        "no ZFS here: using the file driver"
        if chosen and settings.driver == "file"
        else f"using the {settings.driver} driver"
    )
    level = logging.WARNING if chosen and settings.driver == "file" else logging.INFO
    log.log(level, words, extra={"pool": settings.pool.text, "state_dir": str(settings.state_dir)})


def _leave(status: int) -> None:
    """End the process even if a fetch hangs in the kernel: everything it does can be cut off and is repaired at the next start."""
    sys.stdout.flush()
    sys.stderr.flush()
    hanging = [
        thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon
    ]
    if hanging:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
