"""The main job, agent and image service together, on every pair of stores: embedded and local, etcd and local, etcd and S3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.servers.etcd import EtcdCluster, etcd_cluster
from demo.servers.s3 import BUCKET, make_bucket
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, SwiftServer, swift_server
from tests.acceptance.daemons import Daemon, start_agent, start_image_service
from tests.acceptance.image_service_calls import FETCHING, call, fetch, sha256, upload, wait_for
from tests.acceptance.test_derived_agent import *  # noqa: F403  its tests run here, on the services below
from tests.fakes.disk_files import disk_bytes
from tests.fakes.source_server import Source, start_source_server

pytestmark = pytest.mark.backend("etcd", "s3")

DISK = disk_bytes(7, 512)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        make_bucket(server, BUCKET)
        yield server


def _flags(stores: str, etcd: EtcdCluster, s3: SwiftServer) -> dict[str, Any]:
    flags = dict(FETCHING)
    if stores != "embedded-local":
        table = {"machines": list(etcd.endpoints), "prefix": f"/{stores}"}
        flags |= {"metadata_store_type": "etcd", "metadata_store_config": json.dumps(table)}
    if stores == "etcd-s3":
        bucket = {"bucket": BUCKET, "endpoint": s3.endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        flags |= {"image_store_type": "s3", "image_store_config": json.dumps(bucket)}
    return flags


@pytest.fixture(scope="module", params=["embedded-local", "etcd-local", "etcd-s3"])  # type: ignore[no-redef]
def service(
    request: pytest.FixtureRequest, etcd: EtcdCluster, s3: SwiftServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    state_dir = tmp_path_factory.mktemp(request.param) / "state"
    with start_image_service(state_dir, **_flags(request.param, etcd, s3)) as daemon:
        yield daemon


def _sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("way", ["uploaded", "fetched"])
def test_image_becomes_a_guests_disk_and_goes_again(service: Daemon, tmp_path: Path, way: str) -> None:
    wanted = hashlib.sha256(DISK).hexdigest()
    with start_source_server() as sources:
        if way == "uploaded":
            image_id = upload(service, DISK)["id"]
        else:
            image_id = fetch(service, sources.add(f"/{tmp_path.name}", Source(DISK)))["id"]
            assert wait_for(service, image_id, "complete")["digest"] == sha256(DISK)
    with start_agent(tmp_path / "agent", image_service=f"127.0.0.1:{service.port}") as agent:
        assert agent.call("RequestImage", id=image_id, type="kvm")["images"][0]["status"] == "complete"
        guest = {"id": "guest", "disks": [{"image": image_id}, {"size": 8}]}
        assert len(agent.call("VerifyDisks", guest=guest)["guest"]["disks"]) == 2
        disks = agent.call("CreateGuestDisks", guest=guest)["guest"]["disks"]
        assert _sha256_of(disks[0]["source"]) == wanted
        agent.call("CreateSnapshot", id="guests/guest/disk-0", dest="before")
        with Path(disks[0]["source"]).open("r+b") as disk:
            disk.write(b"spoilt")
        agent.call("RollbackSnapshot", id="guests/guest/disk-0@before")
        assert _sha256_of(disks[0]["source"]) == wanted
        assert agent.download("mistify/guests/guest/disk-0@before").status_code == 200
        agent.call("DeleteGuestsDisks", guest={"id": "guest"})
        agent.call("DeleteImage", id=image_id)
    assert call(service, "DELETE", f"/images/{image_id}").status_code == 200
    assert call(service, "GET", f"/images/{image_id}").status_code == 404
