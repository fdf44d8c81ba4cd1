"""What is read out of a packed list of properties, and when the other way is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from agent_image.drivers.zfs import identity
from agent_image.drivers.zfs.identity import Identities, find_identity
from agent_image.drivers.zfs.programs import Identity
from imaging.sendstream.nvlist import NvList, encode_native

ONE = Identity(guid=(1 << 64) - 5, createtxg=77, creation_s=1_795_236_853)


def properties(one: Identity, **more: NvList) -> bytes:
    values: NvList = {"used": {"value": 4096}, "createtxg": {"value": one.createtxg}, "guid": {"value": one.guid}}
    return encode_native(values | {"creation": {"value": one.creation_s}} | more)


def test_numbers_are_found_among_all_properties() -> None:
    assert find_identity(properties(ONE)) == ONE


def test_list_without_one_of_them_says_nothing() -> None:
    assert find_identity(encode_native({"guid": {"value": 1}, "creation": {"value": 2}})) is None
    assert find_identity(b"") is None


def test_text_that_looks_like_a_property_is_none() -> None:
    """Text ends at its first zero, so it can't hold the head of a pair."""
    lure = encode_native({"org:lure": {"value": "guid value creation", "source": "createtxg"}})
    assert find_identity(lure) is None
    assert find_identity(properties(ONE, lure={"value": "guid"})) == ONE


class Asked:
    """The other way: knows some names, counts how often it is asked."""

    def __init__(self, known: Mapping[str, Identity]) -> None:
        self.known = known
        self.calls: list[list[str]] = []

    def __call__(self, names: Sequence[str]) -> Mapping[str, Identity]:
        self.calls.append(list(names))
        return {name: self.known[name] for name in names if name in self.known}


def test_kernel_that_is_not_understood_is_asked_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(25, "not a tty")

    monkeypatch.setattr("agent_image.drivers.zfs.identity.fcntl.ioctl", refuse)
    ask = Asked({"tank": ONE, "tank/v@s": ONE})
    identities = Identities(0, "tank", ask)
    assert identities.of(["tank/v@s"]) == {"tank/v@s": ONE}
    assert ask.calls == [["tank"], ["tank/v@s"]]


def test_few_are_asked_one_by_one_and_many_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Identities, name: str) -> Identity | None:
        return None if name.startswith("gone") else ONE

    monkeypatch.setattr(Identities, "_stats", answer)
    ask = Asked({"tank": ONE})
    identities = Identities(0, "tank", ask)
    assert identities.of(["tank/a", "gone"]) == {"tank/a": ONE}
    many = [f"tank/{number}" for number in range(identity.FEW + 1)]
    identities.of(many)
    assert ask.calls == [["tank"], ["gone"], many]
