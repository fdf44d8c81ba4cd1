"""Backup and restore as docs/operate/cluster.md says: etcd's own snapshot, and the blobs copied; then everything is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from demo.servers.etcd import EtcdCluster, etcd_cluster
from demo.servers.processes import path_with_sbin
from demo.servers.replicas import replicas, store_flags
from demo.servers.s3 import BUCKET, make_bucket
from demo.servers.swift import ACCESS_KEY, SECRET_KEY, SwiftServer, swift_server
from image_service.cli import cli
from rpc.client import ImageServiceClient

pytestmark = pytest.mark.backend("etcd", "etcdctl", "s3")

CONTENTS = [bytes([number]) * (1000 + number) for number in range(5)] + [os.urandom(6 << 20)]


def _run(*command: str) -> str:
    environment = os.environ | {"ETCDCTL_API": "3", "PATH": path_with_sbin()}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert ended.returncode == 0, f"{command}: {ended.stdout} {ended.stderr}"
    return ended.stdout


def _copy_blobs(source: str, target: str) -> str:
    result = CliRunner().invoke(cli, ["blobs", "copy", "--from", source, "--to", target])
    assert result.exit_code == 0, result.output
    return result.output


def _bucket_url(server: SwiftServer) -> str:
    keys = f"endpoint={server.endpoint}&access_key={quote(ACCESS_KEY)}&secret_key={SECRET_KEY}"
    return f"s3://{BUCKET}?{keys}"


def _restore_tool() -> list[str]:
    """etcd 3.5 began to move this to a program of its own, 3.6 has it only there."""
    return ["etcdutl" if shutil.which("etcdutl", path=path_with_sbin()) else "etcdctl", "snapshot", "restore"]


def _wipe_and_restore_etcd(cluster: EtcdCluster, snapshot: Path, directory: Path) -> None:
    """Every node anew, from one file."""
    for node in cluster.nodes:
        node.process.kill()
        shutil.rmtree(directory / node.name)
    peers = ",".join(f"{node.name}={node.peer_url}" for node in cluster.nodes)
    for node in cluster.nodes:
        _run(
            *_restore_tool(),
            str(snapshot),
            f"--name={node.name}",
            f"--data-dir={directory / node.name}",
            f"--initial-cluster={peers}",
            f"--initial-advertise-peer-urls={node.peer_url}",
        )
    for node in cluster.nodes:
        node.process.start()
    cluster.wait_healthy()


def _upload(url: str, contents: Sequence[bytes]) -> dict[str, bytes]:
    with ImageServiceClient(url) as service:
        return {service.upload_image(content, image_type="kvm").id: content for content in contents}


def _assert_there(url: str, images: dict[str, bytes]) -> None:
    with ImageServiceClient(url) as service:
        assert {record.id for record in service.list_images()} == set(images)
        for image_id, content in images.items():
            with service.download_image(image_id) as pieces:
                assert b"".join(pieces) == content


def test_backup_of_both_stores_restores_every_image(tmp_path: Path) -> None:
    first, second, backup = tmp_path / "first", tmp_path / "second", tmp_path / "backup"
    for directory in (first, second, backup, tmp_path / "etcd"):
        directory.mkdir()
    snapshot, blobs = backup / "records.db", f"file://{backup}/images"
    with etcd_cluster(tmp_path / "etcd") as etcd:
        with swift_server(first / "swift") as s3:
            make_bucket(s3, BUCKET)
            with replicas(first, store_flags(etcd, s3), count=1) as [service]:
                images = _upload(service.url, CONTENTS)
                _run("etcdctl", f"--endpoints={etcd.endpoints[0]}", "snapshot", "save", str(snapshot))
                _upload(service.url, [b"brought after the snapshot of the records"])
                assert f"{len(CONTENTS) + 1} images" in _copy_blobs(_bucket_url(s3), blobs)
        _wipe_and_restore_etcd(etcd, snapshot, tmp_path / "etcd")
        with swift_server(second / "swift") as s3:  # the first one's disk is gone
            make_bucket(s3, BUCKET)
            _copy_blobs(blobs, _bucket_url(s3))
            with replicas(second, store_flags(etcd, s3), count=1) as [service]:
                _assert_there(service.url, images)
                images |= _upload(service.url, [b"and life goes on"])
                _assert_there(service.url, images)
