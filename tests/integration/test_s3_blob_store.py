"""S3BlobStore keeps the BlobStore contract on a real S3 server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from demo.servers.s3 import BUCKET, make_bucket, s3_settings
from demo.servers.swift import SwiftServer, swift_server
from imaging.blobs.base import BlobStore
from imaging.blobs.s3 import S3BlobStore
from imaging.blobs.s3_bucket import S3Bucket, S3Settings
from imaging.digests import Digest
from tests.contracts.blob_store import BlobStoreContract

pytestmark = pytest.mark.backend("s3")

_names = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        make_bucket(server, BUCKET)
        yield server


@pytest.fixture
def settings(server: SwiftServer) -> S3Settings:
    return s3_settings(server, prefix=f"test{next(_names)}/")


class TestS3BlobStore(BlobStoreContract):
    NO_GRACE_S = -5.0  # the service tells whole seconds, rounded up

    @pytest.fixture
    def make(self, settings: S3Settings) -> Callable[[], BlobStore]:
        return lambda: S3BlobStore(settings)

    @pytest.fixture
    def damage(self, settings: S3Settings) -> Iterator[Callable[[Digest], None]]:
        bucket = S3Bucket(settings)

        def flip(digest: Digest) -> None:
            for stored in list(bucket.list(f"blobs/sha256/{digest.hex}.")):
                data = bytearray(bucket.read(stored.key))
                data[len(data) // 2] ^= 1
                bucket.put(stored.key, data)

        yield flip
        bucket.close()
