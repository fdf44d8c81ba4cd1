"""``mistify-image catalog``: image catalogues in the simplestreams format.

``lookup`` looks at catalogues anywhere; ``subscribed`` works with those that were added by name.
"""

from __future__ import annotations

import click

from image_service.cli.catalog import lookup


@click.group(name="catalog")
def command() -> None:
    """Look up, check, import and mirror images of simplestreams catalogues."""


for _each in (lookup.fetch, lookup.validate, lookup.product_ids, lookup.url, lookup.marshal):
    command.add_command(_each)
