"""The image service's command line and files: ours, the original's, and what the original left on the disk."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from demo.servers.processes import free_port
from tests.acceptance.daemons import Daemon, clean_environment
from tests.acceptance.image_service_calls import call, download, post, record_of, sha256, upload, wait_for
from tests.fakes.source_server import Source, start_source_server
from tests.waiting import wait_until

DATA = b"image data " * 1000
KVM_ID = "a32ffa3c-5a4b-4b4a-8a53-9e4c0e2e0a01"
OLD_START = "2015-06-01T10:11:12.123456789Z"


@contextmanager
def _service(
    tmp_path: Path, *arguments: str, port: int | None = None, env: dict[str, str] | None = None
) -> Iterator[Daemon]:
    """A service started with exactly these arguments."""
    port = port or free_port()
    words = [word.replace("PORT", str(port)) for word in arguments]
    daemon = Daemon("image_service", words, port, tmp_path / "service.log", env)
    try:
        yield daemon.start()
    finally:
        if daemon.process is not None:
            daemon.stop()


def _refused(*arguments: str) -> str:
    """What a service says that does not start."""
    command = [sys.executable, "-m", "image_service", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment(None), check=False)
    assert done.returncode != 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def _write(path: Path, value: dict[str, Any]) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def _original_config(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "imageStoreType": "fs",
        "imageStoreConfig": {"dir": str(tmp_path / "images")},
        "metadataStoreType": "kvite",
        "metadataStoreConfig": {"filename": str(tmp_path / "images.db"), "table": "images"},
        **more,
    }


# -- flags and files -----------------------------------------------------------------------------------------------------


def test_short_flags_of_the_original_work(tmp_path: Path) -> None:
    with _service(tmp_path, "-a", "PORT", "-l", "warning", "--state-dir", str(tmp_path / "state")) as service:
        assert call(service, "GET", "/images").json() == []


def test_file_of_the_original_in_json_works(tmp_path: Path) -> None:
    path = _write(tmp_path / "config.json", _original_config(tmp_path))
    with _service(tmp_path, "-c", path, "-a", "PORT") as service:
        record = upload(service, DATA)
        assert download(service, record["id"]).content == DATA
    assert list((tmp_path / "images").glob("blobs/*/*/*"))
    assert (tmp_path / "images.db").exists()


def test_file_of_the_original_in_toml_works(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        'imageStoreType = "fs"\nmetadataStoreType = "kvite"\n'
        f'[imageStoreConfig]\ndir = "{tmp_path / "images"}"\n'
        f'[metadataStoreConfig]\nfilename = "{tmp_path / "images.db"}"\ntable = "images"\n'
    )
    with _service(tmp_path, "--config-file", str(path), "--port", "PORT") as service:
        upload(service, DATA)


def test_port_in_the_file_is_used_and_the_flag_wins(tmp_path: Path) -> None:
    in_file, flag = free_port(), free_port()
    path = _write(tmp_path / "config.json", _original_config(tmp_path, port=in_file))
    with _service(tmp_path, "-c", path, port=in_file) as service:
        assert call(service, "GET", "/images").status_code == 200
    with _service(tmp_path, "-c", path, "-a", "PORT", port=flag) as service:
        assert call(service, "GET", "/images").status_code == 200
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{in_file}/images", timeout=5)


def test_own_options_can_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'state-dir = "{tmp_path / "state"}"\nimage-size-max-bytes = 10\n')
    with _service(tmp_path, "-c", str(path), "-a", "PORT") as service:
        response = call(service, "PUT", "/images", data=DATA, headers={"X-Image-Type": "kvm"})
        assert response.status_code == 413
    assert (tmp_path / "state").is_dir()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"imageStoreType": "riakcs"}, "unknown image store type 'riakcs'"),
        ({"metadataStoreType": "riak"}, "unknown metadata store type 'riak'"),
        ({"metadataStoreConfig": {"filename": ""}}, "filename"),
        ({"imageStoreConfig": {"dir": ""}}, "dir"),
        ({"imageStoreConfig": "text"}, "is not JSON"),
        ({"port": 70000}, "port"),
        ({"unheard": 1}, "unheard"),
    ],
)
def test_file_with_something_wrong_is_refused_in_words(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = _write(tmp_path / "config.json", _original_config(tmp_path) | change)
    assert says in _refused("-c", path, "--state-dir", str(tmp_path / "state"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--allow-source-net", "127.0.0.1/8"], "127.0.0.1/8"),
        (["--bind", "0.0.0.0", "-a", "0"], "--token-file"),
        (["-c", "/does/not/exist"], "/does/not/exist"),
        (["-l", "loud"], "loud"),
    ],
)
def test_flag_with_something_wrong_is_refused_in_words(tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in _refused(*arguments, "--state-dir", str(tmp_path / "state"))


def test_second_service_on_one_state_is_refused(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with _service(tmp_path, "-a", "PORT", "--state-dir", state) as service:
        upload(service, DATA)
        assert _refused("-a", "0", "--state-dir", state).count("\n") == 1
        assert call(service, "GET", "/images").status_code == 200


def test_token_is_asked_of_every_caller(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("geheim\n")
    port = free_port()
    arguments = ["-a", str(port), "--state-dir", str(tmp_path / "state"), "--token-file", str(token)]
    daemon = Daemon("image_service", arguments, port, tmp_path / "service.log")
    daemon.start(wait=False)
    try:
        wait_until(lambda: "listening on" in daemon.log(), "the service to listen")
        headers = {"Authorization": "Bearer geheim"}
        assert call(daemon, "GET", "/images", headers=headers).status_code == 200
        for path in ("/images", "/images/x/download"):
            refused = call(daemon, "GET", path)
            assert (refused.status_code, refused.json()["stack"]) == (401, [])
    finally:
        daemon.stop()


# -- what the original left ----------------------------------------------------------------------------------------------


def _write_original(path: Path, records: list[dict[str, Any]], *, table: str = "images") -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            f"CREATE TABLE '{table}' (key TEXT NOT NULL, bucket TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (key, bucket))"
        )
        for record in records:
            key = record.get("id") or record.get("ID")
            row = (key, "images", json.dumps(record).encode())
            database.execute(f"INSERT INTO '{table}' VALUES (?, ?, ?)", row)
        database.execute(f"INSERT INTO '{table}' VALUES ('x', 'another bucket', 'x')")
        database.commit()


def _old(image_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": image_id,
        "source": "",
        "type": "kvm",
        "comment": "old",
        "status": "complete",
        "size": len(DATA),
        "expected_size": len(DATA),
        "download_start": OLD_START,
        "download_end": "0001-01-01T00:00:00Z",
        **changes,
    }


def test_records_and_images_of_the_original_are_taken_over_once(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / KVM_ID).write_bytes(DATA)
    original = tmp_path / "images.db"
    failed = _old("failed", status="error", source="http://127.0.0.1:9/failed", type="container")
    _write_original(original, [_old(KVM_ID), _old("lost"), failed, _old("../evil"), _old("odd", type="vmware")])
    before = original.read_bytes()
    path = _write(tmp_path / "config.json", _original_config(tmp_path))
    with _service(tmp_path, "-c", path, "-a", "PORT") as service:
        record = record_of(service, KVM_ID)
        assert (record["status"], record["size"], record["digest"]) == ("complete", len(DATA), sha256(DATA))
        assert record["comment"] == "old"
        assert record["download_start"].startswith("2015-06-01T10:11:12.123456")
        assert record["download_end"] == "0001-01-01T00:00:00Z"
        assert download(service, KVM_ID).content == DATA
        assert record_of(service, "lost")["status"] == "error"
        assert record_of(service, "failed")["type"] == "container"
        assert sorted(r["id"] for r in call(service, "GET", "/images").json()) == sorted([KVM_ID, "lost", "failed"])
        assert call(service, "DELETE", f"/images/{KVM_ID}").status_code == 200
    with _service(tmp_path, "-c", path, "-a", "PORT") as service:
        assert call(service, "GET", f"/images/{KVM_ID}").status_code == 404
        assert record_of(service, "failed")["status"] == "error"
    assert original.read_bytes() == before
    assert (images / KVM_ID).read_bytes() == DATA


def test_unfinished_fetch_of_the_original_is_done_by_us(tmp_path: Path) -> None:
    with start_source_server() as sources:
        url = sources.add("/old", Source(DATA))
        records: list[dict[str, Any]] = [
            {"ID": "one", "Source": url, "Type": "kvm", "Status": "downloading", "ExpectedSize": 5},
            {"ID": "two", "Source": url, "Type": "kvm", "Status": "pending"},
        ]
        _write_original(tmp_path / "images.db", records)
        path = _write(tmp_path / "config.json", _original_config(tmp_path))
        with _service(tmp_path, "-c", path, "-a", "PORT", "--allow-source-net", "127.0.0.0/8") as service:
            assert wait_for(service, "one", "complete")["digest"] == sha256(DATA)
            assert record_of(service, "two")["source"] == ""
            assert record_of(service, "two")["status"] == "error"
            assert post(service, url).json()["id"] == "one"


def test_damaged_file_of_the_original_stops_the_start(tmp_path: Path) -> None:
    _write_original(tmp_path / "images.db", [])
    with closing(sqlite3.connect(tmp_path / "images.db")) as database:
        database.execute("INSERT INTO images VALUES ('bad', 'images', '{not json')")
        database.commit()
    path = _write(tmp_path / "config.json", _original_config(tmp_path))
    assert "damaged" in _refused("-c", path, "-a", "0")


def test_file_that_can_not_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    """As on a file system that is read-only: sqlite finds no room for what it needs beside the file."""
    path = tmp_path / "records.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE records (key TEXT)")
    (tmp_path / "records.db-wal").mkdir()
    config = {"metadataStoreType": "kvite", "metadataStoreConfig": {"filename": str(path)}}
    refused = _refused(
        "-c", _write(tmp_path / "config.json", config), "-a", "0", "--state-dir", str(tmp_path / "state")
    )
    assert "can't be read" in refused
    assert "damaged" not in refused
