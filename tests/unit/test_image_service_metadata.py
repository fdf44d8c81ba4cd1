"""Image records over a real key/value store: uniqueness, no lost update, indexes that can't drift."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from image_service import metadata
from image_service.lifecycle import Image, ImageStatus, ImageType, new_fetch
from image_service.metadata import MetadataStore, record_key
from image_service.stores import StoreRegistry, image_stores, metadata_stores
from imaging.digests import Digest
from imaging.errors import (
    AlreadyExistsError,
    BadDataError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from imaging.kv.base import Compare, Operation, Put
from imaging.kv.sqlite import SqliteKeyValue


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SqliteKeyValue]:
    store = SqliteKeyValue(tmp_path / "records.db")
    yield store
    store.close()


@pytest.fixture
def records(engine: SqliteKeyValue) -> MetadataStore:
    return MetadataStore.over(engine)


def _image(number: int, **changes: object) -> Image:
    return replace(new_fetch(f"id-{number}", f"http://x/{number}", ImageType.KVM), **changes)


def _complete(number: int, content: bytes, **changes: object) -> Image:
    return _image(number, status=ImageStatus.COMPLETE, digest=str(Digest.of(content)), **changes)


def test_record_is_found_by_id_and_source(records: MetadataStore) -> None:
    image = _image(1, comment="ä\x00\n")
    records.put(image)
    assert records.get_by_id("id-1") == records.get_by_source("http://x/1") == image
    assert records.find_by_id("id-2") is None
    assert records.find_by_source("http://x/2") is None
    with pytest.raises(NotFoundError):
        records.get_by_id("id-2")
    with pytest.raises(NotFoundError):
        records.get_by_source("http://x/2")


def test_put_of_an_id_or_source_that_is_taken_is_refused(records: MetadataStore) -> None:
    records.put(_image(1))
    for taken in (_image(1, source="http://other"), _image(2, source="http://x/1")):
        with pytest.raises(ConflictError):
            records.put(taken)
    assert list(records.list()) == [_image(1)]


def test_uploads_have_no_source_and_do_not_collide(records: MetadataStore) -> None:
    records.put(_image(1, source=""))
    records.put(_image(2, source=""))
    assert len(records.list()) == 2
    assert records.find_by_source("") is None


def test_ensure_from_many_threads_makes_one_record(records: MetadataStore) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: records.ensure(_image(n, source="http://same")), range(100)))
    assert len({image.id for image, _ in found}) == 1
    assert sum(added for _, added in found) == 1
    assert len(records.list()) == 1


def test_updates_from_many_threads_are_all_there(records: MetadataStore) -> None:
    records.put(_image(1))

    def add_one(_: int) -> None:
        records.update("id-1", lambda image: replace(image, size_bytes=image.size_bytes + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_one, range(200)))
    assert records.get_by_id("id-1").size_bytes == 200


def test_update_whose_change_is_refused_leaves_the_record(records: MetadataStore) -> None:
    records.put(_image(1))

    def refuse(image: Image) -> Image:
        raise ConflictError(f"no: {image.id}")

    with pytest.raises(ConflictError, match="no: id-1"):
        records.update("id-1", refuse)
    assert records.get_by_id("id-1") == _image(1)
    with pytest.raises(NotFoundError):
        records.update("id-2", refuse)


def test_delete_frees_the_source_and_answers_the_record(records: MetadataStore) -> None:
    records.put(_image(1))
    assert records.delete("id-1") == _image(1)
    with pytest.raises(NotFoundError):
        records.delete("id-1")
    records.put(_image(2, source="http://x/1"))
    assert records.get_by_source("http://x/1").id == "id-2"


def test_blob_is_needed_as_long_as_a_record_names_it(records: MetadataStore) -> None:
    digest = Digest.of(b"content")
    assert not records.needs(digest)
    records.put(_complete(1, b"content"))
    records.put(_image(2))
    records.update("id-2", lambda image: replace(image, status=ImageStatus.COMPLETE, digest=str(digest)))
    records.delete("id-1")
    assert records.needs(digest)
    records.delete("id-2")
    assert not records.needs(digest)


def test_list_is_by_type_in_id_order_over_many_pages(records: MetadataStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "PAGE_RECORDS", 7)
    for number in range(30):
        records.put(_image(number, type=ImageType.CONTAINER if number % 3 else ImageType.KVM))
    ids = [image.id for image in records.list()]
    assert ids == sorted(f"id-{n}" for n in range(30))
    assert len(records.list(ImageType.KVM)) == 10
    assert {image.type for image in records.list(ImageType.CONTAINER)} == {ImageType.CONTAINER}


def test_indexes_match_the_records_after_any_history(records: MetadataStore, engine: SqliteKeyValue) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(300):
        number = chance.randrange(10)
        found = records.find_by_id(f"id-{number}")
        if found is None:
            records.put(_image(number))
        elif chance.random() < 0.3:
            records.delete(found.id)
        else:
            content = b"%d" % chance.randrange(4)
            records.update(found.id, lambda image, c=content: replace(image, digest=str(Digest.of(c))))  # type: ignore[misc]
    images = records.list()
    sources = {metadata.source_key(image.source): image.id.encode() for image in images}
    digests = {metadata.digest_key(image) for image in images if image.digest}
    assert {entry.key: entry.value for entry in engine.list(metadata.SOURCES)} == sources, f"seed {seed}"
    assert {entry.key for entry in engine.list(metadata.DIGESTS)} == digests, f"seed {seed}"


def test_damaged_record_is_named(records: MetadataStore, engine: SqliteKeyValue) -> None:
    engine.transact([Put(record_key("bad"), b"{")])
    with pytest.raises(BadDataError, match="images/bad"):
        records.get_by_id("bad")


class _AlwaysBeaten:
    """A key/value store whose every compare loses, as if another writer were faster each time."""

    def __init__(self, engine: SqliteKeyValue) -> None:
        self._engine = engine
        self.get, self.list, self.close = engine.get, engine.list, engine.close

    def transact(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        raise ConflictError(f"beaten {len(operations)} {len(compares)}")


def test_record_that_changes_for_ever_is_unavailable(records: MetadataStore, engine: SqliteKeyValue) -> None:
    records.put(_image(1))
    beaten = MetadataStore.over(_AlwaysBeaten(engine))
    for attempt in (
        lambda: beaten.update("id-1", lambda image: image),
        lambda: beaten.delete("id-1"),
        lambda: beaten.ensure(_image(2)),
    ):
        with pytest.raises(UnavailableError):
            attempt()


# -- stores by name ------------------------------------------------------------------------------------------------------


def test_registered_stores_are_listed_and_made(tmp_path: Path) -> None:
    assert {"kvite", "sqlite"} <= set(metadata_stores.list())
    assert "fs" in image_stores.list()
    store = metadata_stores.new_store("kvite")
    with pytest.raises(UnavailableError, match="not open"):
        store.list()
    store.init({"filename": str(tmp_path / "deep" / "down" / "records.db")})
    store.put(_image(1))
    store.shutdown()
    store.shutdown()


def test_store_of_an_unknown_name_is_refused_and_a_name_is_taken_once() -> None:
    registry: StoreRegistry[int] = StoreRegistry("number store")
    registry.register("one", lambda: 1)
    assert registry.new_store("one") == 1
    with pytest.raises(AlreadyExistsError):
        registry.register("one", lambda: 2)
    with pytest.raises(InvalidArgumentError, match="unknown number store type 'two'; there is: one"):
        registry.new_store("two")


def test_image_store_keeps_gets_and_deletes_by_digest(tmp_path: Path) -> None:
    store = image_stores.new_store("fs")
    with pytest.raises(InvalidArgumentError, match="not open"):
        _ = store.blobs
    store.init({"dir": str(tmp_path / "images"), "free_min_bytes": 0})
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content" * 1000)
    with source.open("rb") as file:
        info = store.put("ref", file)
    assert store.stat(info.digest).size_bytes == 7000
    with target.open("wb") as file:
        store.get(info.digest, file)
    assert target.read_bytes() == source.read_bytes()
    store.delete(info.digest)
    with pytest.raises(NotFoundError):
        store.stat(info.digest)
    store.shutdown()
