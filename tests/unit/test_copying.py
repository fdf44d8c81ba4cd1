"""``metadata copy`` and ``blobs copy`` between local stores, with the source in use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from image_service.cli import cli
from image_service.copying import LocalBlobFiles, copy_blobs, copy_records
from imaging.blobs.local import LocalBlobStore
from imaging.digests import Digest
from imaging.errors import BadDataError, ConflictError
from imaging.kv.base import Delete, KeyValue, Put, put
from imaging.kv.sqlite import SqliteKeyValue
from tests.contracts.blob_store import add, content, read


@pytest.fixture
def records(tmp_path: Path) -> Iterator[SqliteKeyValue]:
    with SqliteKeyValue(tmp_path / "records.db") as store:
        for start in range(0, 300, 100):
            store.transact([Put(f"images/{number:04d}", b"%d" % number) for number in range(start, start + 100)])
        put(store, "leases/work", b"of a running process")
        yield store


@pytest.fixture
def images(tmp_path: Path) -> Iterator[LocalBlobStore]:
    with LocalBlobStore(tmp_path / "images", reserve_free_bytes=0) as store:
        for number in range(3):
            add(store, content(100_000, seed=number))
        yield store


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_metadata_copy_beside_the_running_owner(records: SqliteKeyValue, tmp_path: Path) -> None:
    urls = ["--from", f"sqlite://{tmp_path}/records.db", "--to", f"sqlite://{tmp_path}/copy.db"]
    dry = _run("metadata", "copy", *urls, "--dry-run")
    assert (dry.exit_code, dry.output) == (0, "300 entries would be copied, 0 would be removed, 0 were the same\n")
    assert _run("metadata", "copy", *urls).output == "300 entries copied, 0 removed, 0 were the same\n"
    records.transact([Put("images/0001", b"changed"), Delete("images/0002"), Put("images/new", b"")])
    again = _run("metadata", "copy", *urls, "--prune")
    assert again.output == "2 entries copied, 1 removed, 298 were the same\n"
    with SqliteKeyValue(tmp_path / "copy.db") as copy:
        ours = [(entry.key, entry.value) for entry in records.list("images/")]
        assert [(entry.key, entry.value) for entry in copy.list()] == ours


def test_metadata_copy_keeps_what_the_target_has_unless_told(records: SqliteKeyValue, tmp_path: Path) -> None:
    with SqliteKeyValue(tmp_path / "copy.db") as copy:
        put(copy, "images/other", b"")
        assert copy_records(records, copy).removed == 0
        assert copy.get("images/other") is not None
        assert copy_records(records, copy, prune=True).removed == 1
        assert copy.get("images/other") is None


class _Meddled(SqliteKeyValue):
    """A target that somebody else writes to at the wrong moment."""

    def transact(self, operations: object, compares: object = ()) -> int:
        super().transact([Put("images/0000", b"theirs")])
        return super().transact(operations, compares)  # type: ignore[arg-type]


def test_metadata_copy_to_a_target_in_use_is_a_conflict(records: KeyValue, tmp_path: Path) -> None:
    with _Meddled(tmp_path / "copy.db") as copy, pytest.raises(ConflictError):
        copy_records(records, copy)


def test_blobs_copy_beside_the_running_owner(images: LocalBlobStore, tmp_path: Path) -> None:
    urls = ["--from", f"file://{tmp_path}/images", "--to", f"file://{tmp_path}/copy"]
    assert "3 images of 300000 bytes would be copied, 0 were there" in _run("blobs", "copy", *urls, "--dry-run").output
    assert "3 images of 300000 bytes copied, 0 were there" in _run("blobs", "copy", *urls).output
    added = add(images, b"one more").digest
    assert "1 images of 8 bytes copied, 3 were there" in _run("blobs", "copy", *urls).output
    with LocalBlobStore(tmp_path / "copy", reserve_free_bytes=0) as copy:
        assert [info.digest for info in copy.list()] == [info.digest for info in images.list()]
        assert read(copy, added, verify=True) == b"one more"


def test_blobs_copy_goes_on_where_it_broke_off(images: LocalBlobStore, tmp_path: Path) -> None:
    data = content(100_000, seed=0)
    with LocalBlobStore(tmp_path / "copy", reserve_free_bytes=0) as copy:
        with copy.ingest(f"copy-{Digest.of(data).hex}") as writer:
            writer.write(data[:70_000])
        assert copy_blobs(LocalBlobFiles(tmp_path / "images"), copy).copied == 3
        assert read(copy, Digest.of(data), verify=True) == data


def test_blobs_copy_of_a_damaged_blob_is_bad_data(images: LocalBlobStore, tmp_path: Path) -> None:
    path = Path(str(images.path(Digest.of(content(100_000, seed=1)))))
    path.chmod(0o644)
    path.write_bytes(bytes(100_000))
    with LocalBlobStore(tmp_path / "copy", reserve_free_bytes=0) as copy, pytest.raises(BadDataError):
        copy_blobs(LocalBlobFiles(tmp_path / "images"), copy)


@pytest.mark.parametrize("url", ["redis://x", "sqlite://host/x", "sqlite:///no/such/file", "etcd:///prefix"])
def test_wrong_address_is_one_line(url: str, tmp_path: Path) -> None:
    result = _run("metadata", "copy", "--from", url, "--to", f"sqlite://{tmp_path}/copy.db")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
