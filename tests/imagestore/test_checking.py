"""Verify, repair and rebuild: index and files agree afterwards, and it is said what was done."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_service.imagestore.checking import StoreCheck
from image_service.imagestore.store import ImageStore
from imaging.errors import UnavailableError
from tests.imagestore.conftest import Clock
from tests.imagestore.images import aci, blob_of, files, files_of, put, read


def _told(store: ImageStore, *, repair: bool = False) -> list[tuple[str, str]]:
    return [(finding.problem, finding.repair) for finding in StoreCheck(store).verify(repair=repair)]


def test_verify_of_a_sound_store_finds_nothing(store: ImageStore) -> None:
    put(store, aci())
    assert _told(store) == []
    assert _told(store, repair=True) == []


def test_verify_of_a_damaged_image_puts_it_aside(store: ImageStore) -> None:
    key, good = put(store, aci()), put(store, aci(content=b"good"))
    data = bytearray(blob_of(store, key).read_bytes())
    data[700] ^= 1
    blob_of(store, key).write_bytes(data)
    problem = "the image is damaged: its digest is another"
    assert _told(store) == [(problem, "")]
    assert StoreCheck(store).verify(digests=False) == []
    assert _told(store, repair=True) == [(problem, "removed from the index, its file is in quarantine")]
    assert _told(store) == []
    assert [info.blob_key for info in store.list_aci_infos()] == [good]
    [aside] = store.layout.quarantine.iterdir()
    assert aside.read_bytes() == data


def test_verify_of_a_shortened_image_says_the_sizes(store: ImageStore) -> None:
    key = put(store, aci())
    blob_of(store, key).write_bytes(b"short")
    assert _told(store) == [(f"the image has 5 bytes instead of {len(aci())}", "")]


def test_verify_of_a_missing_image_forgets_it(store: ImageStore) -> None:
    key = put(store, aci())
    blob_of(store, key).unlink()
    assert _told(store, repair=True) == [("the image is missing", "removed from the index")]
    assert files(store) == set()
    assert store.list_aci_infos() == []


@pytest.mark.parametrize("damage", ["gone", "other"])
def test_verify_writes_a_missing_or_damaged_manifest_anew(store: ImageStore, damage: str) -> None:
    key = put(store, aci())
    before = store.get_image_manifest_json(key)
    if damage == "gone":
        store.layout.manifest(key).unlink()
    else:
        store.layout.manifest(key).write_bytes(b"{}")
    problem = "the manifest is missing or not the image's"
    assert _told(store) == [(problem, "")]
    assert _told(store, repair=True) == [(problem, "written anew")]
    assert store.get_image_manifest_json(key) == before


def test_verify_corrects_labels_and_name(store: ImageStore) -> None:
    key = put(store, aci(labels={"version": "1"}), latest=True)
    store.infos.save(store.get_aci_info(key), {"version": "2"})
    assert _told(store, repair=True) == [("the index has other labels than the image", "corrected")]
    assert store.get_aci("example.com/app", {"version": "1"}) == key
    assert store.get_aci_info(key).latest


def test_verify_removes_files_without_a_record(store: ImageStore) -> None:
    key, good = put(store, aci()), put(store, aci(content=b"good"))
    store.infos.delete(key)
    assert _told(store) == [("files without a record", "")]
    assert _told(store, repair=True) == [("files without a record", "removed")]
    assert files(store) == files_of(good)


def test_verify_lets_foreign_files_be(store: ImageStore) -> None:
    path = store.layout.blobs / "00" / "notes.txt"
    path.write_text("mine")
    assert _told(store, repair=True) == [("a file that is not the store's", "")]
    assert path.exists()


def test_verify_sweeps_what_the_dead_left(store: ImageStore) -> None:
    (store.layout.temporary / ".tmp-dead").write_text("x")
    assert _told(store) == []
    assert _told(store, repair=True) == [("temporary file of a dead process: .tmp-dead", "removed")]


def test_index_lost_is_made_anew_when_the_store_is_opened(tmp_path: Path, clock: Clock) -> None:
    with ImageStore(tmp_path, now_ns=clock) as store:
        keys = {put(store, aci(content=bytes([n]), labels={"version": str(n)})) for n in range(5)}
        before = {info.blob_key: info for info in store.list_aci_infos()}
    for path in (tmp_path / "db").iterdir():
        path.unlink()
    with ImageStore(tmp_path, now_ns=clock) as store:
        after = {info.blob_key: info for info in store.list_aci_infos()}
        assert set(after) == keys
        for key, info in after.items():
            known = before[key]
            assert (info.name, info.size_bytes, info.image_id) == (known.name, known.size_bytes, known.image_id)
        assert store.get_aci("example.com/app", {"version": "3"}) in keys
        assert _told(store) == []


def test_rebuild_takes_manifests_from_images_and_leaves_damaged_ones_out(tmp_path: Path) -> None:
    with ImageStore(tmp_path) as store:
        key, bad = put(store, aci()), put(store, aci(content=b"bad"))
        store.layout.manifest(key).unlink()
        blob_of(store, bad).write_bytes(b"damaged")
    with ImageStore.rebuild(tmp_path) as store:
        assert [info.blob_key for info in store.list_aci_infos()] == [key]
        assert read(store, key) == aci()
        assert (tmp_path / "db-backups" / "0" / "index.sqlite").exists()
        assert _told(store, repair=True) == [("files without a record", "removed")]


def test_rebuild_waits_until_the_others_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_service.imagestore.adopting.LEAVE_TIMEOUT_S", 0.05)
    with ImageStore(tmp_path) as store:
        key = put(store, aci())
        with pytest.raises(UnavailableError, match="stayed locked"):
            ImageStore.rebuild(tmp_path)
        assert read(store, key) == aci()
