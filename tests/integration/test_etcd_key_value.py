"""EtcdKeyValue keeps the KeyValue contract on a real cluster of three nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from demo.servers.etcd import EtcdCluster, etcd_cluster
from imaging.kv.base import KeyValue
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_client import EtcdSettings
from tests.contracts.key_value import KeyValueContract

pytestmark = pytest.mark.backend("etcd")

_names = itertools.count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


class TestEtcdKeyValue(KeyValueContract):
    @pytest.fixture
    def make(self, cluster: EtcdCluster) -> Callable[[], KeyValue]:
        settings = EtcdSettings(cluster.endpoints, prefix=f"/test{next(_names)}/")
        return lambda: EtcdKeyValue(settings)
