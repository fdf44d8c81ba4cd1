"""``mistify-image-service``: the command."""

from __future__ import annotations

import functools
import sys
from typing import Any

import click

from image_service.app import create
from image_service.config import DEFAULT_PORT, service_config, service_options, translate_original
from imaging.errors import MistifyError
from imaging.release import release
from rpc.daemon import run_daemon
from rpc.options import CONTEXT_SETTINGS, config_option, daemon_options, daemon_settings


@click.command(context_settings=CONTEXT_SETTINGS)
@daemon_options(default_port=DEFAULT_PORT, port_flag="-a")
@config_option("-c", "--config-file", translate=translate_original)
@service_options
@click.version_option(release())
def main(**params: Any) -> None:
    """Store images, fetch them from their sources, and serve them to hypervisors."""
    settings = daemon_settings(params, component="mistify-image-service", version=release(), use_uvloop=False)
    try:
        config = service_config(params)
    except MistifyError as err:
        raise click.UsageError(err.message) from err
    sys.exit(run_daemon(settings, functools.partial(create, config=config)))


if __name__ == "__main__":
    main()
