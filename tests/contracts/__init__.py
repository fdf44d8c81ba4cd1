"""One suite per contract. A new implementation runs it by subclassing, in ten lines; the suites need nothing of ours but the contract."""

from pathlib import Path

import pytest

# Assertions of these modules are shown with their values, as in any test module.
pytest.register_assert_rewrite(
    *(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
)
