"""``mistify-image blobs``: container images into a content store, for programs."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import BinaryIO

import click

from image_service.copying import copy_blobs
from image_service.imagestore.fetching import Downloader, PullPolicy
from image_service.imagestore.importing import import_image
from image_service.imagestore.options import NAME_OPTION, STORE_OPTION, default_name, open_store
from image_service.imagestore.steps import chain
from image_service.store_urls import blobs_source, blobs_target
from imaging.errors import InvalidArgumentError, MistifyError
from imaging.files import os_errors


@click.group(name="blobs")
def command() -> None:
    """Put container images into a content store."""


@command.command(name="import")
@click.argument("file")
@STORE_OPTION
@NAME_OPTION
@click.option("--latest", is_flag=True, help="Mark an app container as the latest of its name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(file: str, store: str, name: str | None, *, latest: bool, as_json: bool) -> None:
    """Import FILE (- for standard input): an app container image (ACI) or an OCI image layout as a tar archive, packed or not.

    Prints its key. Exit status 1 if it is refused; nothing is left of it then.
    """
    try:
        with ExitStack() as stack:
            source = _open(file, stack)
            opened = stack.enter_context(open_store(store))
            imported = import_image(opened, source, name=name or default_name(file), latest=latest or None)
    except MistifyError as err:
        if not as_json:
            raise type(err)(chain(err)) from err
        click.echo(json.dumps({"error": chain(err)}))
        sys.exit(1)
    if not as_json:
        for image in imported:
            click.echo(image.key)
        return
    first, *others = [image.to_wire() for image in imported]
    click.echo(json.dumps(first | ({"others": others} if others else {})))


@command.command()
@click.argument("url")
@STORE_OPTION
@click.option(
    "--pull-policy",
    type=click.Choice([policy.value for policy in PullPolicy]),
    default=PullPolicy.UPDATE.value,
    show_default=True,
)
@click.option("--latest", is_flag=True, help="Mark the image as the latest of its name.")
def fetch(url: str, store: str, pull_policy: str, *, latest: bool) -> None:
    """Fetch an app container image from URL and print its key.

    "new" takes what the store has from this URL, "update" asks the source once that is older than the source allowed, "never" does not ask.
    """
    with open_store(store) as opened, closing(Downloader(opened)) as downloader:
        try:
            click.echo(downloader.fetch(url, policy=PullPolicy(pull_policy), latest=latest or None))
        except MistifyError as err:
            raise type(err)(chain(err)) from err


def _open(file: str, stack: ExitStack) -> BinaryIO:
    if file == "-":
        return sys.stdin.buffer
    path = Path(file)
    with os_errors(f"cannot open {file}"):
        if path.is_dir():
            raise InvalidArgumentError(f"{file} is a directory; make a tar archive of it")
        return stack.enter_context(path.open("rb", buffering=0))


@command.command()
@click.option(
    "--from", "source", required=True, metavar="URL", help="file:///DIRECTORY or s3://BUCKET/PREFIX?endpoint=..."
)
@click.option("--to", "target", required=True, metavar="URL", help="The same forms.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
def copy(source: str, target: str, *, dry_run: bool) -> None:
    """Copy all images that the target lacks, each verified by its digest. A copy that broke off goes on where it was.

    The source may be in use. A local target must not be.
    """
    with blobs_source(source) as ours, blobs_target(target) as theirs:
        count = copy_blobs(
            ours, theirs, dry_run=dry_run, told=lambda info: click.echo(f"{info.digest} {info.size_bytes}")
        )
    would = "would be " if dry_run else ""
    click.echo(f"{count.copied} images of {count.copied_bytes} bytes {would}copied, {count.same} were there")
