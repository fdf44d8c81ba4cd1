"""What the commands over a content store have in common."""

from __future__ import annotations

import re
from pathlib import Path

import click

from image_service.imagestore.importing import DEFAULT_NAME
from image_service.imagestore.store import ImageStore

STORE_DIRECTORY = "/var/lib/mistify/containers"

STORE_OPTION = click.option(
    "--store",
    metavar="DIRECTORY",
    envvar="MISTIFY_CONTAINER_STORE",
    default=STORE_DIRECTORY,
    show_default=True,
    show_envvar=True,
    help="The content store.",
)

URL_OPTION = click.option("--url", metavar="URL", help="Ask a running image service instead of a store.")

NAME_OPTION = click.option(
    "--name", help="The name of OCI images whose layout gives only tags. [default: from FILE's name]"
)


def open_store(directory: str) -> ImageStore:
    """The store in a directory, made if need be."""
    return ImageStore(directory)


def default_name(file: str) -> str:
    """A name for OCI images, from the name of their file."""
    stem = Path(file).name.lower().partition(".")[0]
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or DEFAULT_NAME
