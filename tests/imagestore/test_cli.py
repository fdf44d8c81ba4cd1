"""``mistify-image blobs`` and ``mistify-image image`` as programs see them."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from image_service.cli import cli
from image_service.imagestore.store import ImageStore
from tests.imagestore.images import aci, files, key_of
from tests.imagestore.test_fetching import Source
from tests.imagestore.test_oci_images import Layout

IMAGE = aci(labels={"version": "1.0", "os": "linux", "arch": "amd64"})
KEY = key_of(IMAGE)


class Cli:
    """The command on one store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"

    def run(self, *arguments: object, data: bytes | None = None) -> Result:
        environment = {"MISTIFY_CONTAINER_STORE": str(self.store)}
        return CliRunner().invoke(cli, [str(a) for a in arguments], input=data, env=environment)

    def ok(self, *arguments: object, data: bytes | None = None) -> str:
        result = self.run(*arguments, data=data)
        assert result.exit_code == 0, result.output
        return result.stdout

    def write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        return path

    def add(self, *images: bytes) -> None:
        for number, image in enumerate(images):
            self.ok("blobs", "import", self.write(f"app{number}.tar", image))


@pytest.fixture
def tool(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def _oci() -> bytes:
    layout = Layout()
    return layout.tag(layout.image(b"layer"), "v1").pack()


def test_blobs_import_json_says_key_name_labels_and_size(tool: Cli) -> None:
    told = json.loads(tool.ok("blobs", "import", tool.write("a.aci", gzip.compress(IMAGE)), "--json"))
    labels = {"version": "1.0", "os": "linux", "arch": "amd64"}
    assert told == {"key": KEY, "name": "example.com/app", "labels": labels, "size": len(IMAGE), "kind": "aci"}


def test_blobs_import_reads_standard_input(tool: Cli) -> None:
    assert tool.ok("blobs", "import", "-", data=IMAGE) == f"{KEY}\n"


def test_blobs_import_of_a_layout_says_name_and_tag(tool: Cli) -> None:
    told = json.loads(tool.ok("blobs", "import", tool.write("My App.tar", _oci()), "--json"))
    assert (told["name"], told["labels"], told["kind"]) == ("my-app", {"tag": "v1"}, "oci")
    assert told["key"].startswith("sha256:")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"text", "error decompressing image: no type returned from DetectFileType?"),
        (aci(""), "error extracting image manifest: name must be set"),
    ],
)
def test_blobs_import_refused_says_the_error_and_exits_1(tool: Cli, data: bytes, error: str) -> None:
    result = tool.run("blobs", "import", tool.write("bad", data), "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, {"error": error})
    plain = tool.run("blobs", "import", tool.write("bad", data))
    assert (plain.exit_code, plain.stdout) == (1, "")
    assert error in plain.stderr
    with ImageStore(tool.store) as store:
        assert files(store) == set()


@pytest.mark.parametrize(("file", "error"), [("nosuch", "cannot open"), (".", "is a directory")])
def test_blobs_import_of_no_file_says_so(tool: Cli, file: str, error: str) -> None:
    result = tool.run("blobs", "import", tool.directory / file, "--json")
    assert result.exit_code == 1
    assert error in json.loads(result.stdout)["error"]


def test_image_list_shows_both_kinds(tool: Cli) -> None:
    tool.add(IMAGE, _oci())
    lines = tool.ok("image", "list").splitlines()
    assert lines[0].split() == ["ID", "NAME", "SIZE", "IMPORTTIME", "LASTUSED"]
    assert lines[1].split()[:2] == [KEY[:19], "example.com/app:1.0"]
    assert lines[2].split()[1] == "app1:v1"
    rows: list[dict[str, Any]] = json.loads(tool.ok("image", "list", "--format", "json"))
    assert [row["kind"] for row in rows] == ["aci", "oci"]
    assert rows[0]["id"] == KEY
    full = tool.ok("image", "list", "--full", "--no-legend", "--fields", "id,size", "--sort", "name", "--order", "desc")
    assert full.splitlines()[0].split() == [KEY, str(len(IMAGE))]


def test_image_list_of_an_empty_store_is_empty(tool: Cli) -> None:
    assert tool.ok("image", "list", "--no-legend") == ""
    assert json.loads(tool.ok("image", "list", "--format", "json-pretty")) == []


@pytest.mark.parametrize("field", ["latest", "nosuch", ""])
def test_image_list_of_unknown_fields_is_refused(tool: Cli, field: str) -> None:
    result = tool.run("image", "list", "--fields", field)
    assert result.exit_code == 1
    assert "unknown field" in result.output


@pytest.mark.parametrize(
    "reference", [KEY, KEY[:12], "example.com/app", "example.com/app:1.0", "example.com/app,os=linux"]
)
def test_image_show_takes_keys_and_names(tool: Cli, reference: str) -> None:
    tool.add(IMAGE)
    told = json.loads(tool.ok("image", "show", reference))
    assert (told["id"], told["latest"], told["image_id"][:71]) == (KEY, False, KEY)


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("sha512-0", "image ID too short"),
        ("sha512-00", "no image IDs found"),
        ("nosuch", 'cannot find aci satisfying name: "nosuch" and labels: [] in the local store'),
        ("a:1:2", "malformed app string - colon may appear at most once"),
        ("sha256:00", "no image IDs found"),
    ],
)
def test_image_show_of_what_is_not_there_tells_why(tool: Cli, reference: str, error: str) -> None:
    tool.add(IMAGE)
    result = tool.run("image", "show", reference)
    assert result.exit_code == 1
    assert error in result.stderr


def test_image_show_of_an_oci_image_says_its_tags(tool: Cli) -> None:
    tool.add(_oci())
    told = json.loads(tool.ok("image", "show", "app0:v1"))
    assert (told["kind"], told["tags"]) == ("oci", ["app0:v1"])


def test_image_cat_manifest_is_pretty_unless_told(tool: Cli) -> None:
    tool.add(IMAGE, _oci())
    plain = tool.ok("image", "cat-manifest", KEY, "--no-pretty-print")
    assert plain.startswith('{"acKind":"ImageManifest","acVersion":')
    assert json.loads(tool.ok("image", "cat-manifest", KEY)) == json.loads(plain)
    assert len(tool.ok("image", "cat-manifest", KEY).splitlines()) > 5
    assert json.loads(tool.ok("image", "cat-manifest", "app1:v1"))["schemaVersion"] == 2


def test_image_export_gives_the_archive_and_does_not_overwrite_unasked(tool: Cli) -> None:
    tool.add(IMAGE)
    target = tool.directory / "out.aci"
    tool.ok("image", "export", KEY, target)
    assert target.read_bytes() == IMAGE
    again = tool.run("image", "export", KEY, target)
    assert again.exit_code == 1
    assert "output ACI file exists (try --overwrite)" in again.stderr
    target.write_bytes(b"old")
    tool.ok("image", "export", KEY, target, "--overwrite")
    assert target.read_bytes() == IMAGE


def test_image_export_of_a_layout_imports_again_as_the_same(tool: Cli) -> None:
    tool.add(_oci())
    target = tool.directory / "out.tar"
    key = json.loads(tool.ok("image", "show", "app0:v1"))["id"]
    tool.ok("image", "export", "app0:v1", target)
    tool.ok("image", "rm", "app0:v1")
    assert tool.ok("blobs", "import", target, "--name", "again").strip() == key
    assert json.loads(tool.ok("image", "show", key))["tags"] == ["again:v1"]


def test_image_export_of_a_damaged_image_leaves_no_file(tool: Cli) -> None:
    tool.add(IMAGE)
    path = next(path for path in (tool.store / "blob").rglob("sha512-*") if path.is_file())
    path.write_bytes(IMAGE[:-1] + b"X")
    result = tool.run("image", "export", KEY, tool.directory / "out.aci")
    assert result.exit_code == 1
    assert "the stored image is damaged" in result.stderr
    assert not (tool.directory / "out.aci").exists()


def test_image_rm_counts_and_fails_if_one_is_unknown(tool: Cli) -> None:
    tool.add(IMAGE, _oci())
    result = tool.run("image", "rm", KEY[:15], "nosuch", "app1:v1")
    assert result.exit_code == 1
    assert "2 image(s) successfully removed" in result.stdout
    assert "nosuch: cannot find aci" in result.stderr
    assert "1 image(s) cannot be removed" in result.stderr
    assert json.loads(tool.ok("image", "list", "--format", "json")) == []


def test_image_rm_with_a_file_gone_says_stale(tool: Cli) -> None:
    tool.add(IMAGE)
    next(path for path in (tool.store / "blob").rglob("sha512-*") if path.is_file()).unlink()
    result = tool.run("image", "rm", KEY)
    assert (result.exit_code, result.stdout) == (0, "1 image(s) removed but left some stale files\n")
    assert "some aci disk entries cannot be removed" in result.stderr


def test_image_verify_says_repairs_and_is_then_content(tool: Cli) -> None:
    tool.add(IMAGE, _oci())
    assert tool.ok("image", "verify") == "ok\n"
    assert tool.ok("image", "verify", KEY, "app1:v1") == "ok\n"
    manifest = next(path for path in (tool.store / "imageManifest").rglob("sha512-*") if path.is_file())
    manifest.unlink()
    broken = tool.run("image", "verify", "--json")
    assert broken.exit_code == 1
    assert json.loads(broken.stdout) == [
        {"key": KEY, "problem": "the manifest is missing or not the image's", "repair": ""}
    ]
    assert tool.ok("image", "verify", "--repair") == (
        f"{KEY}: the manifest is missing or not the image's (written anew)\n"
    )
    assert tool.ok("image", "verify", "--quick") == "ok\n"


def test_image_verify_rebuild_mends_a_damaged_index(tool: Cli) -> None:
    tool.add(IMAGE, _oci())
    (tool.store / "db" / "index.sqlite").write_bytes(b"junk" * 1000)
    assert "damaged" in tool.run("image", "list").stderr
    assert tool.ok("image", "verify", "--rebuild") == "ok\n"
    assert len(json.loads(tool.ok("image", "list", "--format", "json"))) == 2


def test_image_gc_keeps_within_the_grace_and_what_is_named(tool: Cli) -> None:
    tool.add(IMAGE, _oci())
    assert tool.ok("image", "gc") == "0 image(s), 0 bytes\n"
    assert tool.ok("image", "gc", "--grace-period", "1h30m") == "0 image(s), 0 bytes\n"
    assert "would remove" in tool.ok("image", "gc", "--grace-period", "0s", "--dry-run")
    told = tool.ok("image", "gc", "--grace-period", "0s", "--keep", KEY)
    assert "1 image(s)" in told
    assert [row["id"] for row in json.loads(tool.ok("image", "list", "--format", "json"))] == [KEY]


@pytest.mark.parametrize("text", ["soon", "1", "h", "1x", "1h 2m"])
def test_image_gc_with_no_duration_is_refused(tool: Cli, text: str) -> None:
    result = tool.run("image", "gc", "--grace-period", text)
    assert result.exit_code == 1
    assert "not a duration" in result.stderr


def test_blobs_fetch_prints_the_key_or_the_status(tool: Cli) -> None:
    with Source() as source:
        thread = threading.Thread(target=source.serve_forever, args=(0.02,))
        thread.start()
        try:
            assert tool.ok("blobs", "fetch", source.url) == f"{key_of(source.data)}\n"
            source.status = 404
            result = tool.run("blobs", "fetch", source.url + "x")
            assert (result.exit_code, result.stderr) == (1, "Error: bad HTTP status code: 404\n")
        finally:
            source.shutdown()
            thread.join(30)
    never = tool.run("blobs", "fetch", "http://127.0.0.1:1/x", "--pull-policy", "never")
    assert "pull policy is never" in never.stderr
