"""``mistify-image stream``: ZFS send streams of volumes, without ZFS."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from imaging.compression import Compression, Readable, compress_pieces, open_decompressed
from imaging.errors import AlreadyExistsError, InvalidArgumentError
from imaging.files import durable_file, os_errors
from imaging.sendstream.applied import AppliedVolume
from imaging.sendstream.validator import Policy, StreamSummary, StreamValidator
from imaging.sendstream.volume import (
    BlockCompression,
    OlderImage,
    StreamHeader,
    check_block_size,
    derive_guid,
    hash_image,
    image_size,
    make_stream,
    padded_size,
)

READ_BYTES = 1 << 20
DEFAULT_DATASET = "mistify/volume"
_BLOCK_COMPRESSIONS = {
    "none": BlockCompression.NONE,
    "lz4": BlockCompression.LZ4,
    "zstd": BlockCompression.ZSTD,
    "gzip": BlockCompression.GZIP_6,
}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@click.group(name="stream")
def command() -> None:
    """Look at, verify, make and apply ZFS send streams of volumes.

    FILE may be compressed (gzip, zstd, xz, bzip2, lz4) and is - for standard input.
    """


@contextmanager
def _stream_input(name: str) -> Iterator[Readable]:
    """The stream's bytes, decompressed."""
    with ExitStack() as stack:
        if name == "-":
            if sys.stdin is None:
                raise InvalidArgumentError("standard input is closed")
            source: Readable = sys.stdin.buffer
        else:
            with os_errors(f"cannot open {name}"):
                source = stack.enter_context(Path(name).open("rb", buffering=0))
        with os_errors(f"cannot read {name}"):
            yield open_decompressed(source)


def _validate(name: str, volume: str | None = None) -> StreamValidator:
    base = AppliedVolume(Path(volume)).find() if volume else None
    validator = StreamValidator(base.volume if base else None, Policy(opaque=True, base_known=volume is not None))
    with _stream_input(name) as source:
        while piece := source.read(READ_BYTES):
            validator.verify(piece)
    validator.finish()
    return validator


@command.command()
@click.argument("file")
@click.option("--onto", metavar="VOLUME", help="Also require that it is an increment that fits this volume.")
def verify(file: str, onto: str | None) -> None:
    """Verify checksums and every rule that makes a stream safe to receive; exit status 1 if one is broken.

    Streams that cannot be applied (encrypted, redacted, filesystems, resuming) are verified by their checksums.
    """
    for summary in _validate(file, onto).summaries:
        click.echo(f"ok: {_line(summary)}")


@command.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(file: str, *, as_json: bool) -> None:
    """Verify a stream and say what it holds."""
    validator = _validate(file)
    if as_json:
        streams = [_wire(summary) for summary in validator.summaries]
        click.echo(json.dumps({"package": validator.is_package, "streams": streams}))
        return
    for summary in validator.summaries:
        click.echo(_line(summary))


def _line(summary: StreamSummary) -> str:
    parts = [summary.toname, summary.kind, f"guid {summary.guid}"]
    parts.append(f"increment from {summary.fromguid}" if summary.fromguid else "full")
    if summary.volsize_bytes is not None:
        parts.append(f"{summary.volsize_bytes} bytes")
    if summary.volblocksize_bytes is not None:
        parts.append(f"blocks of {summary.volblocksize_bytes}")
    parts += [f"{summary.records} records", *(feature.lower() for feature in summary.features)]
    if summary.not_applicable:
        parts.append(f"cannot be applied: {summary.not_applicable}")
    return ", ".join(parts)


def _wire(summary: StreamSummary) -> dict[str, object]:
    """Guids are decimal strings: they do not fit into a double."""
    return {
        "name": summary.toname,
        "kind": summary.kind,
        "guid": str(summary.guid),
        "fromguid": str(summary.fromguid),
        "creation": summary.creation_s,
        "features": list(summary.features),
        "records": summary.records,
        "volsize": summary.volsize_bytes,
        "volblocksize": summary.volblocksize_bytes,
        "applicable": summary.not_applicable is None,
        "reason": summary.not_applicable,
    }


@command.command()
@click.argument("file")
@click.argument("volume", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--dataset", help="The volume to take of a package that holds several.")
@click.option("--force", is_flag=True, help="Let a full stream replace what VOLUME holds.")
def apply(file: str, volume: Path, *, as_json: bool, dataset: str | None, force: bool) -> None:
    """Apply a stream to VOLUME, a file or block device; an increment onto the VOLUME its base was applied to.

    A failed apply leaves a file as it was. What VOLUME is stands in VOLUME.stream.json.
    """
    if volume.is_block_device() and file != "-":
        _validate(file)  # a device cannot be put back, so look at the whole stream before the first change
    with _stream_input(file) as source:
        try:
            applied = AppliedVolume(volume).apply(source, dataset=dataset, replace=force)
        except AlreadyExistsError as err:
            raise AlreadyExistsError(f"{err.message} (--force lets a full stream replace it)") from err
    state = applied.volume
    if as_json:
        wire = {
            "guid": str(state.guid),
            "volsize": state.volsize_bytes,
            "volblocksize": state.volblocksize_bytes,
            "creation": state.creation_s,
            "sha256": applied.digest.hex,
        }
        click.echo(json.dumps(wire))
    else:
        click.echo(f"{volume}: {state.toname}, guid {state.guid}, {state.volsize_bytes} bytes, {applied.digest}")


def _size(_ctx: click.Context, _param: click.Parameter, text: str) -> int:
    """Bytes, with an optional k or m."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in {"k", "m"} else (text, "")
    if not number.isdecimal():
        raise click.BadParameter(f"{text!r} is not a size")
    return int(number) * _UNITS[unit]


@command.command()
@click.argument("raw", type=click.Path(path_type=Path))
@click.option(
    "--from", "older", metavar="OLDER", type=click.Path(path_type=Path), help="Make an increment from this image."
)
@click.option("-o", "--output", required=True, metavar="FILE", help="The stream; - for standard output.")
@click.option("--volblocksize", callback=_size, default="16k", show_default=True, metavar="BYTES")
@click.option("--name", help=f"pool/path@snapshot  [default: {DEFAULT_DATASET}@GUID]")
@click.option("--creation", type=click.IntRange(0), default=0, help="Unix seconds.  [default: 0]")
@click.option("--guid", type=click.IntRange(1, (1 << 64) - 1), help="[default: derived from the content]")
@click.option("--from-guid", type=click.IntRange(1, (1 << 64) - 1), help="[default: derived from OLDER's content]")
@click.option("--block-compression", type=click.Choice(sorted(_BLOCK_COMPRESSIONS)), default="none", show_default=True)
@click.option(
    "--compress", type=click.Choice(["none", "gzip", "zstd"]), default="none", help="Compress the whole stream."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as one JSON object (not with -o -).")
def make(
    raw: Path, older: Path | None, output: str, volblocksize: int, name: str | None, creation: int, **options: object
) -> None:
    """Make a stream of a raw disk image. The same input gives the same bytes."""
    check_block_size(volblocksize)
    _check_output(output, raw, older)
    with ExitStack() as stack:
        image = stack.enter_context(_Raw.open(raw))
        base = stack.enter_context(_Raw.open(older)) if older else None
        guid = _int(options["guid"]) or image.guid(volblocksize)
        fromguid = (_int(options["from_guid"]) or base.guid(volblocksize)) if base else 0
        if options["from_guid"] and base is None:
            raise InvalidArgumentError("--from-guid needs --from")
        header = StreamHeader(
            guid,
            name or f"{DEFAULT_DATASET}@{guid:016x}",
            volblocksize,
            creation,
            fromguid,
            compression=_BLOCK_COMPRESSIONS[str(options["block_compression"])],
        )
        older_image = OlderImage(base.fd, base.size_bytes) if base else None
        pieces = make_stream(image.fd, image.size_bytes, header, older=older_image)
        written = _write(output, pieces, Compression(str(options["compress"])))
    if output != "-":
        _report(header, padded_size(image.size_bytes, volblocksize), written, as_json=bool(options["as_json"]))


@dataclass(frozen=True, slots=True)
class _Raw:
    """An open raw image."""

    fd: int
    size_bytes: int

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Raw]:
        with ExitStack() as stack:
            with os_errors(f"cannot open {path}"):
                fd = stack.enter_context(path.open("rb")).fileno()
                size = image_size(fd)
            yield cls(fd, size)

    def guid(self, block_bytes: int) -> int:
        """The same for the same content, so that an increment fits the full stream of its older image."""
        return derive_guid(hash_image(self.fd, padded_size(self.size_bytes, block_bytes)), block_bytes)


def _check_output(output: str, raw: Path, older: Path | None) -> None:
    """Refuse to replace an image by its own stream."""
    if output == "-":
        if sys.stdout is None:
            raise InvalidArgumentError("standard output is closed")
        return
    path = Path(output)
    for image in (raw, older):
        if image is not None and path.exists() and image.exists() and path.samefile(image):
            raise InvalidArgumentError(f"the stream would replace the image it is made of: {output}")


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _write(output: str, pieces: Iterator[bytes], compression: Compression) -> int:
    """Write the stream; a file appears only when it is complete. How many bytes."""
    if compression is not Compression.NONE:
        pieces = compress_pieces(pieces, compression)
    path = Path(output)
    with ExitStack() as stack:
        if output == "-":
            file: IO[bytes] = sys.stdout.buffer
        elif path.exists() and not path.is_file():  # a pipe or device is written to, not replaced
            with os_errors(f"cannot open {path}"):
                file = stack.enter_context(path.open("wb", buffering=0))
        else:
            fd = stack.enter_context(durable_file(path))
            file = stack.enter_context(open(fd, "wb", buffering=0, closefd=False))
        return sum(_write_piece(file, piece) for piece in pieces)


def _write_piece(file: IO[bytes], piece: bytes) -> int:
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]
    return len(piece)


def _report(header: StreamHeader, size: int, written: int, *, as_json: bool) -> None:
    wire = {
        "guid": str(header.guid),
        "fromguid": str(header.fromguid),
        "volsize": size,
        "volblocksize": header.volblocksize_bytes,
        "creation": header.creation_s,
        "bytes": written,
    }
    kind = f"increment from {header.fromguid}" if header.fromguid else "full"
    text = f"{header.toname}, guid {header.guid}, {kind}, {size} bytes of volume, {written} bytes of stream"
    click.echo(json.dumps(wire) if as_json else text)
