"""Mirroring a catalogue: its files, as many as are wanted, and a catalogue of its own that promises exactly those.

Order of a run: bring files, then publish the catalogue, then remove files that left it a while ago. So a reader never finds a promise that
is not kept, whenever the run is killed; the next run goes on where it was. A version that could not be brought whole stays out of the
catalogue and is reported. A file that is missing at the source makes the source's catalogue be read once more: it may just have changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imaging.errors import AlreadyExistsError, BadDataError, MistifyError, NotFoundError
from imaging.files import LockFile, atomic_write_json, make_directory, os_errors, read_json
from imaging.simplestreams.paths import IMAGE_DOWNLOADS
from imaging.simplestreams.publishing import KEEP_S, Document, Publisher
from imaging.simplestreams.signing import Signer
from imaging.simplestreams.transfer import ItemSource, Transfer, verify_file
from imaging.simplestreams.tree import (
    Filter,
    ProductsDocument,
    StreamCatalogue,
    StreamItem,
    TreeReader,
    resolve_work,
    with_names,
)

RETIRED = ".retired.json"
"""Files that left the catalogue, and when."""

LOCK = ".mirror.lock"


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """What is mirrored, and how."""

    filters: Sequence[Filter] = ()
    versions_max: int | None = None
    """Newest versions of each product; None is all."""
    keep_s: float = KEEP_S
    """How long a file stays after it left the catalogue."""
    verify: bool = False
    """Read files that are here already and compare their digests."""


@dataclass(slots=True)
class MirrorReport:
    """What a run did."""

    signed: bool = False
    versions: int = 0
    files: int = 0
    brought: int = 0
    received_bytes: int = 0
    removed: int = 0
    published: bool = False
    failed: list[str] = field(default_factory=list)


class Mirror:
    """One directory that mirrors one catalogue. Blocking; one run at a time, here or in another process."""

    def __init__(
        self,
        reader: TreeReader,
        items: ItemSource,
        directory: Path,
        options: MirrorOptions | None = None,
        *,
        signer: Signer | None = None,
        now: Callable[[], float] = time.time,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._reader = reader
        self._transfer = Transfer(items)
        self._directory = directory
        self._options = options or MirrorOptions()
        self._now = now
        self._publisher = Publisher(directory, signer, keep_s=self._options.keep_s, now=now, step=step)
        self._step = step

    def run(self) -> MirrorReport:
        """Bring the directory up to date; the errors of reading the catalogue, of publishing, and NoSpaceError end a run."""
        make_directory(self._directory)
        with LockFile(self._directory / LOCK):
            try:
                return self._run(self._reader.read([IMAGE_DOWNLOADS]), stale_is_error=False)
            except _StaleError:
                return self._run(self._reader.read([IMAGE_DOWNLOADS]), stale_is_error=True)

    def _run(self, catalogue: StreamCatalogue, *, stale_is_error: bool) -> MirrorReport:
        report = MirrorReport(signed=catalogue.info.signed)
        documents: list[Document] = []
        paths: set[str] = set()
        received_before = self._transfer.received_bytes
        for source in catalogue.documents:
            wanted = self._choose(source)
            whole = self._bring(wanted, report, paths, stale_is_error=stale_is_error)
            documents.append(_document(source, whole))
        report.files = len(paths)
        report.received_bytes = self._transfer.received_bytes - received_before
        report.published = self._publisher.publish(documents)
        report.removed = self._retire(paths)
        return report

    # -- what -----------------------------------------------------------------------------------------------------------

    def _choose(self, document: ProductsDocument) -> dict[tuple[str, str], list[StreamItem]]:
        """Items by product and version: those every filter accepts, of the newest versions that have any."""
        by_product: dict[str, dict[str, list[StreamItem]]] = {}
        for item in document.items():
            if item.attributes.get("path") and all(one.accepts(with_names(item)) for one in self._options.filters):
                by_product.setdefault(item.product, {}).setdefault(item.version, []).append(item)
        chosen = {}
        for product, versions in by_product.items():
            names, _ = resolve_work(versions, (), maximum=self._options.versions_max)
            chosen.update({(product, name): _without_baseless(versions[name], names) for name in names})
        return chosen

    # -- bringing ----------------------------------------------------------------------------------------------------------

    def _bring(
        self,
        wanted: Mapping[tuple[str, str], list[StreamItem]],
        report: MirrorReport,
        paths: set[str],
        *,
        stale_is_error: bool,
    ) -> dict[tuple[str, str], list[StreamItem]]:
        """Bring every version's files; the versions that are whole."""
        whole = {}
        for key, items in wanted.items():
            try:
                for item in items:
                    report.brought += self._bring_item(item)
            except (NotFoundError, BadDataError) as err:
                if isinstance(err, NotFoundError) and not stale_is_error:
                    raise _StaleError from err
                report.failed.append(f"{key[0]} {key[1]}: {err.message}")
            except MistifyError as err:
                if not err.retryable:
                    raise
                report.failed.append(f"{key[0]} {key[1]}: {err.message}")
            else:
                whole[key] = items
                report.versions += 1
                paths.update(item.path for item in items)
        return whole

    def _bring_item(self, item: StreamItem) -> bool:
        path = _content_path(item)
        self._step(f"bring {path}")
        target = self._directory / path
        if self._options.verify and target.exists():
            try:
                verify_file(item, target)
            except BadDataError:
                target.unlink()
        return self._transfer.bring(item, target)

    # -- removing -------------------------------------------------------------------------------------------------------

    def _retire(self, paths: set[str]) -> int:
        """Remember what left the catalogue, and remove what left it long enough ago."""
        file = self._directory / RETIRED
        state = read_json(file) if file.exists() else {"present": [], "retired": {}}
        retired: dict[str, float] = {path: since for path, since in state["retired"].items() if path not in paths}
        for path in state["present"]:
            if path not in paths:
                retired.setdefault(path, self._now())
        due = [path for path, since in retired.items() if self._now() - since >= self._options.keep_s]
        for path in due:
            self._step(f"remove {path}")
            self._remove(path)
            del retired[path]
        atomic_write_json(file, {"present": sorted(paths), "retired": retired})
        return len(due)

    def _remove(self, path: str) -> None:
        file = self._directory / path
        with os_errors(f"cannot remove {file}"):
            file.unlink(missing_ok=True)
            for parent in file.parents:
                if parent == self._directory or any(parent.iterdir()):
                    return
                parent.rmdir()


def _without_baseless(items: Sequence[StreamItem], versions: Collection[str]) -> list[StreamItem]:
    """Without deltas to versions the mirror has not: nobody could apply them."""
    return [item for item in items if item.attributes.get("delta_base", "") in {"", *versions}]


class _StaleError(Exception):
    """A file is missing at the source: its catalogue may have changed since it was read."""


def _content_path(item: StreamItem) -> str:
    """The item's path; one that would get in the way of the catalogue itself is refused."""
    first = item.path.split("/", 1)[0]
    if first in {"streams", "snapshots", ""} or first.startswith("."):
        raise BadDataError(f"catalogue puts a file where its documents are: {item.path!r}")
    return item.path


def _document(source: ProductsDocument, whole: Mapping[tuple[str, str], Sequence[StreamItem]]) -> Document:
    """The source's document with only what is here."""
    products: dict[str, Any] = {}
    for (product, version), items in whole.items():
        given = source.products[product]
        mine = products.setdefault(product, {**given, "versions": {}})
        level = given["versions"][version]
        names = {item.name for item in items}
        kept = {name: item for name, item in level["items"].items() if name in names}
        mine["versions"][version] = {**level, "items": kept}
    return Document(source.content_id, source.datatype, products, extra=source.extra)


def check_target(directory: Path) -> Path:
    """A directory to mirror to; AlreadyExistsError if something else is there."""
    known = {LOCK, RETIRED, "streams", "snapshots"}
    if directory.exists() and any(directory.iterdir()) and not any((directory / name).exists() for name in known):
        raise AlreadyExistsError(f"{directory} holds something else")
    return directory
