"""A running single machine moves to etcd and S3 as docs/operate/cluster.md says, and a copy that is killed goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from demo.servers.etcd import etcd_cluster
from demo.servers.replicas import PREFIX, replicas, store_flags
from demo.servers.s3 import BUCKET, make_bucket
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, swift_server
from rpc.client import ImageServiceClient
from tests.acceptance.daemons import Daemon, clean_environment, start_image_service
from tests.acceptance.image_service_calls import call, upload

pytestmark = pytest.mark.backend("etcd", "s3")

CONTENTS = [os.urandom(6 << 20) for _ in range(3)]
PROGRAM = [str(Path(sys.executable).with_name("mistify-image"))]


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, env=clean_environment({"PYTHONUNBUFFERED": "1"})
    )


def _run(*arguments: str) -> str:
    process = _start(*arguments)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def _kill_after_the_first(*arguments: str) -> None:
    """kill -9 of a copy that has told of one image."""
    process = _start(*arguments)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("sha256:")
    process.kill()
    process.wait(60)
    process.stdout.close()


def _images(url: str) -> dict[str, bytes]:
    with ImageServiceClient(url) as service:
        found = {}
        for record in service.list_images():
            with service.download_image(record.id) as pieces:
                found[record.id] = b"".join(pieces)
        return found


def _brought(service: Daemon) -> dict[str, bytes]:
    return {str(upload(service, content)["id"]): content for content in CONTENTS}


def test_single_machine_moves_while_it_runs_and_a_killed_copy_goes_on(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    (tmp_path / "etcd").mkdir()
    with etcd_cluster(tmp_path / "etcd") as etcd, swift_server(tmp_path / "swift") as s3:
        make_bucket(s3, BUCKET)
        keys = f"endpoint={s3.endpoint}&access_key={quote(ACCESS_KEY)}&secret_key={SECRET_KEY}"
        blobs = ["blobs", "copy", "--from", f"file://{old}/images", "--to", f"s3://{BUCKET}?{keys}"]
        hosts = ",".join(url.removeprefix("http://") for url in etcd.endpoints)
        records = ["metadata", "copy", "--from", f"sqlite://{old}/records.db", "--to", f"etcd://{hosts}{PREFIX}"]
        with start_image_service(old) as service:
            images = _brought(service)
            assert "3 images of 18874368 bytes would be copied, 0 were there" in _run(*blobs, "--dry-run")
            _kill_after_the_first(*blobs)
            assert "0 were there" not in _run(*blobs)
            _run(*records)
            gone = next(iter(images))
            assert call(service, "DELETE", f"/images/{gone}").status_code == 200
            del images[gone]
            images[upload(service, b"late")["id"]] = b"late"
        assert "1 images of 4 bytes copied" in _run(*blobs)
        _run(*records, "--prune")
        with replicas(new, store_flags(etcd, s3)) as running:
            for replica in running:
                assert _images(replica.url) == images
