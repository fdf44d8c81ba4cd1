"""What may be set on a dataset, checked in one place: user properties, ``readonly`` and ``quota``. Pure functions of records."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from agent_image.drivers.file_records import DatasetRecord
from imaging.errors import InvalidArgumentError, WrongKindError

PROPERTY_NAME_MAX_BYTES = 255
"""ZFS: ZAP_MAXNAMELEN less the NUL."""

PROPERTY_VALUE_MAX_BYTES = 8191
"""ZFS: ZAP_MAXVALUELEN less the NUL."""

_USER_PROPERTY = re.compile(r"(?!-)[a-z0-9:+._-]*:[a-z0-9:+._-]*\Z")


def with_properties(dataset: DatasetRecord, changes: Mapping[str, str | None]) -> DatasetRecord:
    """The dataset with these properties set (None: removed); InvalidArgumentError names the one that cannot be."""
    properties, quota_bytes = dict(dataset.properties), dataset.quota_bytes
    for name, value in changes.items():
        if name == "quota":
            quota_bytes = _quota(dataset, value)
        elif value is None:
            _check_name(name)
            properties.pop(name, None)
        else:
            properties[name] = _checked(name, value)
    return msgspec.structs.replace(dataset, properties=properties, quota_bytes=quota_bytes)


def _quota(dataset: DatasetRecord, value: str | None) -> int:
    if dataset.is_volume:
        raise WrongKindError("a volume has no quota")
    if value is None or value == "none":
        return 0
    if not re.fullmatch(r"[0-9]{1,19}", value):
        raise InvalidArgumentError(f"quota is not a number of bytes: {value[:64]!r}")
    return int(value)


def _check_name(name: str) -> None:
    if name != "readonly" and (not _USER_PROPERTY.match(name) or len(name) > PROPERTY_NAME_MAX_BYTES):
        raise InvalidArgumentError(f"not a property that can be set: {name[:PROPERTY_NAME_MAX_BYTES]!r}")


def _checked(name: str, value: str) -> str:
    _check_name(name)
    if name == "readonly" and value not in {"on", "off"}:
        raise InvalidArgumentError(f"readonly is on or off, not {value[:64]!r}")
    if "\0" in value or len(value.encode("utf-8", "replace")) > PROPERTY_VALUE_MAX_BYTES:
        raise InvalidArgumentError(f"value of property {name} has a NUL or more than {PROPERTY_VALUE_MAX_BYTES} bytes")
    return value
