"""The contract suite of StorageDriver: what every driver must do, as tests.

To run it on a driver, subclass and give two fixtures::

    class TestMyDriver(StorageDriverContract):
        @pytest.fixture
        def driver(self, ...):          # opened, on a pool of at least POOL_BYTES; may be shared by tests
            ...
        @pytest.fixture
        def rival(self, driver, ...):   # another one for the same pool, not opened
            ...

Each test works below a filesystem of its own (``place``) which is destroyed afterwards. What ZFS does a little later than the call
(usage after a txg, links of devices) is waited for; sizes are compared within what metadata and padding may add.
"""

from tests.contracts.storage_driver_content import ContentRules
from tests.contracts.storage_driver_datasets import DatasetRules
from tests.contracts.storage_driver_destroying import DestroyingRules
from tests.contracts.storage_driver_names import NameRules
from tests.contracts.storage_driver_resume import ResumeRules
from tests.contracts.storage_driver_snapshots import SnapshotRules
from tests.contracts.storage_driver_space import SpaceRules
from tests.contracts.storage_driver_streams import StreamRules


class StorageDriverContract(
    NameRules, DatasetRules, DestroyingRules, SnapshotRules, ContentRules, StreamRules, ResumeRules, SpaceRules
):
    """Every rule of the contract."""
