"""Resolving, choosing and reading images, remotes, dumps: the rules and their texts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from image_service.imagestore.infos import AciInfo, Remote
from image_service.imagestore.keys import hash_to_image_id, hash_to_key
from image_service.imagestore.steps import chain
from image_service.imagestore.store import ImageStore
from imaging.digests import Digest
from imaging.errors import BadDataError, InvalidArgumentError, MistifyError, NotFoundError, UnavailableError
from tests.imagestore.conftest import Clock
from tests.imagestore.images import aci, blob_of, key_of, put, read


def _record(store: ImageStore, key: str, name: str = "a", time_ns: int = 1, **labels: str) -> None:
    info = AciInfo(key, name, time_ns, time_ns, latest=labels.pop("latest", "") == "yes")
    store.infos.save(info, labels)


FIRST, SECOND = "sha512-" + "ab" * 32, "sha512-ac" + "0" * 62


def test_key_is_half_of_the_digest_and_the_id_all_of_it() -> None:
    digest = Digest.of(b"x", "sha512")
    assert hash_to_key(digest) == f"sha512-{digest.hex[:64]}"
    assert len(hash_to_key(digest)) == 71
    assert hash_to_image_id(digest) == f"sha512-{digest.hex}"


@pytest.mark.parametrize("reference", [FIRST, FIRST[:9], FIRST[:20], FIRST + "f" * 64, FIRST + "rubbish", FIRST + "%_"])
def test_resolve_key_takes_keys_prefixes_and_whole_ids(store: ImageStore, reference: str) -> None:
    _record(store, FIRST)
    _record(store, SECOND)
    assert store.resolve_key(reference) == FIRST


@pytest.mark.parametrize(
    ("reference", "kind", "text"),
    [
        ("badprefix-1", InvalidArgumentError, "wrong key prefix"),
        ("", InvalidArgumentError, "wrong key prefix"),
        ("sha512-1", InvalidArgumentError, "image ID too short"),
        ("sha512-", InvalidArgumentError, "image ID too short"),
        ("sha512-ad", NotFoundError, "no image IDs found"),
        ("sha512-AB", NotFoundError, "no image IDs found"),
        ("sha512-zz", NotFoundError, "no image IDs found"),
        ("sha512-a%", NotFoundError, "no image IDs found"),
    ],
)
def test_resolve_key_refuses(store: ImageStore, reference: str, kind: type[MistifyError], text: str) -> None:
    _record(store, FIRST)
    with pytest.raises(kind) as caught:
        store.resolve_key(reference)
    assert caught.value.message == text


def test_resolve_key_ambiguous_is_refused_with_the_reference(store: ImageStore) -> None:
    other = FIRST[:-1] + "c"
    _record(store, FIRST)
    _record(store, other)
    with pytest.raises(InvalidArgumentError) as caught:
        store.resolve_key(FIRST[:12])
    assert caught.value.message == f'ambiguous image ID: "{FIRST[:12]}"'
    assert store.resolve_key(other) == other


def test_resolve_key_of_a_closed_store_tells_the_step(tmp_path: Path) -> None:
    with ImageStore(tmp_path / "store") as store:
        store.close()
        with pytest.raises(UnavailableError) as caught:
            store.resolve_key(FIRST)
    assert chain(caught.value) == "error retrieving ACI Infos: the image store is closed"


def test_resolve_name_gives_every_key_of_exactly_that_name(store: ImageStore) -> None:
    _record(store, FIRST, "a/b")
    _record(store, SECOND, "a/b")
    assert store.resolve_name("a/b") == ([FIRST, SECOND], True)
    assert store.resolve_name("a") == ([], False)


def test_has_full_key_looks_for_the_manifest_of_exactly_this_key(store: ImageStore) -> None:
    key = put(store, aci())
    assert store.has_full_key(key)
    for other in (key[:-1], key + "0", "x", "", "sha512-", "sha512-../../x", SECOND):
        assert not store.has_full_key(other)


# -- choosing --------------------------------------------------------------------------------------------------------------


def _key(number: int) -> str:
    return f"sha512-{number:064x}"


def test_get_aci_unknown_is_refused_with_the_whole_wish(store: ImageStore) -> None:
    put(store, aci(labels={"version": "1.0.0"}))
    with pytest.raises(NotFoundError) as caught:
        store.get_aci("example.com/app", {"version": "3.0.0", "os": "linux"})
    assert caught.value.message == (
        'cannot find aci satisfying name: "example.com/app" and labels: [{"version" "3.0.0"} {"os" "linux"}] in the local store'
    )
    with pytest.raises(NotFoundError, match=r'name: "x" and labels: \[\] in the local store'):
        store.get_aci("x", {})


def test_get_aci_prefers_latest_over_younger_unless_a_version_is_asked_for(store: ImageStore) -> None:
    _record(store, _key(1), time_ns=10, version="1.0.0", latest="yes")
    _record(store, _key(2), time_ns=20, version="2.0.0")
    _record(store, _key(3), time_ns=30, version="2.0.0")
    assert store.get_aci("a", {}) == _key(1)
    assert store.get_aci("a", {"version": "2.0.0"}) == _key(3)
    assert store.get_aci("a", {"version": "1.0.0"}) == _key(1)


def test_get_aci_with_a_version_ignores_latest(store: ImageStore) -> None:
    _record(store, _key(1), time_ns=10, version="1", latest="yes")
    _record(store, _key(2), time_ns=20, version="1")
    assert store.get_aci("a", {"version": "1"}) == _key(2)


def test_get_aci_wants_every_label_with_that_value(store: ImageStore) -> None:
    _record(store, _key(1), time_ns=10, os="linux", arch="amd64", channel="edge")
    _record(store, _key(2), time_ns=20, os="linux", arch="s390x")
    assert store.get_aci("a", {"os": "linux"}) == _key(2)
    assert store.get_aci("a", {"os": "linux", "arch": "amd64"}) == _key(1)
    assert store.get_aci("a", {"arch": "amd64", "channel": "edge", "os": "linux"}) == _key(1)
    with pytest.raises(NotFoundError):
        store.get_aci("a", {"arch": "s390x", "channel": "edge"})


def test_get_aci_of_equal_times_takes_the_first_stored(store: ImageStore) -> None:
    for number in (5, 3, 4):
        _record(store, _key(number), time_ns=10, os="linux")
    assert store.get_aci("a", {}) == _key(5)
    assert store.get_aci("a", {"os": "linux"}) == _key(5)


def test_get_aci_is_not_disturbed_by_another_image_without_a_manifest(store: ImageStore) -> None:
    good, bad = put(store, aci(labels={"version": "1"})), put(store, aci(labels={"version": "2"}))
    store.layout.manifest(bad).unlink()
    assert store.get_aci("example.com/app", {"version": "1"}) == good


# -- reading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_stream_is_the_unpacked_archive_byte_for_byte(store: ImageStore, *, verify: bool) -> None:
    image = aci(content=bytes(range(256)) * 20_000)
    key = put(store, image)
    assert read(store, key[:12], verify=verify) == image


def test_stream_notes_the_use_at_most_once_a_minute(store: ImageStore, clock: Clock) -> None:
    key = put(store, aci())
    before = clock.now_ns
    clock.move(59)
    read(store, key)
    assert store.get_aci_info(key).last_used_ns == before
    clock.move(2)
    read(store, key)
    assert store.get_aci_info(key).last_used_ns == clock.now_ns


def test_manifest_read_does_not_count_as_use(store: ImageStore, clock: Clock) -> None:
    key = put(store, aci())
    before = clock.now_ns
    clock.move(1000)
    assert store.get_image_manifest(key[:10]).name == "example.com/app"
    assert store.get_aci_info(key).last_used_ns == before


def test_stream_of_an_unknown_image_tells_both_parts(store: ImageStore) -> None:
    for call in (store.open_stream, store.get_image_manifest_json):
        with pytest.raises(NotFoundError) as caught:
            call("sha512-aa")
        assert chain(caught.value) == "error resolving image ID: no image IDs found"


def test_stream_of_an_image_removed_after_resolving_tells_both_parts(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "resolve_key", lambda _reference: FIRST)
    with pytest.raises(NotFoundError) as caught:
        store.open_stream(FIRST)
    assert chain(caught.value) == (f'cannot get image info for "{FIRST}" from db: cannot find image with key: {FIRST}')


def test_manifest_whose_file_is_gone_tells_the_step(store: ImageStore) -> None:
    key = put(store, aci())
    store.layout.manifest(key).unlink()
    with pytest.raises(NotFoundError) as caught:
        store.get_image_manifest_json(key)
    assert caught.value.message == "error retrieving image manifest"


def test_stream_open_reads_on_after_the_removal(store: ImageStore) -> None:
    key = put(store, aci())
    with store.open_stream(key) as file:
        store.delete_aci(key)
        assert file.read() == aci()


@pytest.mark.parametrize("offset", [0, 1500, -1])
def test_stream_verified_refuses_a_damaged_image(store: ImageStore, offset: int) -> None:
    key = put(store, aci(content=bytes(3 << 20)))
    path = blob_of(store, key)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadDataError, match="the stored image is damaged"):
        read(store, key, verify=True)


def test_info_of_an_unknown_key_is_refused(store: ImageStore) -> None:
    with pytest.raises(NotFoundError) as caught:
        store.get_aci_info("sha512-aa")
    assert caught.value.message == 'ACI info not found with blob key "sha512-aa"'


def test_infos_are_sorted_by_fields_in_one_direction(store: ImageStore) -> None:
    _record(store, _key(1), "b", 10)
    _record(store, _key(2), "a", 10)
    _record(store, _key(3), "a", 20)
    assert [info.blob_key for info in store.list_aci_infos()] == [_key(1), _key(2), _key(3)]
    assert [info.blob_key for info in store.list_aci_infos(["name", "importtime"])] == [_key(2), _key(3), _key(1)]
    descending = store.list_aci_infos(["name", "importtime"], ascending=False)
    assert [info.blob_key for info in descending] == [_key(1), _key(3), _key(2)]


@pytest.mark.parametrize("field", ["nosuch", "name; DROP TABLE aciinfo", "latest DESC, name"])
def test_infos_by_an_unknown_field_are_refused(store: ImageStore, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        store.list_aci_infos([field])
    assert caught.value.message == f"unknown field {field}"


def test_info_written_twice_is_there_once(store: ImageStore) -> None:
    _record(store, _key(1), "a", 10)
    _record(store, _key(1), "b", 20, os="linux")
    [info] = store.list_aci_infos()
    assert (info.name, info.import_time_ns) == ("b", 20)
    assert store.infos.labels(_key(1)) == {"os": "linux"}


# -- remotes and dumps -----------------------------------------------------------------------------------------------------


def test_remote_is_written_and_read_back(store: ImageStore) -> None:
    with pytest.raises(NotFoundError) as caught:
        store.get_remote("http://x/a.aci")
    assert caught.value.message == "remote target not found"
    remote = Remote("http://x/a.aci", "http://x/a.aci.asc", '"e"', FIRST, 60, 12345)
    store.save_remote(remote)
    assert store.get_remote("http://x/a.aci") == remote
    changed = Remote("http://x/a.aci", "", '"f"', SECOND, 0, 12346)
    store.save_remote(changed)
    assert store.list_remotes() == [changed]


def test_dump_shows_the_beginning_of_everything(store: ImageStore) -> None:
    key = put(store, aci())
    lines = list(store.dump())
    assert [line.partition(":")[0] for line in lines[:2]] == [f"blob/{key}", f"imageManifest/{key}"]
    assert lines[1].endswith(store.get_image_manifest_json(key)[:128].decode())
    assert lines[-1] == "1 total image ID(s)"
    assert next(store.dump(as_hex=True)) == f"blob/{key}: {aci()[:128].hex()}"
    assert key == key_of(aci())


def test_index_that_is_no_database_is_told_and_can_be_rebuilt(tmp_path: Path) -> None:
    with ImageStore(tmp_path / "store") as store:
        key = put(store, aci())
        path = store.index.path
    path.write_bytes(b"junk" * 5000)
    with pytest.raises(BadDataError, match="damaged or is no database"):
        ImageStore(tmp_path / "store")
    with ImageStore.rebuild(tmp_path / "store") as store:
        assert [info.blob_key for info in store.list_aci_infos()] == [key]
        assert (store.layout.backups / "0" / path.name).read_bytes() == b"junk" * 5000


def test_index_write_fails_as_the_projects_error(store: ImageStore) -> None:
    with pytest.raises(MistifyError, match="cannot write to the index"), store.index.change() as cursor:
        cursor.execute("INSERT INTO nosuch VALUES (1)")
    with pytest.raises(MistifyError, match="cannot read the index"):
        store.index.query("SELECT * FROM nosuch")
    with closing(sqlite3.connect(store.index.path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
