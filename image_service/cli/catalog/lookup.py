"""Lookups in image-ids catalogues: the library's functions on the command line.

With ``--json`` the answer is one JSON object on standard output. An error is ``{"error": "...", "kind": "..."}`` and exit status 1; kind is
``NotFound`` where the library says so, and otherwise names the class of the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError
from imaging.files import os_errors
from imaging.kv.sqlite import SqliteKeyValue
from imaging.simplestreams.constraint import ImageConstraint
from imaging.simplestreams.freshness import LastSeen, parse_date
from imaging.simplestreams.model import CloudSpec, ImageMetadata, ResolveInfo
from imaging.simplestreams.paths import image_metadata_url
from imaging.simplestreams.reader import Lookup
from imaging.simplestreams.reader import fetch as fetch_images
from imaging.simplestreams.signing import Verifier
from imaging.simplestreams.sources import open_source
from imaging.simplestreams.validate import validate_image_metadata
from imaging.simplestreams.writer import WriteOptions, marshal_image_metadata

F = TypeVar("F", bound=Callable[..., Any])


def kind_of(err: MistifyError) -> str:
    """How an error is named on the wire: its class without ``Error``; subclasses of NotFoundError are NotFound."""
    kind = NotFoundError if isinstance(err, NotFoundError) else type(err)
    return kind.__name__.removesuffix("Error")


@contextmanager
def answering(*, as_json: bool) -> Iterator[None]:
    """With ``as_json`` an error becomes a JSON object and exit status 1; else it is left to the program's one line."""
    try:
        yield
    except MistifyError as err:
        if not as_json:
            raise
        notes = list(getattr(err, "__notes__", ()))
        click.echo(json.dumps({"error": err.message, "kind": kind_of(err)} | ({"notes": notes} if notes else {})))
        raise click.exceptions.Exit(1) from err


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_compat_option = click.option("--compat", is_flag=True, help="Behave as clients of old, faults included.")
_names_options = _options(
    click.option("--series", multiple=True, help="A series or version (precise, 22.04). Repeatable."),
    click.option("--arch", "arches", multiple=True, help="An architecture (amd64). Repeatable."),
    click.option("--stream", default="", help="A stream (released, daily)."),
)
_lookup_options = _options(
    click.option("--source", "sources", multiple=True, metavar="URL", help="http(s) or file URL, or a directory."),
    click.option("--signed-only", is_flag=True, help="Only signed data counts."),
    click.option("--keyring", type=click.Path(path_type=Path), help="Public keys, binary or armoured."),
    click.option("--region", default="", help="A region of a cloud."),
    click.option("--endpoint", default="", help="Where the cloud's API is."),
    click.option("--state", type=click.Path(path_type=Path), help="Remember here what was seen; refuse older data."),
    _names_options,
    _compat_option,
    _json_option,
)


@contextmanager
def _opened(params: dict[str, Any]) -> Iterator[tuple[ImageConstraint, Lookup]]:
    """What the options say: which images, and how to look them up."""
    names = {key: params[key] for key in ("region", "endpoint", "series", "arches", "stream", "compat")}
    with ExitStack() as stack:
        seen = None
        if params["state"]:
            store = SqliteKeyValue(params["state"])
            stack.callback(store.close)
            seen = LastSeen(store)
        verifier = Verifier.from_file(params["keyring"]) if params["keyring"] else None
        yield (
            ImageConstraint(**names),
            Lookup(only_signed=params["signed_only"], verifier=verifier, compat=params["compat"], last_seen=seen),
        )


def _info_wire(info: ResolveInfo | None) -> dict[str, Any] | None:
    return info.to_wire() if info else None


@click.command()
@_lookup_options
def fetch(**params: Any) -> None:
    """Find images, newest of each kind, and say where they were found."""
    with answering(as_json=params["as_json"]), _opened(params) as (constraint, lookup):
        images, info = fetch_images([open_source(text) for text in params["sources"]], constraint, lookup)
        if params["as_json"]:
            wire = {"images": [image.to_wire() for image in images], "resolve_info": _info_wire(info)}
            click.echo(json.dumps(wire))
            return
        for image in images:
            shown = (image.id, image.version, image.arch, image.region_name, image.virt_type, image.storage)
            click.echo("\t".join(text or "-" for text in shown))
        click.echo(f"{len(images)} images{_where(info)}", err=True)


def _where(info: ResolveInfo | None) -> str:
    if info is None:
        return ""
    return f" from {info.source} ({'signed' if info.signed else 'not signed'}: {info.index_url})"


@click.command()
@_lookup_options
def validate(**params: Any) -> None:
    """Check that a catalogue has images for a series, a region, its endpoint, and architectures; all must be given."""
    with answering(as_json=params["as_json"]), _opened(params) as (constraint, lookup):
        ids, info = validate_image_metadata([open_source(text) for text in params["sources"]], constraint, lookup)
        if params["as_json"]:
            click.echo(json.dumps({"image_ids": ids, "resolve_info": _info_wire(info)}))
            return
        click.echo("\n".join(ids))
        click.echo(f"{len(ids)} images{_where(info)}", err=True)


@click.command(name="product-ids")
@_names_options
@_compat_option
@_json_option
def product_ids(series: Sequence[str], arches: Sequence[str], stream: str, *, compat: bool, as_json: bool) -> None:
    """Print the products a lookup would look for, in order."""
    with answering(as_json=as_json):
        names = ImageConstraint(series=series, arches=arches, stream=stream, compat=compat).product_ids()
        click.echo(json.dumps({"product_ids": names}) if as_json else "\n".join(names))


@click.command()
@click.argument("source")
@click.argument("stream", default="")
@_json_option
def url(source: str, stream: str, *, as_json: bool) -> None:
    """Print the base URL a lookup would use for SOURCE (a URL or an absolute path)."""
    with answering(as_json=as_json):
        found = image_metadata_url(source, stream)
        click.echo(json.dumps({"url": found}) if as_json else found)


class _MarshalInput(msgspec.Struct):
    images: list[ImageMetadata]
    clouds: list[CloudSpec] = msgspec.field(default_factory=list)
    updated: str = ""


@click.command()
@click.argument("file")
@click.option("--index", "which", flag_value="index", help="Print only the index, byte for byte.")
@click.option("--products", "which", flag_value="products", help="Print only the products, byte for byte.")
@click.option("--updated", default="", help="The date to write; default: that of FILE, else now.")
@_compat_option
@click.option("--json", "as_json", is_flag=True, help="Print errors as JSON, too.")
def marshal(file: str, which: str | None, updated: str, *, compat: bool, as_json: bool) -> None:
    """Write the documents for images described in FILE (- is standard input).

    FILE is {"images": [...], "clouds": [{"region", "endpoint"}...], "updated": date}, or the list of images alone. The answer is
    {"index": text, "products": text}.
    """
    with answering(as_json=as_json):
        given = _read_marshal_input(file)
        moment = _moment(updated or given.updated)
        documents = marshal_image_metadata(given.images, given.clouds, moment, WriteOptions(compat=compat))
        texts = dict(zip(("index", "products"), (data.decode() for data in documents), strict=True))
        click.echo(texts[which] if which else json.dumps(texts), nl=not which)


def _read_marshal_input(file: str) -> _MarshalInput:
    if file == "-":
        data = sys.stdin.buffer.read()
    else:
        with os_errors(f"cannot read {file}"):
            data = Path(file).read_bytes()
    try:
        if data.lstrip()[:1] == b"[":
            return _MarshalInput(msgspec.json.decode(data, type=list[ImageMetadata]))
        return msgspec.json.decode(data, type=_MarshalInput)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadDataError(f"not a description of images: {file}: {err}") from err


def _moment(text: str) -> datetime:
    """A date in the form of the documents or of RFC 3339; none is now."""
    if not text:
        return datetime.now(UTC)
    moment = parse_date(text)
    if moment is not None:
        return moment
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as err:
        raise InvalidArgumentError(f"not a date: {text[:80]!r}") from err
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
