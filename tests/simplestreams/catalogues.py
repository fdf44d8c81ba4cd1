"""Catalogues in memory, and keys, for tests of simplestreams."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from imaging.simplestreams.signing import Signer
from imaging.simplestreams.sources import MemorySource

INDEX = "streams/v1/index.json"
PRODUCTS = "streams/v1/products.json"
ENDPOINT = "https://ec2.us-east-1.amazonaws.com"
PRECISE = "com.ubuntu.cloud:server:12.04:amd64"
DATE = "Wed, 01 May 2013 13:31:26 +0000"


def item(image_id: str = "ami-1", region: str = "us-east-1", endpoint: str = ENDPOINT, **more: Any) -> dict[str, Any]:
    return {"id": image_id, "region": region, "endpoint": endpoint, "virt": "pv", "root_store": "ebs"} | more


def product(version: str = "12.04", arch: str = "amd64", **versions: dict[str, Any]) -> dict[str, Any]:
    named = {name.lstrip("v"): {"items": items} for name, items in versions.items()}
    return {"version": version, "arch": arch, "versions": named}


def products(content: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    content = {PRECISE: product(v20130501={"a": item()})} if content is None else content
    return {"format": "products:1.0", "content_id": "c", "updated": DATE, "products": content} | more


def entry(*ids: str, **more: Any) -> dict[str, Any]:
    names = ids or (PRECISE,)
    return {"format": "products:1.0", "datatype": "image-ids", "path": PRODUCTS, "products": list(names)} | more


def index(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"content-{number}": one for number, one in enumerate(entries or (entry(),))}
    return {"format": "index:1.0", "updated": DATE, "index": named} | more


def tree(the_index: Any = None, the_products: Any = None, **others: Any) -> dict[str, bytes]:
    """Documents by path: an index, a products file, and others by their bare name (``mirrors``)."""
    documents = {INDEX: index() if the_index is None else the_index}
    documents[PRODUCTS] = products() if the_products is None else the_products
    documents |= {f"streams/v1/{name}.json": value for name, value in others.items()}
    return {path: v if isinstance(v, bytes) else json.dumps(v).encode() for path, v in documents.items()}


def source(documents: dict[str, bytes] | None = None, name: str = "memory") -> MemorySource:
    return MemorySource(tree() if documents is None else documents, name, f"test://{name}")


class Key(NamedTuple):
    private: bytes
    public: bytes


def key(name: str = "catalogue") -> Key:
    """A key pair of its own for each name, made once a run."""
    return _made(name)


@cache
def _made(name: str) -> Key:
    home = tempfile.mkdtemp(prefix="mistify-test-gpg-")
    gpg = ["gpg", "--homedir", home, "--batch", "--pinentry-mode", "loopback", "--passphrase", ""]
    try:
        make = [*gpg, "--quick-generate-key", f"{name} <{name}@example.org>", "ed25519", "sign", "never"]
        subprocess.run(make, check=True, capture_output=True, timeout=120)
        private, public = (
            subprocess.run([*gpg, "--armor", how], check=True, capture_output=True, timeout=120).stdout
            for how in ("--export-secret-keys", "--export")
        )
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False, timeout=60, capture_output=True)
        shutil.rmtree(Path(home), ignore_errors=True)
    return Key(private, public)


def signed(documents: dict[str, bytes], name: str = "catalogue", *, keep_unsigned: bool = True) -> dict[str, bytes]:
    """The same documents with their signed twins, whose index names signed products."""
    with Signer(key(name).private) as signer:
        made = {
            path.replace(".json", ".sjson"): signer.clearsign(data.replace(b"products.json", b"products.sjson"))
            for path, data in documents.items()
        }
    return {**(documents if keep_unsigned else {}), **made}
