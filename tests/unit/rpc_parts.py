"""A small registry and a small daemon, for the tests of the rpc package."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from aiohttp import web

from imaging.errors import BusyError, NotFoundError, UnavailableError
from rpc.daemon import DRAIN_S, IDLE_TIMEOUT_S, run_daemon
from rpc.dispatch import Registry
from rpc.messages import (
    Disk,
    GuestRequest,
    GuestResponse,
    Image,
    ImageRequest,
    ImagesAnswer,
    Volume,
    VolumeRequest,
    VolumesAnswer,
)
from rpc.options import CONTEXT_SETTINGS, config_option, daemon_options, daemon_settings
from rpc.server import LIFECYCLE, ServerSettings, create_app
from tests.waiting import wait_until

RPC = "/_mistify_RPC_"


async def list_images(request: ImageRequest) -> ImagesAnswer:
    """All images."""
    return ImagesAnswer()


async def get_image(request: ImageRequest) -> ImagesAnswer:
    """One image."""
    if request.id in {"", "missing"}:
        raise NotFoundError("not found")
    if request.id == "busy":
        raise BusyError("image busy is in use", ["mistify/guests/g1/disk-0", "mistify/guests/g2/disk-0"])
    if request.id == "later":
        raise UnavailableError("the queue is full")
    if request.id == "broken":
        raise RuntimeError("secret of the house")
    return ImagesAnswer(images=[Image(id=request.id, type="kvm", size_mib=4, status="complete")])


async def create_volume(request: VolumeRequest) -> VolumesAnswer:
    """Create a volume."""
    return VolumesAnswer(volumes=[Volume(id=f"mistify/{request.id}", size_mib=request.size_mib, device="/dev/null")])


async def create_guest_disks(request: GuestRequest) -> GuestResponse:
    """Add a disk to what came."""
    guest = request.guest
    guest.disks = [*guest.disks, Disk(size_mib=1)]
    return GuestResponse(guest=guest)


def sample_registry() -> Registry:
    registry = Registry()
    registry.register("ImageStore.ListImages", list_images, request=ImageRequest, answer=ImagesAnswer)
    registry.register(
        "ImageStore.GetImage", get_image, request=ImageRequest, answer=ImagesAnswer, aliases=("ImageStore.ShowImage",)
    )
    registry.register("ImageStore.CreateVolume", create_volume, request=VolumeRequest, answer=VolumesAnswer)
    registry.register("ImageStore.CreateGuestDisks", create_guest_disks, request=GuestRequest, answer=GuestResponse)
    return registry


async def create_sample_app(settings: ServerSettings) -> web.Application:
    """An application with a call that waits for a file, so that tests decide when it ends; the hook leaves a file."""
    app = create_app(settings, registry=sample_registry())
    scratch = Path(os.environ["SCRATCH"])

    async def slow(request: web.Request) -> web.Response:
        (scratch / "started").touch()
        await asyncio.to_thread(wait_until, (scratch / "let-go").exists, "the test lets the call go")
        return web.Response(text="done\n")

    async def park() -> None:
        (scratch / "parked").touch()
        if os.environ.get("PARK_FAILS"):
            raise RuntimeError("the hook is broken")

    app.router.add_get("/slow", slow)
    app[LIFECYCLE].park_hooks.append(park)
    return app


@click.command(context_settings=CONTEXT_SETTINGS)
@config_option("-c", "--config")
@daemon_options(default_port=0)
@click.option("--uvloop", is_flag=True)
def main(**params: Any) -> None:
    """A daemon for tests."""
    use_uvloop = params.pop("uvloop")
    settings = daemon_settings(params, component="sample", version="1", use_uvloop=use_uvloop)
    drain_s = float(os.environ.get("DRAIN_S", DRAIN_S))
    idle_timeout_s = float(os.environ.get("IDLE_TIMEOUT_S", IDLE_TIMEOUT_S))
    sys.exit(run_daemon(replace(settings, drain_s=drain_s, idle_timeout_s=idle_timeout_s), create_sample_app))


if __name__ == "__main__":
    main()
