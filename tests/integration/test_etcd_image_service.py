"""The wire tests of the image service, with its records in etcd and its images in local files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.servers.etcd import etcd_cluster
from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import FETCHING
from tests.acceptance.test_image_service_wire import *  # noqa: F403  its tests run here, on the service below

pytestmark = pytest.mark.backend("etcd")


@pytest.fixture(scope="module")  # type: ignore[no-redef]
def service(state_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        table = {"machines": list(cluster.endpoints), "prefix": "/wire"}
        flags = FETCHING | {"metadata_store_type": "etcd", "metadata_store_config": json.dumps(table)}
        with start_image_service(
            state_dir, **flags, image_size_max_bytes=4 << 20, upload_stall_timeout_s=1.0
        ) as daemon:
            yield daemon
