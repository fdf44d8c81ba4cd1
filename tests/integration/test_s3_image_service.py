"""The wire tests of the image service, with its records in etcd and its images in S3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.servers.etcd import etcd_cluster
from demo.servers.s3 import BUCKET, make_bucket, s3_settings
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, SwiftServer, swift_server
from imaging.blobs.s3_bucket import S3Bucket
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import FETCHING, call, upload
from tests.acceptance.test_image_service_wire import *  # noqa: F403  its tests run here, on the service below
from tests.acceptance.test_image_service_wire import _open_put
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("etcd", "s3")

# These look for files; their like for a bucket is below.
del test_put_whose_client_vanishes_leaves_nothing  # noqa: F821
del test_put_that_stalls_is_given_up  # noqa: F821
del test_delete_of_one_of_two_equal_images_keeps_the_other  # noqa: F821


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        make_bucket(server, BUCKET)
        yield server


@pytest.fixture(scope="module")  # type: ignore[no-redef]
def service(state_dir: Path, server: SwiftServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        records = {"machines": list(cluster.endpoints), "prefix": "/wire"}
        images = {"bucket": BUCKET, "endpoint": server.endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        flags = FETCHING | {
            "metadata_store_type": "etcd",
            "metadata_store_config": json.dumps(records),
            "image_store_type": "s3",
            "image_store_config": json.dumps(images),
        }
        with start_image_service(
            state_dir, **flags, image_size_max_bytes=4 << 20, upload_stall_timeout_s=1.0
        ) as daemon:
            yield daemon


@pytest.fixture
def bucket(server: SwiftServer) -> Iterator[S3Bucket]:
    bucket = S3Bucket(s3_settings(server))
    yield bucket
    bucket.close()


def _stored(bucket: S3Bucket, prefix: str) -> list[str]:
    return [stored.key for stored in bucket.list(prefix)]


def test_upload_whose_client_vanishes_leaves_no_object(clean: Daemon, bucket: S3Bucket) -> None:
    with _open_put(clean, "Content-Length: 3000000") as connection:
        connection.sendall(bytes(2 << 20))
        wait_until(lambda: _stored(bucket, "ingest/"), "the upload to begin")
    wait_until(lambda: _stored(bucket, "ingest/") == [], "the upload to be forgotten")
    assert call(clean, "GET", "/images").json() == []


def test_upload_that_stalls_leaves_no_object(clean: Daemon, bucket: S3Bucket) -> None:
    with _open_put(clean, "Content-Length: 100") as connection:
        connection.sendall(b"x")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: _stored(bucket, "ingest/") == [], "the upload to be forgotten")


def test_delete_of_the_last_of_two_equal_images_removes_every_copy(clean: Daemon, bucket: S3Bucket) -> None:
    first, second = upload(clean, b"equal"), upload(clean, b"equal")
    call(clean, "DELETE", f"/images/{first['id']}")
    assert call(clean, "GET", f"/images/{second['id']}/download").content == b"equal"
    assert _stored(bucket, "blobs/") != []
    call(clean, "DELETE", f"/images/{second['id']}")
    assert _stored(bucket, "blobs/") == []
