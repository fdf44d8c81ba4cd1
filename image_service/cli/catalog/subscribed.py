"""Work with catalogues by name: add, list, remove, search, import, mirror."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec

from image_service.catalog_import import ServiceClient, import_image
from image_service.catalog_mirror import Mirror, MirrorOptions, MirrorReport, check_target
from image_service.catalog_registry import Registry, find_image, matches
from image_service.cli.catalog.lookup import answering
from image_service.lifecycle import ImageType
from imaging.errors import InvalidArgumentError, MistifyError
from imaging.files import os_errors
from imaging.simplestreams.paths import IMAGE_DOWNLOADS
from imaging.simplestreams.publishing import KEEP_S
from imaging.simplestreams.signing import Signer
from imaging.simplestreams.transfer import items_of
from imaging.simplestreams.tree import Filter, StreamItem
from rpc.auth import load_token

IMPORT_TIMEOUT_S = 24 * 3600.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def default_directory() -> Path:
    """Where the list of catalogues is if nobody says."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    if os.geteuid() == 0:
        return Path("/var/lib/mistify-image-service/catalogs")
    return Path(base).expanduser() / "mistify-image-service" / "catalogs"


_registry_option = click.option(
    "--catalogs-dir",
    "registry",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_directory,
    show_default="/var/lib/mistify-image-service/catalogs for root, else below ~/.local/state",
    envvar="MISTIFY_CATALOGS_DIR",
    callback=lambda _ctx, _param, value: Registry(value),
    help="Where the list of catalogues is kept.",
)


@click.command()
@click.argument("name")
@click.argument("url")
@click.option("--keyring", type=click.Path(path_type=Path, dir_okay=False), help="Public keys, binary or armoured.")
@_registry_option
@_json_option
def add(registry: Registry, name: str, url: str, keyring: Path | None, *, as_json: bool) -> None:
    """Add the catalogue at URL under NAME. With a keyring nothing that is not signed by it counts."""
    with answering(as_json=as_json):
        keys = None
        if keyring is not None:
            with os_errors(f"cannot read keyring {keyring}"):
                keys = keyring.read_bytes()
        added = registry.add(name, url, keys)
        try:
            with registry.opened(name) as (_, reader):
                info = reader.read().info
        except MistifyError:
            registry.remove(name)
            raise
        if keys is None and url.startswith("http:"):
            click.echo(f"warning: nothing protects {url}: neither keys nor https", err=True)
        trust = "signed" if info.signed else "not signed"
        click.echo(json.dumps(msgspec.to_builtins(added)) if as_json else f"{name}: {url} ({trust})")


@click.command(name="list")
@_registry_option
@_json_option
def list_catalogs(registry: Registry, *, as_json: bool) -> None:
    """List the catalogues."""
    with answering(as_json=as_json):
        catalogs = registry.list()
        if as_json:
            click.echo(json.dumps(msgspec.to_builtins(catalogs)))
            return
        for one in catalogs:
            click.echo(f"{one.name}\t{one.url}\t{'signed' if one.signed else 'not signed'}")


@click.command()
@click.argument("name")
@_registry_option
def remove(registry: Registry, name: str) -> None:
    """Forget a catalogue; what was mirrored or imported stays."""
    registry.remove(name)


@click.command()
@click.argument("query", nargs=-1)
@click.option("--catalog", "names", multiple=True, help="Only in this catalogue. Repeatable.")
@_registry_option
@_json_option
def search(registry: Registry, query: Sequence[str], names: Sequence[str], *, as_json: bool) -> None:
    """Find files and ids in the catalogues whose product, aliases or attributes contain every word of QUERY."""
    with answering(as_json=as_json):
        found: list[tuple[str, StreamItem]] = []
        for name in names or [one.name for one in registry.list()]:
            with registry.opened(name) as (_, reader):
                found += [(name, item) for item in reader.read().items() if matches(item, query)]
        if as_json:
            click.echo(json.dumps([_item_wire(name, item) for name, item in found]))
            return
        for name, item in found:
            what = item.ftype or item.attributes.get("id", item.name)
            shown = (f"{name}:{item.product}:{item.version}", what, item.attributes.get("size", "-"), *item.aliases)
            click.echo("\t".join(shown))


def _item_wire(name: str, item: StreamItem) -> dict[str, Any]:
    place = {"catalog": name, "product": item.product, "version": item.version, "item": item.name}
    return place | {"aliases": item.aliases, "attributes": dict(item.attributes)}


@click.command(name="import")
@click.argument("image")
@click.option("--type", "image_type", type=click.Choice([one.value for one in ImageType]), default="kvm")
@click.option("--arch", default="", help="An architecture (amd64); default: this machine's.")
@click.option("--service", default="http://127.0.0.1:20000", envvar="MISTIFY_IMAGE_SERVICE", help="The image service.")
@click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), help="The service's token.")
@click.option("--timeout-s", type=click.FloatRange(min=0), default=IMPORT_TIMEOUT_S, help="Wait at most so long.")
@_registry_option
@_json_option
def import_command(registry: Registry, image: str, image_type: str, arch: str, **params: Any) -> None:
    """Import IMAGE, written NAME:ALIAS or NAME:PRODUCT with an optional :VERSION, into the image service.

    The service fetches the file and verifies it against the digest of the catalogue. Prints the image's record.
    """
    with answering(as_json=params["as_json"]):
        name, colon, wanted = image.partition(":")
        if not colon or not wanted:
            raise InvalidArgumentError(
                f"not an image of a catalogue: {image[:200]!r} (want NAME:ALIAS or NAME:PRODUCT)"
            )
        kind = ImageType(image_type)
        token = load_token(params["token_file"]) if params["token_file"] else ""
        client = ServiceClient(params["service"], token)
        with registry.opened(name) as (source, reader):
            item = find_image(reader.read([IMAGE_DOWNLOADS]), wanted, kind, arch)
            record = import_image(client, source, item, kind, timeout_s=params["timeout_s"])
        click.echo(json.dumps(record))


def _seconds(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """``90s``, ``30m``, ``6h``, ``1d``."""
    if value is None:
        return None
    number, unit = value[:-1], value[-1:]
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise click.BadParameter("want a time such as 30m, 6h or 1d")
    return float(int(number) * _UNITS[unit])


@click.command()
@click.argument("name")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--filter", "filters", multiple=True, metavar="FILTER", help="key=value, !=, ~ (regex), !~. Repeatable.")
@click.option("--max", "versions_max", type=click.IntRange(min=1), help="Newest versions of each product.")
@click.option("--key", type=click.Path(path_type=Path, dir_okay=False), help="Private key to sign the own catalogue.")
@click.option("--keep-s", type=click.FloatRange(min=0), default=KEEP_S, help="Files stay so long after they left.")
@click.option("--verify", is_flag=True, help="Read files that are here already and compare their digests.")
@click.option("--every", "every_s", callback=_seconds, metavar="TIME", help="Run for ever, once every TIME (30m, 6h).")
@_registry_option
@_json_option
def mirror(registry: Registry, name: str, directory: Path, filters: Sequence[str], **params: Any) -> None:
    """Mirror a catalogue's downloads to DIRECTORY, with a catalogue of its own that any web server can serve.

    Exit status 1 if a version could not be brought whole; it then stays out of the catalogue until a run brings it.
    """
    with answering(as_json=params["as_json"]):
        options = MirrorOptions(
            filters=[Filter(text) for text in filters],
            versions_max=params["versions_max"],
            keep_s=params["keep_s"],
            verify=params["verify"],
        )
        check_target(directory)
        while params["every_s"] is not None:
            _mirror_whatever_happens(registry, name, directory, options, params)
            threading.Event().wait(params["every_s"])
        report = _mirror_once(registry, name, directory, options, params["key"])
        _show(report, as_json=params["as_json"])
    if report.failed:
        raise click.exceptions.Exit(1)


def _mirror_whatever_happens(
    registry: Registry, name: str, directory: Path, options: MirrorOptions, params: Mapping[str, Any]
) -> None:
    """One run of many: what goes wrong is told, and the next run tries again."""
    try:
        report = _mirror_once(registry, name, directory, options, params["key"])
    except MistifyError as err:
        click.echo(f"failed: {err.message}", err=True)
    else:
        _show(report, as_json=params["as_json"])


def _mirror_once(
    registry: Registry, name: str, directory: Path, options: MirrorOptions, key: Path | None
) -> MirrorReport:
    with ExitStack() as stack:
        signer = stack.enter_context(Signer.from_file(key)) if key else None
        source, reader = stack.enter_context(registry.opened(name))
        return Mirror(reader, items_of(source), directory, options, signer=signer).run()


def _show(report: MirrorReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report)))
        return
    for line in report.failed:
        click.echo(f"failed: {line}", err=True)
    click.echo(
        f"{report.versions} versions in {report.files} files; brought {report.brought} "
        f"({report.received_bytes} bytes), removed {report.removed}"
    )
