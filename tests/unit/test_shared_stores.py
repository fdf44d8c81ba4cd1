"""The tables of a configuration file that describe shared stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from image_service.shared_stores import etcd_settings, open_etcd, open_s3
from image_service.stores import image_stores, metadata_stores
from imaging.errors import BadDataError, InvalidArgumentError, NotFoundError, UnavailableError

MACHINES = ["http://127.0.0.1:2379", "http://127.0.0.1:22379"]


def test_stores_are_registered_by_name() -> None:
    assert "etcd" in metadata_stores.list()
    assert "s3" in image_stores.list()


def test_original_table_gives_the_same_meaning() -> None:
    settings = etcd_settings(
        {"machines": MACHINES, "cert": "c.pem", "key": "k.pem", "caCert": "ca.pem", "prefix": "/fleet", "filepath": ""}
    )
    assert settings.endpoints == tuple(MACHINES)
    assert (settings.cert_file, settings.key_file, settings.ca_file) == ("c.pem", "k.pem", "ca.pem")
    assert settings.prefix == "/fleet/"


def test_client_file_of_the_original_is_read(tmp_path: Path) -> None:
    path = tmp_path / "etcd.json"
    path.write_text(
        json.dumps(
            {
                "config": {
                    "certFile": "c.pem",
                    "keyFile": "k.pem",
                    "caCertFiles": ["ca.pem"],
                    "timeout": 1_000_000_000,
                    "consistency": "STRONG",
                },
                "cluster": {"leader": MACHINES[0], "machines": MACHINES},
            }
        )
    )
    settings = etcd_settings({"filepath": str(path)})
    assert settings.endpoints == tuple(MACHINES)
    assert (settings.cert_file, settings.key_file, settings.ca_file) == ("c.pem", "k.pem", "ca.pem")


def test_secret_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("correct horse\n")
    settings = etcd_settings({"machines": MACHINES, "user": "images", "password_file": str(path)})
    assert (settings.user, settings.password) == ("images", "correct horse")


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"machines": []},
        {"machines": [1]},
        {"machines": MACHINES, "cert": 7},
        {"machines": MACHINES, "stale_reads": "yes"},
        {"machines": MACHINES, "password_file": "/dev/zero"},
    ],
)
def test_wrong_etcd_table_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        etcd_settings(table)


@pytest.mark.parametrize("table", [{"machines": ["ftp://x"]}, {"machines": MACHINES, "cert": "c.pem"}])
def test_etcd_that_cannot_be_spoken_to_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        open_etcd(table)


def test_etcd_that_does_not_answer_is_unavailable() -> None:
    with pytest.raises(UnavailableError):
        open_etcd({"machines": ["http://127.0.0.1:9"]})


def test_damaged_or_missing_client_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_text("{]")
    with pytest.raises(BadDataError):
        etcd_settings({"filepath": str(tmp_path / "damaged")})
    with pytest.raises(NotFoundError):
        etcd_settings({"filepath": str(tmp_path / "missing")})


@pytest.mark.parametrize(
    "table",
    [{}, {"bucket": 7}, {"bucket": "images", "part_size_bytes": 1}, {"bucket": "images", "parts_max": "many"}],
)
def test_wrong_s3_table_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        open_s3(table)
