"""What replicas share, over the embedded engine: turns and what they fence, labels, the quota, news."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from image_service.admission import AdmissionLimits
from image_service.catalog_entries import CatalogLabels
from image_service.catalog_labels import PREFIX as LABELS
from image_service.catalog_labels import LabelStore
from image_service.importer import utc_now
from image_service.lifecycle import (
    Image,
    ImageStatus,
    ImageType,
    new_fetch,
    set_downloading,
    set_failed,
    set_finished,
    set_pending,
)
from image_service.metadata import DIGESTS, MetadataStore
from image_service.news import News
from image_service.shared_admission import KEY, SharedAdmission
from imaging.digests import Digest
from imaging.errors import BusyError, LeaseLostError, NoSpaceError, NotFoundError
from imaging.kv.base import Put
from imaging.kv.sqlite import SqliteKeyValue
from tests.waiting import wait_until


@pytest.fixture
def records(tmp_path: Path) -> Iterator[MetadataStore]:
    records = MetadataStore.over(SqliteKeyValue(tmp_path / "records.db"))
    yield records
    records.shutdown()


def _complete(image_id: str, data: bytes) -> Image:
    image = Image(id=image_id, type=ImageType.KVM, status=ImageStatus.DOWNLOADING)
    return set_finished(image, Digest.of(data), len(data), now=utc_now())


# -- turns -----------------------------------------------------------------------------------------------------------


def test_changes_under_a_turn_that_is_over_are_refused_and_nothing_changes(records: MetadataStore) -> None:
    pending = new_fetch("one", "http://x/1", ImageType.KVM)
    turn = records.replica.acquire("fetch-one")
    records.put(pending, fence=turn)
    turn.release()
    with records.replica.acquire("fetch-one") as later:
        with pytest.raises(LeaseLostError):
            records.update("one", lambda image: set_failed(image, "late", now=utc_now()), fence=turn)
        with pytest.raises(LeaseLostError):
            records.put(new_fetch("two", "http://x/2", ImageType.KVM), fence=turn)
        assert records.list() == [pending]
        assert (
            records.update("one", lambda image: set_failed(image, "mine", now=utc_now()), fence=later).error == "mine"
        )


def test_turn_is_one_s_at_a_time(records: MetadataStore) -> None:
    with records.replica.acquire("fetch-one"):
        assert records.replica.find_turn("fetch-one") is None
        with pytest.raises(BusyError):
            records.replica.acquire("fetch-one")
        assert records.replica.held("fetch-") == {"fetch-one"}
    assert records.replica.held("fetch-") == set()


def test_session_is_one_until_it_is_lost(records: MetadataStore) -> None:
    replica = records.replica
    first = replica.session()
    assert replica.session() is first
    assert replica.is_alone()
    first.release()
    second = replica.session()
    assert second.name != first.name
    records.engine.transact([Put("leases/replica-other", b"other")])
    assert not replica.is_alone()


def test_unfinished_fetches_are_known_without_reading_every_record(records: MetadataStore) -> None:
    records.put(new_fetch("one", "http://x/1", ImageType.KVM))
    assert records.owed() == ["one"]
    records.update("one", lambda image: set_downloading(image, 5, now=utc_now()))
    assert records.owed() == ["one"]
    records.update("one", lambda image: set_failed(image, "no", now=utc_now()))
    assert records.owed() == []
    records.update("one", set_pending)
    assert records.owed() == ["one"]
    records.delete("one")
    assert records.owed() == []


# -- the quota -------------------------------------------------------------------------------------------------------


def _admission(records: MetadataStore, *, left: frozenset[str] = frozenset(), derived: int = 0) -> SharedAdmission:
    return SharedAdmission(AdmissionLimits(quota_bytes=100), records, lambda: derived, left.__contains__)


def test_stored_bytes_counts_each_blob_once_whoever_wrote_its_record(records: MetadataStore) -> None:
    for image_id, data in (("a", b"same"), ("b", b"same"), ("c", b"another")):
        records.put(_complete(image_id, data))
    older = next(entry for entry in records.engine.list(DIGESTS) if entry.key.endswith("/c"))
    records.engine.transact([Put(older.key, b"")])
    assert records.stored_bytes() == 4 + 7


def test_writers_that_fit_singly_are_not_all_let_in(records: MetadataStore) -> None:
    admissions = [_admission(records) for _ in range(2)]
    let_in: list[str] = []

    def enter(number: int) -> None:
        try:
            admissions[number % 2].reserve(f"upload-{number}", 60)
        except NoSpaceError:
            return
        let_in.append(f"upload-{number}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(6)))
    assert len(let_in) == 1
    (entry,) = records.engine.list(KEY)
    assert json.loads(entry.value) == {let_in[0]: 60}
    for admission in admissions:
        admission.close()


def test_room_is_free_after_the_end_and_after_a_death(records: MetadataStore) -> None:
    first, second = _admission(records), _admission(records, left=frozenset({"upload-dead"}))
    with first.reserve("upload-1", 60):
        assert second.reserve("upload-2", 40).announced_bytes == 40
    wait_until(lambda: b"upload-1" not in records.engine.list(KEY)[0].value, "the end to be written down")
    first.reserve("upload-dead", 60)
    assert second.reserve("upload-3", 60).announced_bytes == 60
    first.close()
    second.close()


def test_writer_of_unknown_length_is_stopped_at_the_quota(records: MetadataStore) -> None:
    records.put(_complete("a", bytes(30)))
    admission = _admission(records, derived=20)
    room = admission.reserve("upload-1")
    room.receive(50)
    with pytest.raises(NoSpaceError):
        room.receive(51)
    with pytest.raises(NoSpaceError):
        admission.reserve("upload-2", 1)
    assert admission.reserve("unpacked-1", 1 << 40).announced_bytes == 1 << 40, "temporary files are of this machine"
    admission.close()


# -- labels ----------------------------------------------------------------------------------------------------------


def test_labels_of_an_older_version_are_taken_over_and_go_with_their_images(
    records: MetadataStore, tmp_path: Path
) -> None:
    older = tmp_path / "labels"
    older.mkdir()
    for name in ("a", "b"):
        (older / f"{name}.json").write_bytes(msgspec.json.encode(CatalogLabels(os=f"old {name}")))
    records.put(_complete("a", b"a"))
    records.put(_complete("b", b"b"))
    records.engine.transact([Put(f"{LABELS}b", msgspec.json.encode(CatalogLabels(os="new b")))])
    labels = LabelStore(records, older)
    assert {name: found.os for name, found in labels.all().items()} == {"a": "old a", "b": "new b"}
    assert list(older.iterdir()) == []
    records.delete("a")
    labels.forget_gone(labels.all())
    assert set(labels.all()) == {"b"}
    with pytest.raises(NotFoundError):
        labels.put("a", CatalogLabels())
    assert labels.find("a") == CatalogLabels()


# -- news ------------------------------------------------------------------------------------------------------------


async def test_everybody_who_waits_is_woken_at_the_end(records: MetadataStore) -> None:
    news = News(records.engine)
    news.start()
    with news.listening("one") as first, news.listening("one") as second:
        waiting = asyncio.gather(first.wait(), second.wait())
        await news.close()
        await asyncio.wait_for(waiting, 30)

    await news.close()
