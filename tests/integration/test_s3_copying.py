"""A single machine's stores, moved to etcd and S3 with the commands an operator has."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from demo.servers.etcd import etcd_cluster
from demo.servers.s3 import BUCKET, make_bucket, s3_settings
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, swift_server
from image_service.cli import cli
from imaging.blobs.local import LocalBlobStore
from imaging.blobs.s3 import S3BlobStore
from imaging.kv.base import Put
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_client import EtcdSettings
from imaging.kv.sqlite import SqliteKeyValue
from tests.contracts.blob_store import add, content, read

pytestmark = pytest.mark.backend("etcd", "s3")


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_records_move_to_etcd_while_their_owner_runs(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path, size=1) as cluster, SqliteKeyValue(tmp_path / "records.db") as records:
        records.transact([Put(f"images/{number:03d}", b"%d" % number) for number in range(120)])
        host = cluster.endpoints[0].removeprefix("http://")
        urls = ["--from", f"sqlite://{tmp_path}/records.db", "--to", f"etcd://{host}/fleet"]
        assert _run("metadata", "copy", *urls) == "120 entries copied, 0 removed, 0 were the same\n"
        assert _run("metadata", "copy", *urls) == "0 entries copied, 0 removed, 120 were the same\n"
        with EtcdKeyValue(EtcdSettings(cluster.endpoints, prefix="/fleet/")) as copy:
            there = [(entry.key, entry.value) for entry in copy.list()]
        assert there == [(entry.key, entry.value) for entry in records.list()]


def test_images_move_to_s3_and_back_while_their_owner_runs(tmp_path: Path) -> None:
    with (
        swift_server(tmp_path) as server,
        LocalBlobStore(tmp_path / "images", reserve_free_bytes=0) as images,
    ):
        make_bucket(server, BUCKET)
        data = content(6 << 20)
        big, small = add(images, data), add(images, b"small")
        keys = f"endpoint={server.endpoint}&access_key={quote(ACCESS_KEY)}&secret_key={SECRET_KEY}&part_size_bytes={5 << 20}"
        bucket = f"s3://{BUCKET}/moved?{keys}"
        assert "2 images of 6291461 bytes copied" in _run(
            "blobs", "copy", "--from", f"file://{tmp_path}/images", "--to", bucket
        )
        with S3BlobStore(s3_settings(server, prefix="moved/")) as store:
            assert {info.digest for info in store.list()} == {big.digest, small.digest}
            assert read(store, big.digest, verify=True) == data
        assert "2 images" in _run("blobs", "copy", "--from", bucket, "--to", f"file://{tmp_path}/back")
        with LocalBlobStore(tmp_path / "back", reserve_free_bytes=0) as back:
            assert read(back, big.digest, verify=True) == data
