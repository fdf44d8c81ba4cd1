"""Labels of images in the catalogue, beside the records, where every replica sees them. They go with their images.

Key: ``catalog/labels/<image id>``. An older version kept them in files: those are taken over once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from image_service.catalog_entries import CatalogLabels
from image_service.metadata import MetadataStore
from imaging.errors import BadDataError, ConflictError, NotFoundError
from imaging.files import os_errors, read_json
from imaging.kv.base import ABSENT, Delete, Entry, put

PREFIX = "catalog/labels/"

PAGE_ENTRIES = 500
"""Read at once."""


def _decode(entry: Entry) -> CatalogLabels:
    try:
        return msgspec.json.decode(entry.value, type=CatalogLabels)
    except msgspec.MsgspecError as err:
        raise BadDataError(f"the labels at {entry.key} are damaged") from err


class LabelStore:
    """See the module's docstring. Blocking; threads may share it."""

    def __init__(self, records: MetadataStore, older: Path) -> None:
        self._records = records
        self._engine = records.engine
        if older.is_dir():
            self._take_over(older)

    def _take_over(self, older: Path) -> None:
        with os_errors(f"cannot read the labels in {older}"):
            paths = sorted(older.glob("*.json"))
        for path in paths:
            labels = msgspec.convert(read_json(path), CatalogLabels)
            try:
                put(self._engine, PREFIX + path.stem, msgspec.json.encode(labels), expect=ABSENT)
            except ConflictError:
                continue  # newer ones are there
            finally:
                with os_errors(f"cannot remove {path}"):
                    path.unlink(missing_ok=True)

    def find(self, image_id: str) -> CatalogLabels:
        """The labels, or the defaults."""
        entry = self._engine.get(PREFIX + image_id)
        return _decode(entry) if entry else CatalogLabels()

    def all(self) -> Mapping[str, CatalogLabels]:
        """The labels of every image that has any, by its id."""
        found: dict[str, CatalogLabels] = {}
        after = ""
        while page := self._engine.list(PREFIX, after=after, limit=PAGE_ENTRIES):
            found |= {entry.key.removeprefix(PREFIX): _decode(entry) for entry in page}
            after = page[-1].key
        return found

    def put(self, image_id: str, labels: CatalogLabels) -> None:
        """Replace an image's labels; NotFoundError."""
        put(self._engine, PREFIX + image_id, msgspec.json.encode(labels))
        if self._records.find_by_id(image_id) is None:  # deleted meanwhile
            self._engine.transact([Delete(PREFIX + image_id)])
            raise NotFoundError("not found")

    def forget_gone(self, known: Mapping[str, CatalogLabels]) -> None:
        """Forget the labels of those of ``known`` that are gone."""
        for image_id in known:
            if self._records.find_by_id(image_id) is None:
                self._engine.transact([Delete(PREFIX + image_id)])
