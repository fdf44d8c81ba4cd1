"""The lock of changes: shared by those that add, alone for those that move or remove."""

from __future__ import annotations

import threading

import pytest

from agent_image.drivers.zfs import locking
from agent_image.drivers.zfs.locking import ChangeLock
from imaging.errors import UnavailableError
from tests.waiting import wait_until

BOUND_S = 60.0


def test_several_share_it_at_once() -> None:
    lock, inside = ChangeLock(), threading.Barrier(4)

    def share() -> None:
        with lock.shared():
            inside.wait(BOUND_S)  # passes only when all four are in

    threads = [threading.Thread(target=share) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert not inside.broken


def is_taken(lock: ChangeLock) -> bool:
    """Whether somebody waits to have it alone, or has it."""
    if not lock._alone.acquire(blocking=False):
        return True
    lock._alone.release()
    return False


def test_who_has_it_alone_waits_for_those_who_share_and_goes_before_the_next() -> None:
    lock, order = ChangeLock(), list[str]()
    sharing, leave = threading.Event(), threading.Event()

    def first() -> None:
        with lock.shared():
            sharing.set()
            leave.wait(BOUND_S)
            order.append("first")

    def alone() -> None:
        with lock:
            order.append("alone")

    def second() -> None:
        with lock.shared():
            order.append("second")

    threads = [threading.Thread(target=target) for target in (first, alone, second)]
    threads[0].start()
    assert sharing.wait(BOUND_S)
    threads[1].start()
    wait_until(lambda: is_taken(lock), "the one alone to be waiting")
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(BOUND_S)
    assert order == ["first", "alone", "second"]


def test_alone_may_be_nested_and_errors_let_go() -> None:
    lock = ChangeLock()
    with pytest.raises(ValueError, match="inside"), lock, lock:
        raise ValueError("inside")
    with pytest.raises(ValueError, match="sharing"), lock.shared():
        raise ValueError("sharing")
    taken: list[bool] = []

    def take() -> None:
        with lock:
            taken.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(BOUND_S)
    assert taken == [True]


@pytest.mark.parametrize("waits_to_share", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_waiting_that_is_in_vain_ends(
    monkeypatch: pytest.MonkeyPatch, *, waits_to_share: bool, is_shared: bool
) -> None:
    monkeypatch.setattr(locking, "LOOK_S", 0.01)
    hopeless, holds, done = threading.Event(), threading.Event(), threading.Event()

    def look() -> None:
        if hopeless.is_set():
            raise UnavailableError("the pool is suspended")

    lock = ChangeLock(look)

    def hold() -> None:
        with lock.shared() if is_shared else lock:
            holds.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(60)
    hopeless.set()
    if waits_to_share and is_shared:
        with lock.shared():  # nobody waits for anybody
            pass
    else:
        with pytest.raises(UnavailableError), lock.shared() if waits_to_share else lock:
            pytest.fail("it was had twice")
    done.set()
    holder.join()
    with lock:
        assert hopeless.is_set()
