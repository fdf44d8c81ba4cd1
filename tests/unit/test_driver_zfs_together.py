"""Calls that are made together, and errors that still reach the one they are meant for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from agent_image.drivers.zfs.together import Together
from imaging.errors import NotFoundError
from tests.waiting import wait_until

BOUND_S = 60.0


class Kernel:
    """Takes names; the first call waits until it is let go. Refuses all names of a call that has a bad one."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self, names: Sequence[str]) -> None:
        self.calls.append(list(names))
        self.entered.set()
        assert self.leave.wait(BOUND_S)
        if any("bad" in name for name in names):
            raise NotFoundError(f"{names} not found")


def start(together: Together, kernel: Kernel, first: str, others: list[list[str]]) -> list[Future[None]]:
    """The first call is under way, the others wait; then all end."""
    with ThreadPoolExecutor(1 + len(others)) as threads:
        futures = [threads.submit(together, [first])]
        assert kernel.entered.wait(BOUND_S)
        for count, names in enumerate(others, start=1):
            futures.append(threads.submit(together, names))
            wait_until(lambda count=count: len(together._waiting) == count, "the call to wait")  # type: ignore[misc]
        kernel.leave.set()
    return futures


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def together(kernel: Kernel) -> Together:
    return Together(kernel, key=lambda name: name.partition("@")[0])


def test_who_waits_meanwhile_goes_together(together: Together, kernel: Kernel) -> None:
    futures = start(together, kernel, "a@1", [["b@1"], ["c@1", "d@1"], ["e@1"]])
    assert [future.exception() for future in futures] == [None] * 4
    assert len(kernel.calls) == 2
    assert sorted(kernel.calls[1]) == ["b@1", "c@1", "d@1", "e@1"]


def test_names_of_one_dataset_never_go_together(together: Together, kernel: Kernel) -> None:
    futures = start(together, kernel, "a@1", [["b@1"], ["b@2"], ["c@1", "b@3"]])
    assert [future.exception() for future in futures] == [None] * 4
    assert all(len({name[0] for name in call}) == len(call) for call in kernel.calls)
    assert sorted(name for call in kernel.calls for name in call) == ["a@1", "b@1", "b@2", "b@3", "c@1"]


def test_refusal_reaches_only_the_one_it_is_meant_for(together: Together, kernel: Kernel) -> None:
    futures = start(together, kernel, "a@1", [["b@1"], ["bad@1"], ["c@1"]])
    outcomes = [type(future.exception()) for future in futures]
    assert outcomes == [type(None), type(None), NotFoundError, type(None)]
    assert {tuple(call) for call in kernel.calls[-3:]} == {("b@1",), ("bad@1",), ("c@1",)}


def test_call_goes_on_after_a_refusal(together: Together, kernel: Kernel) -> None:
    kernel.leave.set()
    with pytest.raises(NotFoundError):
        together(["bad@1"])
    together(["a@1"])
    assert kernel.calls == [["bad@1"], ["a@1"]]
