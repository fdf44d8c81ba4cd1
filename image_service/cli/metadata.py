"""``mistify-image metadata``: records from one store to another."""

from __future__ import annotations

import click

from image_service.copying import copy_records
from image_service.store_urls import records_source, records_target


@click.group(name="metadata")
def command() -> None:
    """Work with an image service's records."""


@command.command()
@click.option("--from", "source", required=True, metavar="URL", help="sqlite:///FILE or etcd://HOST:PORT,.../PREFIX")
@click.option("--to", "target", required=True, metavar="URL", help="The same forms.")
@click.option("--prune", is_flag=True, help="Remove records from the target that the source does not have.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
def copy(source: str, target: str, *, prune: bool, dry_run: bool) -> None:
    """Copy all records, and verify that they are the same afterwards.

    The source may be in use; copy once more, with --prune, when its service is stopped. Nobody may write to the target.
    """
    with records_source(source) as ours, records_target(target) as theirs:
        count = copy_records(ours, theirs, prune=prune, dry_run=dry_run)
    would = "would be " if dry_run else ""
    click.echo(f"{count.copied} entries {would}copied, {count.removed} {would}removed, {count.same} were the same")
