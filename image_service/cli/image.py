"""``mistify-image image``: the container images of a content store."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from image_service.imagestore.checking import Finding, StoreCheck
from image_service.imagestore.oci_checking import OciCheck
from image_service.imagestore.oci_images import OciImage, OciImages
from image_service.imagestore.options import STORE_OPTION, URL_OPTION, open_store
from image_service.imagestore.references import (
    Found,
    Row,
    find_image,
    list_rows,
    manifest_of,
    pretty,
    record_to_row,
    show_time,
    to_rows,
)
from image_service.imagestore.service_images import ServiceImages
from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.errors import AlreadyExistsError, InvalidArgumentError, MistifyError, StoreRemovalError
from imaging.files import durable_file, os_errors

SHORT_ID_CHARS = len("sha512-") + 12
COPY_BYTES = 1 << 20

FIELDS = ("id", "name", "size", "importtime", "lastused")
SORTS = {
    "name": lambda row: row.name,
    "importtime": lambda row: row.import_time_ns,
    "lastused": lambda row: row.last_used_ns,
    "size": lambda row: row.size_bytes,
}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@click.group(name="image")
def command() -> None:
    """Look at, export, verify and remove the container images of a content store.

    IMAGE is a key (sha512-... of an app container, sha256:... of an OCI image) or the beginning of one, a name with labels
    (name:version,label=value) or a name and tag (name:tag).
    """


# -- list and show ---------------------------------------------------------------------------------------------------------


@command.command(name="list")
@STORE_OPTION
@click.option("--fields", default=",".join(FIELDS), show_default=True, help="Columns, separated by commas.")
@click.option("--sort", type=click.Choice(sorted(SORTS)), default="importtime", show_default=True)
@click.option("--order", type=click.Choice(["asc", "desc"]), default="asc", show_default=True)
@click.option("--full", is_flag=True, help="Whole ids, sizes in bytes.")
@click.option("--no-legend", is_flag=True, help="No line with the names of the columns.")
@click.option("--format", "style", type=click.Choice(["table", "json", "json-pretty"]), default="table")
@URL_OPTION
def list_(
    store: str, fields: str, sort: str, order: str, style: str, url: str | None, *, full: bool, no_legend: bool
) -> None:
    """List images."""
    columns = fields.split(",")
    for column in columns:
        if column not in FIELDS:
            raise InvalidArgumentError(f"unknown field {column[:64]!r}; there is: {', '.join(FIELDS)}")
    rows = sorted(_rows(store, url), key=SORTS[sort], reverse=order == "desc")
    if style != "table":
        click.echo(json.dumps([row.to_wire() for row in rows], indent=2 if style == "json-pretty" else None))
        return
    lines = [[_cell(row, column, full=full) for column in columns] for row in rows]
    _table(lines if no_legend else [[column.upper() for column in columns], *lines])


def _rows(store: str, url: str | None) -> list[Row]:
    if url is not None:
        return [record_to_row(record) for record in ServiceImages(url).list()]
    with open_store(store) as opened:
        return list_rows(opened)


def _cell(row: Row, column: str, *, full: bool) -> str:
    values = {
        "id": row.id if full else row.id[:SHORT_ID_CHARS],
        "name": row.name,
        "size": str(row.size_bytes) if full else f"{row.size_bytes / 1024:.0f} KiB",
        "importtime": show_time(row.import_time_ns),
        "lastused": show_time(row.last_used_ns),
    }
    return values[column]


def _table(lines: list[list[str]]) -> None:
    widths = [max(len(line[number]) for line in lines) for number in range(len(lines[0]))] if lines else []
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@command.command()
@click.argument("image")
@STORE_OPTION
@URL_OPTION
def show(image: str, store: str, url: str | None) -> None:
    """Print what is known of IMAGE as JSON."""
    if url is not None:
        click.echo(json.dumps(ServiceImages(url).get(image), indent=2))
        return
    with open_store(store) as opened:
        found = _find(opened, image)
        rows = [row.to_wire() for row in to_rows(opened, found)]
    document = rows[0]
    if isinstance(found, OciImage):
        document |= {"media_type": found.media_type, "tags": list(found.tags)}
    else:
        document |= {"image_id": found.image_id, "latest": found.latest, "tree_store_size": found.tree_store_size_bytes}
    click.echo(json.dumps(document, indent=2))


def _find(store: ImageStore, reference: str) -> Found:
    try:
        return find_image(store, reference)
    except MistifyError as err:
        raise type(err)(chain(err)) from err


@command.command(name="cat-manifest")
@click.argument("image")
@STORE_OPTION
@click.option("--pretty-print/--no-pretty-print", default=True, show_default=True)
def cat_manifest(image: str, store: str, *, pretty_print: bool) -> None:
    """Print the manifest of IMAGE."""
    with open_store(store) as opened:
        document = manifest_of(opened, _find(opened, image))
    click.echo(pretty(document) if pretty_print else document)


# -- export ----------------------------------------------------------------------------------------------------------------


@command.command()
@click.argument("image")
@click.argument("file")
@STORE_OPTION
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@URL_OPTION
def export(image: str, file: str, store: str, url: str | None, *, overwrite: bool) -> None:
    """Write IMAGE to FILE: an app container unpacked, an OCI image as a layout archive that other tools read.

    From a running service the bytes come as they were brought.
    """
    target = Path(file)
    if target.exists() and not overwrite:
        raise AlreadyExistsError("output ACI file exists (try --overwrite)")
    try:
        if url is not None:
            with durable_file(target, replace=overwrite) as fd:
                ServiceImages(url).export(image, fd)
            return
        with open_store(store) as opened:
            found = _find(opened, image)
            with durable_file(target, replace=overwrite) as fd:
                _write(opened, found, fd)
    except AlreadyExistsError as err:
        raise AlreadyExistsError("output ACI file exists (try --overwrite)") from err


def _write(store: ImageStore, image: Found, fd: int) -> None:
    with os.fdopen(os.dup(fd), "wb") as target:
        if isinstance(image, OciImage):
            OciImages(store).export(image, target)
            return
        with store.open_stream(image.blob_key, verify=True) as source, os_errors("cannot write the image"):
            while piece := source.read(COPY_BYTES):
                target.write(piece)


# -- rm --------------------------------------------------------------------------------------------------------------------


@command.command()
@click.argument("images", nargs=-1, required=True)
@STORE_OPTION
@URL_OPTION
def rm(images: tuple[str, ...], store: str, url: str | None) -> None:
    """Remove IMAGES. Exit status 1 if one of them cannot be removed or is not there."""
    removed = stale = failed = 0
    with ExitStack() as stack:
        opened = None if url is not None else stack.enter_context(open_store(store))
        for reference in images:
            try:
                if opened is None:
                    ServiceImages(url or "").delete(reference)
                else:
                    _remove(opened, reference)
                removed += 1
            except StoreRemovalError as err:
                stale += 1
                click.echo(chain(err), err=True)
            except MistifyError as err:
                failed += 1
                click.echo(f"{reference}: {chain(err)}", err=True)
    for count, text in ((removed, "successfully removed"), (stale, "removed but left some stale files")):
        if count:
            click.echo(f"{count} image(s) {text}")
    if failed:
        click.echo(f"{failed} image(s) cannot be removed", err=True)
        sys.exit(1)


def _remove(store: ImageStore, reference: str) -> None:
    found = find_image(store, reference)
    if isinstance(found, OciImage):
        OciImages(store).delete(reference)
    else:
        store.delete_aci(found.blob_key)


# -- verify and gc ---------------------------------------------------------------------------------------------------------


@command.command()
@click.argument("images", nargs=-1)
@STORE_OPTION
@click.option(
    "--repair", is_flag=True, help="Mend what can be mended, put aside what cannot, remove what a crash left."
)
@click.option("--quick", is_flag=True, help="Do not read the images, only compare the index with the files.")
@click.option("--rebuild", is_flag=True, help="First make a new index from the files; the old one is kept as a backup.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def verify(images: tuple[str, ...], store: str, *, repair: bool, quick: bool, rebuild: bool, as_json: bool) -> None:
    """Compare IMAGES (or everything) with their digests and the index with the files. Exit status 1 if something is left wrong."""
    if rebuild:
        ImageStore.rebuild(store).close()
    with open_store(store) as opened:
        if images:
            findings = _verify_some(opened, images, repair=repair, digests=not quick)
        else:
            findings = StoreCheck(opened).verify(repair=repair, digests=not quick)
            findings += OciCheck(OciImages(opened), opened).verify(repair=repair, digests=not quick)
    _tell(findings, as_json=as_json)
    if any(not finding.repair for finding in findings):
        sys.exit(1)


def _verify_some(store: ImageStore, images: tuple[str, ...], *, repair: bool, digests: bool) -> list[Finding]:
    findings: list[Finding] = []
    for reference in images:
        found = _find(store, reference)
        if isinstance(found, OciImage):
            findings += OciCheck(OciImages(store), store).verify_image(found, repair=repair, digests=digests)
        else:
            findings += StoreCheck(store).verify_image(found.blob_key, repair=repair, digests=digests)
    return findings


def _tell(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([{"key": f.key, "problem": f.problem, "repair": f.repair} for f in findings]))
        return
    for finding in findings:
        repair = f" ({finding.repair})" if finding.repair else ""
        click.echo(f"{finding.key}: {finding.problem}{repair}".removeprefix(": "))
    if not findings:
        click.echo("ok")


@command.command()
@STORE_OPTION
@click.option(
    "--grace-period", default="24h", show_default=True, help="Keep what was used within this time (30m, 24h, 7d)."
)
@click.option("--keep", multiple=True, metavar="KEY", help="Keep this image; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def gc(store: str, grace_period: str, keep: tuple[str, ...], *, dry_run: bool) -> None:
    """Remove images nobody has used for a time, and what crashes left."""
    grace_s = _duration_s(grace_period)
    with open_store(store) as opened:
        removed = StoreCheck(opened).collect(grace_s=grace_s, keep=keep, dry_run=dry_run)
        oci = OciCheck(OciImages(opened), opened)
        removed += oci.collect(grace_s=grace_s, keep=keep, dry_run=dry_run)
        if not dry_run:
            _tell_swept(opened.temporaries.sweep())
    for item in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {item.key} {item.name}".rstrip())
    freed = sum(item.size_bytes for item in removed)
    click.echo(f"{len(removed)} image(s), {freed} bytes")


def _tell_swept(names: list[str]) -> None:
    for name in names:
        click.echo(f"removed temporary file {name}")


def _duration_s(text: str) -> float:
    """Seconds of ``1h30m``; InvalidArgumentError."""
    found = _DURATION.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise InvalidArgumentError(f"not a duration like 30m or 24h: {text[:64]!r}")
    return sum(float(number) * _UNITS_S[unit] for number, unit in found)
