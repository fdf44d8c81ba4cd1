"""etcd with TLS, client certificates, users and passwords, on a real node."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import urllib3

from demo.servers.etcd import EtcdCluster, etcd_cluster
from imaging.errors import NotPermittedError, UnavailableError
from imaging.kv.base import put
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_client import EtcdSettings
from imaging.kv.etcd_watch import EtcdWatch
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("etcd")

USER, PASSWORD = "images", "correct horse"
TOKEN_LIFE_S = 2


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=120)


def _certificate(directory: Path, name: str, subject: str) -> None:
    """A key and a certificate for loopback, signed by the directory's authority."""
    key, request, cert = (str(directory / f"{name}.{end}") for end in ("key", "csr", "pem"))
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", subject)
    extensions = directory / f"{name}.ext"
    extensions.write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    authority = ["-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca.key"), "-CAcreateserial"]
    _openssl("x509", "-req", "-in", request, *authority, "-days", "2", "-out", cert, "-extfile", str(extensions))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    _openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test authority"),
        *("-keyout", str(directory / "ca.key"), "-out", str(directory / "ca.pem")),
    )
    _certificate(directory, "server", "/CN=127.0.0.1")
    _certificate(directory, "client", "/O=images")  # without a CN: with one, the gateway refuses it beside a password
    return directory


def _enable_users(cluster: EtcdCluster, pools: urllib3.PoolManager) -> None:
    """As an operator does: a root, and a user that may read and write one prefix."""

    def call(path: str, **body: object) -> None:
        answer = pools.request("POST", f"{cluster.endpoints[0]}/v3/auth/{path}", json=body, timeout=30.0)
        assert answer.status == 200, answer.data

    call("user/add", name="root", password="root password")
    call("role/add", name="root")
    call("user/grant", user="root", role="root")
    call("user/add", name=USER, password=PASSWORD)
    call("role/add", name="images")
    both = {"permType": "READWRITE", "key": "L2ltYWdlcy8=", "range_end": "L2ltYWdlczA="}  # /images/ to /images0
    call("role/grant", name="images", perm=both)
    call("user/grant", user=USER, role="images")
    call("enable")


@pytest.fixture(scope="module")
def cluster(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    def pools() -> urllib3.PoolManager:
        return urllib3.PoolManager(
            ca_certs=str(pki / "ca.pem"), cert_file=str(pki / "client.pem"), key_file=str(pki / "client.key")
        )

    more = [
        f"--cert-file={pki / 'server.pem'}",
        f"--key-file={pki / 'server.key'}",
        "--client-cert-auth",
        f"--trusted-ca-file={pki / 'ca.pem'}",
        f"--auth-token-ttl={TOKEN_LIFE_S}",
    ]
    directory = tmp_path_factory.mktemp("etcd")
    with etcd_cluster(directory, size=1, scheme="https", more=more, make_pools=pools) as cluster:
        _enable_users(cluster, pools())
        yield cluster


@pytest.fixture
def settings(cluster: EtcdCluster, pki: Path) -> EtcdSettings:
    return EtcdSettings(
        cluster.endpoints,
        prefix="/images/",
        ca_file=str(pki / "ca.pem"),
        cert_file=str(pki / "client.pem"),
        key_file=str(pki / "client.key"),
        user=USER,
        password=PASSWORD,
    )


def test_user_with_certificate_and_password_may_do_its_work(settings: EtcdSettings) -> None:
    with EtcdKeyValue(settings) as store:
        revision = put(store, "key", b"value")
        assert [(entry.key, entry.revision) for entry in store.list()] == [("key", revision)]
        with EtcdWatch(store, "", after_revision=revision - 1) as watch:
            assert next(watch.changes())[0].key == "key"


def test_token_that_ran_out_is_renewed(settings: EtcdSettings) -> None:
    with EtcdKeyValue(settings) as store:
        put(store, "before", b"")
        old = store.client.token

        def renewed() -> bool:
            put(store, "after", b"")
            return store.client.token != old

        wait_until(
            renewed, "a new token", timeout_s=120.0, poll_s=2 * TOKEN_LIFE_S
        )  # each use lets the old one live longer
        assert store.get("before") is not None


def test_wrong_password_is_not_permitted(settings: EtcdSettings) -> None:
    with EtcdKeyValue(replace(settings, password="wrong")) as store, pytest.raises(NotPermittedError):
        store.get("key")


def test_no_password_is_not_permitted(settings: EtcdSettings) -> None:
    with EtcdKeyValue(replace(settings, user="", password="")) as store, pytest.raises(NotPermittedError):
        put(store, "key", b"")


def test_other_prefix_is_not_permitted(settings: EtcdSettings) -> None:
    with EtcdKeyValue(replace(settings, prefix="/other/")) as store, pytest.raises(NotPermittedError):
        put(store, "key", b"")


def test_server_that_the_authority_did_not_sign_is_not_spoken_to(settings: EtcdSettings, pki: Path) -> None:
    stranger = replace(settings, ca_file=str(pki / "client.pem"), patience_s=0.5)
    with EtcdKeyValue(stranger) as store, pytest.raises(UnavailableError):
        store.get("key")


def test_client_without_a_certificate_is_not_let_in(settings: EtcdSettings) -> None:
    bare = replace(settings, cert_file=None, key_file=None, patience_s=0.5)
    with EtcdKeyValue(bare) as store, pytest.raises(UnavailableError):
        store.get("key")
