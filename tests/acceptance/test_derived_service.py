"""Derived images and chunk lists over HTTP: forms, conditions, ranges, errors, crashes."""

from __future__ import annotations

import hashlib
import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from imaging.compression import open_decompressed
from tests.acceptance.daemons import CALL_TIMEOUT_S, Daemon, start_image_service
from tests.acceptance.image_service_calls import call, sha256, stored_files, upload
from tests.codec import samples
from tests.fakes.derive_world import received
from tests.fakes.disk_files import BLOCK_BYTES, changed, disk_bytes, qcow2
from tests.waiting import wait_until

OLD = disk_bytes(1, 400)
NEW = changed(OLD, 3, 40, 350)


@pytest.fixture(scope="module")
def ids(service: Daemon, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The old disk as raw, the new one as qcow2, the old one's stream."""
    old = upload(service, OLD)["id"]
    new = upload(service, qcow2(tmp_path_factory.mktemp("qcow2"), NEW, "-c"))["id"]
    stream = upload(service, get(service, old, format="zvol", compression="gzip").content)["id"]
    return {"old": old, "new": new, "stream": stream}


def ask(service: Daemon, image_id: str, what: str = "download", headers: Any = None, **query: str) -> requests.Response:
    named = {"from" if name == "base" else name: value for name, value in query.items()}
    path = f"/images/{image_id}/{what}"
    return requests.get(service.url + path, params=named, headers=headers, timeout=CALL_TIMEOUT_S)


def get(service: Daemon, image_id: str, **query: str) -> requests.Response:
    response = ask(service, image_id, **query)
    assert response.status_code == 200, response.text
    assert response.headers["X-Image-Digest"] == sha256(response.content)
    return response


def test_download_in_every_form_gives_the_disk(service: Daemon, ids: dict[str, str], tmp_path: Path) -> None:
    for name, disk in (("old", OLD), ("new", NEW), ("stream", OLD)):
        for compression in ("zstd", "gzip", "none"):
            stream = get(service, ids[name], format="zvol", compression=compression).content
            assert received(tmp_path / "volume", stream)[0] == disk, (name, compression)
        raw = get(service, ids[name], format="raw", compression="zstd").content
        assert open_decompressed(io.BytesIO(raw)).read() == disk
    assert get(service, ids["old"], format="raw").content == OLD


@pytest.mark.parametrize("name", ["old", "new", "stream"])
def test_every_form_can_be_brought_back_and_is_the_same_image(service: Daemon, ids: dict[str, str], name: str) -> None:
    record = call(service, "GET", f"/images/{ids[name]}").json()
    forms: list[dict[str, str]] = [{}]
    forms += [
        {"format": kind, "compression": packing} for kind in ("zvol", "raw") for packing in ("zstd", "gzip", "none")
    ]
    for form in forms:
        back = upload(service, get(service, ids[name], **form).content)
        assert (back["content_digest"], back["virtual_size"]) == (record["content_digest"], record["virtual_size"]), (
            form
        )
        assert ids[name] in call(service, "GET", f"/images/{back['id']}").json()["same_as"], form
        call(service, "DELETE", f"/images/{back['id']}")


def test_increment_over_http_makes_the_new_disk(service: Daemon, ids: dict[str, str], tmp_path: Path) -> None:
    for base in ("old", "stream"):
        full = get(service, ids[base], format="zvol").content
        increment = get(service, ids["new"], base=ids[base], compression="none").content
        assert received(tmp_path / "volume", full, increment)[0] == NEW
        assert len(increment) < 8 * BLOCK_BYTES


def test_derived_form_answers_conditions_and_ranges(service: Daemon, ids: dict[str, str]) -> None:
    whole = get(service, ids["new"], format="zvol")
    tag, data = whole.headers["ETag"], whole.content
    part = ask(service, ids["new"], headers={"Range": "bytes=100-299", "If-Range": tag}, format="zvol")
    assert (part.status_code, part.content) == (206, data[100:300])
    assert part.headers["Content-Range"] == f"bytes 100-299/{len(data)}"
    assert ask(service, ids["new"], headers={"Range": f"bytes={len(data)}-"}, format="zvol").status_code == 416
    assert ask(service, ids["new"], headers={"If-None-Match": tag}, format="zvol").status_code == 304
    assert ask(service, ids["new"], headers={"If-Match": '"other"'}, format="zvol").status_code == 412
    head = call(service, "HEAD", f"/images/{ids['new']}/download?format=zvol")
    assert (head.headers["ETag"], int(head.headers["Content-Length"])) == (tag, len(data))


@pytest.mark.parametrize("query", [{}, {"format": "zvol"}, {"format": "zvol", "compression": "none"}, {"base": "old"}])
def test_chunks_cover_exactly_what_the_download_serves(
    service: Daemon, ids: dict[str, str], query: dict[str, str]
) -> None:
    named = query | ({"base": ids["old"]} if "base" in query else {})
    whole, answer = get(service, ids["new"], **named), ask(service, ids["new"], "chunks", **named)
    assert answer.status_code == 200, answer.text
    assert answer.headers["ETag"] == whole.headers["ETag"]
    assert answer.headers["X-Image-Digest"] == sha256(whole.content)
    offset = 0
    for chunk in answer.json():
        assert chunk["offset"] == offset
        piece = whole.content[offset : offset + chunk["length"]]
        assert chunk["sha256"] == hashlib.sha256(piece).hexdigest()
        offset += len(piece)
    assert offset == len(whole.content)
    again = ask(service, ids["new"], "chunks", headers={"If-None-Match": answer.headers["ETag"]}, **named)
    assert (again.status_code, again.content) == (304, b"")
    packed = ask(service, ids["new"], "chunks", headers={"Accept": "application/octet-stream"}, **named)
    assert packed.content == b"".join(bytes.fromhex(chunk["sha256"]) for chunk in answer.json())
    assert int(packed.headers["X-Blob-Size"]) == offset
    assert int(packed.headers["X-Chunk-Size"]) == answer.json()[0]["length"] or len(answer.json()) == 1
    assert packed.headers["X-Image-Digest"] == answer.headers["X-Image-Digest"]


@pytest.mark.parametrize("what", ["download", "chunks"])
@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("format=vmdk", 400, "format must be zvol or raw"),
        ("compression=lz4", 400, "compression must be zstd, gzip or none"),
        ("format=raw&from=x", 400, "from names an older image"),
        ("from=", 400, "from names an older image"),
        ("format=raw&format=zvol", 400, "more than once"),
        ("format=zvol&from=absent", 404, "named by from"),
        ("format=zvol&from=%2e%2e%2fx", 404, "named by from"),
    ],
)
def test_bad_query_is_refused_in_clear_words(
    service: Daemon, ids: dict[str, str], what: str, query: str, status: int, words: str
) -> None:
    response = call(service, "GET", f"/images/{ids['old']}/{what}?{query}")
    assert (response.status_code, words in response.json()["message"]) == (status, True), response.text


def test_forms_of_an_image_that_is_not_here_or_no_disk_are_refused(service: Daemon, ids: dict[str, str]) -> None:
    assert ask(service, "absent", format="zvol").status_code == 404
    assert ask(service, "absent", "chunks").status_code == 404
    assert ask(service, ids["old"], base=ids["old"]).status_code == 400
    filesystem = upload(service, samples.load("fs-Lec"), image_type="container")["id"]
    refused = ask(service, filesystem, format="raw")
    assert (refused.status_code, "is no disk" in refused.json()["message"]) == (400, True), refused.text


def test_many_clients_of_a_new_form_get_one_derivation(service: Daemon) -> None:
    image_id = upload(service, disk_bytes(77, 300))["id"]
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda _: get(service, image_id, format="zvol").content, range(12)))
    assert len(set(answers)) == 1
    digest = hashlib.sha256(disk_bytes(77, 300)).hexdigest()
    made = [line for line in service.log().splitlines() if "image derived" in line and digest in line]
    assert len(made) == 1, made


def test_delete_of_an_image_takes_its_derived_forms_along(tmp_path: Path) -> None:
    with start_image_service(tmp_path / "state") as service:
        image_id = upload(service, OLD)["id"]
        get(service, image_id, format="zvol")
        assert len(stored_files(tmp_path / "state")) == 2
        assert call(service, "DELETE", f"/images/{image_id}").status_code == 200
        assert strays(tmp_path / "state", keep=0) == []
        assert ask(service, image_id, format="zvol").status_code == 404


def strays(state_dir: Path, *, keep: int) -> list[str]:
    """Files beyond the ``keep`` images that should be there, temporary files, leases."""
    images = state_dir / "images"
    others = [*images.glob("derive/*"), *images.glob("leases/*"), *images.glob("ingest/*")]
    blobs = list(images.glob("blobs/sha256/*/*"))
    return [str(path) for path in others] + [str(path) for path in blobs[keep:]]


@pytest.mark.slow
def test_service_killed_while_it_derives_leaves_nothing_stray(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    rng = random.Random(seed)
    data = [disk_bytes(number, 2000) for number in range(2)]
    with start_image_service(tmp_path / "state") as service:
        ids = [upload(service, disk)["id"] for disk in data]
        for _ in range(6):
            with ThreadPoolExecutor(2) as threads:
                asked = [threads.submit(_ask_and_fail, service, image_id) for image_id in ids]
                wait_until(lambda: len(stored_files(tmp_path / "state")) > 2 or rng.random() < 0.1, "a derivation")
                service.kill()
                assert all(one.result() for one in asked), seed
            service.start()
            wait_until(lambda: not strays(tmp_path / "state", keep=4), f"nothing stray, seed {seed}")
        for image_id, disk in zip(ids, data, strict=True):
            stream = get(service, image_id, format="zvol").content
            assert received(tmp_path / "volume", stream)[0] == disk, seed


def _ask_and_fail(service: Daemon, image_id: str) -> bool:
    """One request that may be cut off by the kill."""
    try:
        return ask(service, image_id, format="zvol", compression="gzip").status_code in {200, 503}
    except requests.RequestException:
        return True
