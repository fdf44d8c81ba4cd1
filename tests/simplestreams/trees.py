"""Trees of downloads on disk, as Ubuntu and linuxcontainers.org publish them, and a web server for them."""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from imaging.simplestreams.signing import Signer
from tests.simplestreams.catalogues import key

HOLD_MAX_S = 300
"""The longest a test lets a client wait in the middle of a file."""

DATE = "Wed, 01 May 2024 13:31:26 +0000"


def content(path: str, size: int = 2000) -> bytes:
    """Bytes that belong to a path."""
    return random.Random(path).randbytes(size)


def put(base: Path, path: str, data: bytes) -> dict[str, Any]:
    """A file of a tree, and the item that describes it."""
    file = base / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def product(
    base: Path, release: str, arch: str, versions: list[str], ftypes: tuple[str, ...] = ("disk1.img",)
) -> dict[str, Any]:
    """A product with one file for each version and ftype."""
    fields: dict[str, Any] = {
        "os": "ubuntu",
        "release": release,
        "arch": arch,
        "aliases": f"{release},{release[0]}",
        "variant": "cloud",
    }
    made = {}
    for version in versions:
        paths = {ftype: f"server/{release}/{version}/{arch}-{ftype}" for ftype in ftypes}
        made[version] = {"items": {ft: put(base, path, content(path)) | {"ftype": ft} for ft, path in paths.items()}}
    return fields | {"versions": made}


def default_products(base: Path) -> dict[str, Any]:
    return {
        f"com.ubuntu.cloud:server:{release}:{arch}": product(base, release, arch, ["20240101", "20240201", "20240301"])
        for release in ("focal", "jammy", "noble")
        for arch in ("amd64", "arm64")
    }


def write_tree(base: Path, products: dict[str, Any], *, updated: str = DATE, signer: str = "") -> Path:
    """Write products and index; signed in both forms if ``signer`` names a key."""
    document: dict[str, Any] = {
        "format": "products:1.0",
        "content_id": "ubuntu",
        "datatype": "image-downloads",
        "license": "free",
    }
    document |= {"products": products, "updated": updated}
    entry: dict[str, Any] = {
        "format": "products:1.0",
        "datatype": "image-downloads",
        "path": "streams/v1/downloads.json",
    }
    index = {"format": "index:1.0", "updated": updated, "index": {"ubuntu": entry | {"products": sorted(products)}}}
    streams = base / "streams" / "v1"
    streams.mkdir(parents=True, exist_ok=True)
    for name, value in (("downloads", document), ("index", index)):
        data = json.dumps(value).encode()
        (streams / f"{name}.json").write_bytes(data)
        if signer:
            with Signer(key(signer).private) as gpg:
                (streams / f"{name}.json.gpg").write_bytes(gpg.detach_sign(data))
                text = data.replace(b"downloads.json", b"downloads.sjson")
                (streams / f"{name}.sjson").write_bytes(gpg.clearsign(text))
    return base


def index_of(base: Path) -> Any:
    return json.loads((base / "streams/v1/index.json").read_bytes())


def products_of(base: Path) -> dict[str, Any]:
    """Every product of a published tree."""
    found: dict[str, Any] = {}
    for entry in index_of(base)["index"].values():
        found |= json.loads((base / entry["path"]).read_bytes())["products"]
    return found


def check_whole(base: Path) -> dict[str, Any]:
    """Every promise of a published tree is kept; its products."""
    products = products_of(base)
    for item in items_of(products):
        data = (base / item["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item["size"], item["sha256"]), item["path"]
    return products


def items_of(products: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in products.values():
        for version in one["versions"].values():
            yield from version["items"].values()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that knows ranges, breaks off or refuses as the test says, and notes what was asked."""

    protocol_version = "HTTP/1.1"
    server: TreeServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        with self.server.lock:
            self.server.requests.append((path, self.headers.get("Range", "")))
            limit = self.server.break_after.pop(path, None)
            hold = self.server.hold_after.get(path)
            status = self.server.refuse.get(path)
        file = Path(self.directory) / path
        self.close_connection = True
        if status or not file.is_file():
            self.send_error(status or 404)
            return
        data = file.read_bytes()
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if hold is not None:
            self.wfile.write(data[begin : begin + hold])
            self.wfile.flush()
            self.server.released.wait(HOLD_MAX_S)
            return
        self.wfile.write(data[begin:] if limit is None else data[begin : begin + limit])

    def log_message(self, *_: Any) -> None:
        return


class TreeServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(directory)))
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.break_after: dict[str, int] = {}
        self.hold_after: dict[str, int] = {}
        self.released = threading.Event()
        self.refuse: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def served(directory: Path) -> Iterator[TreeServer]:
    with TreeServer(directory) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join(30)
