"""``mistify-image catalog``: image catalogues in the simplestreams format.

``lookup`` looks at catalogues anywhere; ``subscribed`` works with those that were added by name.
"""

from __future__ import annotations

import click

from image_service.cli.catalog import lookup, subscribed


@click.group(name="catalog")
def command() -> None:
    """Look up, check, import and mirror images of simplestreams catalogues."""


for _module in (lookup, subscribed):
    for _each in vars(_module).copy().values():
        if isinstance(_each, click.Command):
            command.add_command(_each)
