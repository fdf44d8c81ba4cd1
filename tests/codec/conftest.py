"""The codec's tests run once with numpy and once with the C extension, if that was built."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from imaging.sendstream import backend

BUILT = importlib.util.find_spec("imaging.sendstream.native") is not None
collect_ignore = [] if BUILT else ["test_native.py"]
_BOTH = ("test_checksum", "test_reader", "test_samples", "test_validator", "test_volume", "test_writer")


def pytest_report_header() -> str:
    return f"codec: {'numpy and the C extension' if BUILT else 'numpy only, the C extension was not built'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in _BOTH:
        names = ["numpy", "c"] if BUILT else ["numpy"]
        metafunc.parametrize("codec_backend", names, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def codec_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    wanted = getattr(request, "param", backend.name())
    with pytest.MonkeyPatch.context() as patch:
        if wanted == "numpy":
            patch.setattr(backend, "native", None)
        assert backend.name() == wanted
        yield wanted
