"""``mistify-image blobs``: container images into a content store, for programs."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import BinaryIO

import click

from image_service.copying import copy_blobs
from image_service.imagestore.fetching import Downloader, PullPolicy, check_signature
from image_service.imagestore.importing import import_image
from image_service.imagestore.options import NAME_OPTION, STORE_OPTION, default_name, open_store
from image_service.imagestore.steps import chain
from image_service.store_urls import blobs_source, blobs_target
from imaging.aci import parse_app_string
from imaging.errors import InvalidArgumentError, MistifyError
from imaging.files import os_errors
from imaging.simplestreams.signing import Verifier

_KEYRING_OPTION = click.option(
    "--keyring", type=click.Path(path_type=Path, dir_okay=False), help="Public keys, binary or armoured."
)


@click.group(name="blobs")
def command() -> None:
    """Put container images into a content store."""


@command.command(name="import")
@click.argument("file")
@STORE_OPTION
@NAME_OPTION
@click.option("--latest", is_flag=True, help="Mark an app container as the latest of its name.")
@_KEYRING_OPTION
@click.option("--signature", type=click.Path(path_type=Path, dir_okay=False), help="[default: FILE.asc]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(
    file: str,
    store: str,
    name: str | None,
    keyring: Path | None,
    signature: Path | None,
    *,
    latest: bool,
    as_json: bool,
) -> None:
    """Import FILE (- for standard input): an app container image (ACI) or an OCI image layout as a tar archive, packed or not.

    Prints its key. Exit status 1 if it is refused; nothing is left of it then. With a keyring it must have a good signature over FILE
    as it is.
    """
    try:
        with ExitStack() as stack:
            _check(file, keyring, signature)
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


def _check(file: str, keyring: Path | None, signature: Path | None) -> None:
    """A good signature over the file, if keys were given."""
    if keyring is None:
        if signature is not None:
            raise InvalidArgumentError("a signature says nothing without a keyring")
        return
    if file == "-":
        raise InvalidArgumentError("standard input cannot be verified; give a file")
    detached = signature or Path(f"{file}.asc")
    with os_errors(f"cannot read signature {detached}"):
        data = detached.read_bytes()
    check_signature(Verifier.from_file(keyring), Path(file), data, file)


@command.command()
@click.argument("image")
@STORE_OPTION
@click.option(
    "--pull-policy",
    type=click.Choice([policy.value for policy in PullPolicy]),
    default=PullPolicy.UPDATE.value,
    show_default=True,
)
@click.option("--latest", is_flag=True, help="Mark the image as the latest of its name.")
@_KEYRING_OPTION
@click.option("--dependencies", is_flag=True, help="Fetch what it is laid over, too; all keys are printed.")
def fetch(image: str, store: str, pull_policy: str, keyring: Path | None, *, latest: bool, dependencies: bool) -> None:
    """Fetch an app container image from a URL, or by its name (example.com/app:1.0,os=linux), and print its key.

    "new" takes what the store has of it, "update" asks the source once that is older than the source allowed, "never" does not ask.
    With a keyring nothing counts that it did not sign.
    """
    verifier = Verifier.from_file(keyring) if keyring else None
    policy, mark = PullPolicy(pull_policy), latest or None
    with open_store(store) as opened, closing(Downloader(opened, verifier=verifier)) as downloader:
        try:
            if "://" in image:
                key = downloader.fetch(image, policy=policy, latest=mark)
            else:
                key = downloader.fetch_name(parse_app_string(image), policy=policy, latest=mark)
            keys = [key, *(downloader.fetch_dependencies(key) if dependencies else [])]
        except MistifyError as err:
            raise type(err)(chain(err)) from err
    click.echo("\n".join(keys))


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
