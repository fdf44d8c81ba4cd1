"""What two replicas have in common: the quota, labels and the catalogue, derived images, collecting; and nothing on their own disks."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import call, download, upload
from tests.cluster.world import Site, wait

pytestmark = pytest.mark.backend("etcd", "s3")

MIB = 1 << 20
DISK = random.Random(8).randbytes(MIB) + bytes(3 * MIB)


def _put(replica: Daemon, data: object) -> int:
    return call(replica, "PUT", "/images", data=data, headers={"X-Image-Type": "kvm"}).status_code


def test_two_uploads_that_fit_the_quota_only_singly_are_not_both_let_in(site: Site) -> None:
    replicas = [site.replica(name, quota_bytes=3 * MIB) for name in ("first", "second")]
    contents = [random.Random(number).randbytes(2 * MIB) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: _put(replicas[number % 2], contents[number]), range(4)))
    assert sorted(answers) == [200, 507, 507, 507]
    (kept,) = call(replicas[0], "GET", "/images").json()
    assert _put(replicas[1], random.Random(9).randbytes(MIB // 2)) == 200
    assert _put(replicas[0], iter([random.Random(10).randbytes(MIB)])) == 507, "a length nobody knew"
    assert call(replicas[1], "DELETE", f"/images/{kept['id']}").status_code == 200
    assert _put(replicas[0], contents[3]) == 200


def test_room_of_an_upload_whose_replica_was_killed_is_free_again(site: Site) -> None:
    first, second = (site.replica(name, quota_bytes=3 * MIB) for name in ("first", "second"))
    held = iter([bytes(MIB)])

    def body() -> object:
        yield next(held)
        wait(lambda: first.process is not None and first.process.poll() is not None, "the end")
        yield b""

    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(_put, first, body())
        wait(lambda: site.bucket().list("ingest/"), "the upload to begin")
        wait(lambda: site.records().engine.list("quota/"), "room to be reserved")
        first.kill()
        assert broken.exception() is not None
    wait(lambda: _put(second, random.Random(11).randbytes(2 * MIB + 5)) == 200, "its room to be free")


def test_labels_and_catalogue_are_the_same_on_both_replicas_and_survive_a_wiped_one(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    record = upload(first, DISK)
    path = f"/catalog/images/{record['id']}"
    labels = {"os": "debian", "release": "trixie", "aliases": ["deb"]}
    assert call(first, "PUT", path, json=labels).status_code == 200
    assert call(second, "GET", path).json()["os"] == "debian"
    index = call(first, "GET", "/streams/v1/index.json").json()
    (products,) = {entry["path"] for entry in index["index"].values() if entry["datatype"] == "image-downloads"}
    document = call(second, "GET", f"/{products}")
    assert document.status_code == 200, "the second replica never gave an index"
    assert document.content == call(first, "GET", f"/{products}").content
    first.kill()
    shutil.rmtree(site.directory / "first")
    first.start()
    assert call(first, "GET", path).json()["aliases"] == ["deb"]
    assert call(first, "GET", f"/{products}").content == document.content
    assert download(first, record["id"]).content == DISK


def test_derived_image_is_made_once_for_both_replicas(site: Site) -> None:
    replicas = [site.replica("first"), site.replica("second")]
    record = upload(replicas[0], DISK)
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(
                lambda number: call(replicas[number % 2], "GET", f"/images/{record['id']}/download?compression=zstd"),
                range(4),
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum(replica.log().count("image derived") for replica in replicas) == 1


def test_collection_runs_in_one_replica_at_a_time_and_keeps_what_the_other_needs(site: Site) -> None:
    first, second = site.replica("first"), site.replica("second")
    record = upload(first, DISK)
    with site.records().replica.acquire("collect"):
        refused = call(first, "POST", "/upkeep/collect")
        assert (refused.status_code, "held" in refused.json()["message"]) == (409, True)
    for replica in (first, second):
        report = call(replica, "POST", "/upkeep/collect").json()
        assert (report["blobs"], report["kept"]) == ([], 1)
    assert download(second, record["id"]).content == DISK
    assert call(second, "POST", "/upkeep/scrub").status_code == 202
    wait(lambda: call(first, "GET", "/upkeep/scrub").json()["checked"] == 1, "the scrub to be seen elsewhere")


def test_download_is_redirected_to_the_bucket_if_the_operator_wants_it(site: Site) -> None:
    replica = site.replica("first", images={"redirect_s": 300})
    record = upload(replica, DISK)
    path = f"/images/{record['id']}/download"
    answer = call(replica, "GET", path)
    assert (answer.status_code, answer.headers["Cache-Control"], answer.content) == (307, "no-store", b"")
    assert answer.headers["X-Image-Digest"] == record["digest"]
    assert answer.headers["Location"].startswith(site.stores.s3.endpoint)
    followed = call(replica, "GET", path, allow_redirects=True)
    assert (followed.status_code, followed.content) == (200, DISK)
    part = call(replica, "GET", path, allow_redirects=True, headers={"Range": "bytes=5-104"})
    assert (part.status_code, part.content) == (206, DISK[5:105])
    assert call(replica, "HEAD", path).headers["Content-Length"] == str(len(DISK))
    assert call(replica, "GET", path, headers={"If-None-Match": f'"{record["digest"]}"'}).status_code == 304
    assert call(replica, "GET", path, headers={"Range": f"bytes={len(DISK)}-"}).status_code == 416
