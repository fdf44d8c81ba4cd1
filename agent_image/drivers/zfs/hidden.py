"""Datasets the driver makes for itself: streams on their way in, clones that show a snapshot's bytes.

They are named ``.mistify-<purpose>-<id>`` beside the dataset they serve, carry the id also in a user property, and never appear in
answers. Start-up repair destroys only what has such a name AND the same id in that property: a foreign dataset, whatever its name, is not
ours to touch.
"""

from __future__ import annotations

import re
import secrets
from enum import StrEnum

from agent_image.drivers.base import DatasetInfo
from imaging.names import DatasetName

MARK = "mistify.driver:temporary"
"""The user property that proves a temporary dataset is ours; it stays on a received dataset after its rename, meaning nothing there."""
PREFIX = ".mistify-"
ID_BYTES = 8
"""64 random bits: two never meet."""
_NAME = re.compile(r"\.mistify-(?:receive|view)-([0-9a-f]{16})\Z")


class Purpose(StrEnum):
    """What a temporary dataset is for."""

    RECEIVE = "receive"
    VIEW = "view"


def new_name(beside: DatasetName, purpose: Purpose) -> tuple[DatasetName, dict[str, str]]:
    """A fresh name in the same place as ``beside``, and the properties that mark the dataset as ours."""
    identity = secrets.token_hex(ID_BYTES)
    parent = beside.parent or beside
    return DatasetName((*parent.parts, f"{PREFIX}{purpose}-{identity}")), {MARK: identity}


def is_hidden(name: DatasetName) -> bool:
    """Whether the name is of this kind or below one."""
    return any(part.startswith(PREFIX) for part in name.parts)


def is_ours(info: DatasetInfo) -> bool:
    """Whether the dataset is a temporary one of ours beyond doubt."""
    found = _NAME.match(info.name.leaf)
    return found is not None and info.properties.get(MARK) == found.group(1)


def without_mark(properties: dict[str, str]) -> dict[str, str]:
    """Properties as callers see them."""
    return {name: value for name, value in properties.items() if name != MARK}
