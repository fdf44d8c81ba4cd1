"""etcd without a quorum: changes are refused at once, what is known can be read, and everything goes on by itself afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import call, download, fetch, post, sha256, upload, wait_for
from tests.cluster.world import Site, Stores, wait
from tests.fakes.source_server import Source, SourceServer

pytestmark = pytest.mark.backend("etcd", "s3")

DATA = random.Random(12).randbytes(300_000)


@pytest.fixture(params=["killed", "paused"])
def losing(request: pytest.FixtureRequest, stores: Stores) -> Iterator[str]:
    yield request.param
    stores.etcd.heal()


def _lose_quorum(stores: Stores, how: str) -> None:
    """Two of three nodes go, the leader among them."""
    leader = wait(stores.etcd.leader, "a leader")
    assert leader is not None
    follower = next(node for node in stores.etcd.nodes if node is not leader)
    for node in (leader, follower):
        node.process.kill() if how == "killed" else node.process.pause()


def _refuses(replica: Daemon, method: str, path: str, **arguments: object) -> bool:
    answer = call(replica, method, path, **arguments)
    if answer.status_code == 503:
        assert int(answer.headers["Retry-After"]) > 0
        return True
    return False


def test_service_without_a_quorum_refuses_changes_at_once_and_goes_on_reading(
    site: Site, sources: SourceServer, losing: str
) -> None:
    replica = site.replica("first")
    source = Source(DATA, hold_after=1000)
    kept, doomed = upload(replica, DATA), upload(replica, b"doomed")
    begun = fetch(replica, sources.add("/begun", source))
    assert source.holding.wait(60)
    _lose_quorum(site.stores, losing)
    wait(lambda: _refuses(replica, "DELETE", f"/images/{doomed['id']}"), "the loss to be noticed")
    # At once: the body of an upload is not even asked for, and no call waits for the patience of the one before.
    headers = {"X-Image-Type": "kvm", "Expect": "100-continue"}
    changes = [
        lambda: _refuses(replica, "PUT", "/images", data=DATA, headers=headers),
        lambda: _refuses(replica, "POST", "/images", json={"source": sources.url + "/other", "type": "kvm"}),
        lambda: _refuses(replica, "DELETE", f"/images/{doomed['id']}"),
        lambda: _refuses(replica, "POST", "/uploads", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "5"} | _KVM),
    ]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda change: change(), changes * 10))
    assert download(replica, kept["id"]).content == DATA
    assert call(replica, "GET", f"/blobs/{kept['digest']}").content == DATA
    assert call(replica, "GET", f"/images/{kept['id']}").json()["digest"] == kept["digest"]
    assert {record["id"] for record in call(replica, "GET", "/images").json()} == {
        kept["id"],
        doomed["id"],
        begun["id"],
    }
    site.stores.etcd.heal()
    source.go.set()
    assert wait_for(replica, begun["id"], "complete")["digest"] == sha256(DATA)
    wait(lambda: post(replica, sources.add("/late", Source(b"late"))).status_code == 202, "changes to go on")
    assert call(replica, "DELETE", f"/images/{doomed['id']}").status_code == 200
    assert upload(replica, b"again")["digest"] == sha256(b"again")


_KVM = {"Upload-Metadata": "type a3Zt"}
