"""Container images of every kind through the running service, found by name and labels."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard
from click.testing import CliRunner, Result

from image_service.cli import cli
from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import call, download, stored_files, upload
from tests.codec import samples
from tests.imagestore.images import aci, entry, tar
from tests.imagestore.test_oci_images import Layout

ROOTFS = tar(entry("etc", None), entry("etc/hostname", b"guest\n"))


def _layout() -> bytes:
    layout = Layout()
    return layout.tag(layout.image(b"layer"), "example.com/oci:v1").pack()


def _found(service: Daemon, query: str) -> list[str]:
    response = call(service, "GET", f"/images?{query}")
    assert response.status_code == 200, response.text
    return [str(record["id"]) for record in response.json()]


def test_app_container_is_found_by_name_and_labels_of_its_manifest(service: Daemon) -> None:
    image = gzip.compress(aci(labels={"version": "1.0", "os": "linux", "arch": "amd64"}))
    record = upload(service, image, image_type="container")
    assert (record["name"], record["version"], record["format"]) == ("example.com/app", "1.0", "tar")
    assert record["labels"] == {"version": "1.0", "os": "linux", "arch": "amd64", "kind": "aci"}
    assert _found(service, "name=example.com/app&label=os=linux&label=arch=amd64") == [record["id"]]
    assert _found(service, "name=example.com/app&label=arch=arm64") == []
    assert download(service, record["id"]).content == image


def test_layout_is_found_by_name_and_tag(service: Daemon) -> None:
    record = upload(service, _layout(), image_type="container")
    assert (record["name"], record["version"]) == ("example.com/oci", "v1")
    assert _found(service, "label=kind=oci&label=tag=v1") == [record["id"]]


def test_large_packed_layout_is_opened_whole(service: Daemon) -> None:
    """As skopeo writes them, with the documents behind 70 MiB of layers."""
    layout = Layout()
    layout.tag(layout.image(random.Random(7).randbytes(70 << 20)), "example.com/large:v2")
    layout.files = dict(sorted(layout.files.items()))
    image = zstandard.ZstdCompressor(level=1).compress(layout.pack())
    record = upload(service, image, image_type="container")
    assert (record["name"], record["version"]) == ("example.com/large", "v2")
    assert _found(service, "label=kind=oci&label=tag=v2") == [record["id"]]


def test_what_the_bringer_says_counts_before_what_the_image_says(service: Daemon) -> None:
    headers = {"X-Image-Name": "mine", "X-Image-Label": "os=other"}
    record = upload(service, aci(content=b"2", labels={"os": "linux"}), image_type="container", **headers)
    assert (record["name"], record["labels"]["os"]) == ("mine", "other")


OTHERS: dict[str, tuple[bytes, str, dict[str, Any]]] = {
    "a root file system": (ROOTFS, "tar", {}),
    "a squashfs": (b"hsqs" + bytes(8188), "raw", {"kind": "squashfs"}),
    "a filesystem's stream": (samples.load("fs-Lec"), "zfs", {}),
}


@pytest.mark.parametrize("what", sorted(OTHERS))
def test_other_containers_are_taken_as_they_are(service: Daemon, what: str) -> None:
    data, kind, labels = OTHERS[what]
    record = upload(service, data, image_type="container")
    assert (record["status"], record["format"], record.get("labels", {})) == ("complete", kind, labels)
    assert download(service, record["id"]).content == data


def test_app_container_that_breaks_a_rule_leaves_nothing(service: Daemon, state_dir: Path) -> None:
    before = stored_files(state_dir)
    response = call(service, "PUT", "/images", data=aci("Not Valid"), headers={"X-Image-Type": "container"})
    assert response.status_code == 422
    assert "ACIdentifier must contain only" in response.json()["message"]
    assert stored_files(state_dir) == before


def _cli(service: Daemon, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["image", *[str(a) for a in arguments], "--url", service.url])


def test_command_lists_shows_exports_and_removes_images_of_the_service(service: Daemon, tmp_path: Path) -> None:
    image = aci("example.com/command", labels={"version": "7"})
    record = upload(service, image, image_type="container")
    listed = _cli(service, "list", "--full", "--no-legend", "--fields", "id,name,size")
    assert [record["id"], "example.com/command:7", str(len(image))] in [
        line.split() for line in listed.stdout.splitlines()
    ]
    for reference in (record["id"], "example.com/command:7", "example.com/command,kind=aci"):
        assert json.loads(_cli(service, "show", reference).stdout)["id"] == record["id"]
    target = tmp_path / "out.aci"
    assert _cli(service, "export", "example.com/command", target).exit_code == 0
    assert target.read_bytes() == image
    assert "output ACI file exists" in _cli(service, "export", record["id"], target).stderr
    removed = _cli(service, "rm", record["id"], "example.com/command")
    assert (removed.exit_code, removed.stdout) == (1, "1 image(s) successfully removed\n")
    assert "example.com/command: no image example.com/command" in removed.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x"])
def test_command_without_a_service_says_so(url: str) -> None:
    result = CliRunner().invoke(cli, ["image", "list", "--url", url])
    assert result.exit_code == 1
    assert url in result.stderr
