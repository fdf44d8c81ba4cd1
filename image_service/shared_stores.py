"""Stores that several replicas share: records in etcd, images in S3, from the tables of a configuration file.

A password or secret key is given as a value or, better, as the path of a file that holds it (``password_file``,
``secret_key_file``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from imaging.blobs.base import BlobStore
from imaging.errors import BadDataError, InvalidArgumentError, UnsupportedError
from imaging.files import os_errors
from imaging.kv.base import KeyValue
from imaging.kv.etcd import EtcdKeyValue
from imaging.kv.etcd_client import EtcdSettings

DEFAULT_PREFIX = "/mistify/"
"""In front of every key in etcd, when nobody says otherwise: a cluster is often shared."""

REDIRECT_MAX_S = 7 * 86400
"""S3 signs no address for longer."""

SECRET_MAX_BYTES = 4096
"""A longer secret is some other file."""


class _ClientConfig(msgspec.Struct, rename="camel"):
    cert_file: str = ""
    key_file: str = ""
    ca_cert_files: list[str] = msgspec.field(default_factory=list)


class _Cluster(msgspec.Struct):
    machines: list[str] = msgspec.field(default_factory=list)


class _ClientFile(msgspec.Struct):
    """What ``filepath`` names: the state that the original's etcd client saved."""

    config: _ClientConfig = msgspec.field(default_factory=_ClientConfig)
    cluster: _Cluster = msgspec.field(default_factory=_Cluster)


def optional_text(config: Mapping[str, Any], *keys: str) -> str:
    """The first of the keys that is there, a string; empty if none is."""
    for key in keys:
        value = config.get(key)
        if value is not None and not isinstance(value, str):
            raise InvalidArgumentError(f"{key!r} must be a string")
        if value:
            return value
    return ""


def secret(config: Mapping[str, Any], key: str) -> str:
    """A secret, given itself or by the file that holds it."""
    path = optional_text(config, f"{key}_file")
    if not path:
        return optional_text(config, key)
    with os_errors(f"cannot read the secret in {path}"), Path(path).open("rb") as file:
        data = file.read(SECRET_MAX_BYTES + 1)
    if len(data) > SECRET_MAX_BYTES:
        raise InvalidArgumentError(f"a secret has at most {SECRET_MAX_BYTES} bytes: {path}")
    return data.decode(errors="surrogateescape").strip()


def _machines(config: Mapping[str, Any]) -> Sequence[str]:
    machines = config.get("machines") or []
    if isinstance(machines, str):
        machines = [part.strip() for part in machines.split(",") if part.strip()]
    if not isinstance(machines, list) or not all(isinstance(machine, str) for machine in machines):
        raise InvalidArgumentError("'machines' must be a list of addresses")
    return machines


def _client_file(config: Mapping[str, Any]) -> _ClientFile:
    path = optional_text(config, "filepath")
    if not path:
        return _ClientFile()
    with os_errors(f"cannot read the etcd client file {path}"):
        data = Path(path).read_bytes()
    try:
        return msgspec.json.decode(data, type=_ClientFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise BadDataError(f"not an etcd client file: {path}") from err


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{key!r} must be true or false")
    return value


def etcd_settings(config: Mapping[str, Any]) -> EtcdSettings:
    """``metadataStoreConfig`` of type ``etcd``: the original's keys and ours; InvalidArgumentError says what does not fit."""
    saved = _client_file(config)
    endpoints = tuple(_machines(config) or saved.cluster.machines)
    if not endpoints:
        raise InvalidArgumentError("metadataStoreConfig needs 'machines', a list of addresses, or 'filepath'")
    ca_files = saved.config.ca_cert_files
    return EtcdSettings(
        endpoints=endpoints,
        prefix=str(config.get("prefix") or DEFAULT_PREFIX).rstrip("/") + "/",
        ca_file=optional_text(config, "caCert", "cacert") or (ca_files[0] if ca_files else None),
        cert_file=optional_text(config, "cert") or saved.config.cert_file or None,
        key_file=optional_text(config, "key") or saved.config.key_file or None,
        user=optional_text(config, "user"),
        password=secret(config, "password"),
        stale_gets=_flag(config, "stale_reads", default=True),
    )


def open_etcd(config: Mapping[str, Any]) -> KeyValue:
    """The records' engine in etcd; UnavailableError if no node answers."""
    store = EtcdKeyValue(etcd_settings(config))
    try:
        store.list(limit=1)  # a wrong address, certificate or password is told now, not at the first request
    except BaseException:
        store.close()
        raise
    return store


def open_s3(config: Mapping[str, Any]) -> BlobStore:
    """The image store in a bucket; the bucket must exist."""
    try:
        # boto3 is in the extra s3: a service on local files does without it.
        from imaging.blobs.s3 import S3BlobStore  # noqa: PLC0415
        from imaging.blobs.s3_bucket import S3Settings  # noqa: PLC0415
        from imaging.blobs.s3_ingest import PART_SIZE_BYTES, PARTS_MAX, PartLimits  # noqa: PLC0415
    except ImportError as err:
        raise UnsupportedError("the image store type s3 needs boto3: install the extra s3") from err
    bucket = optional_text(config, "bucket")
    if not bucket:
        raise InvalidArgumentError("imageStoreConfig needs 'bucket', a non-empty string")
    settings = S3Settings(
        bucket=bucket,
        endpoint=optional_text(config, "endpoint") or None,
        region=optional_text(config, "region") or "us-east-1",
        access_key=optional_text(config, "access_key") or None,
        secret_key=secret(config, "secret_key") or None,
        prefix=optional_text(config, "prefix"),
        ca_file=optional_text(config, "caCert", "cacert") or None,
        path_style=_flag(config, "path_style", default=True),
    )
    limits = PartLimits(
        _count(config, "part_size_bytes", PART_SIZE_BYTES),
        _count(config, "parts_max", PARTS_MAX),
    )
    redirect_s = _count(config, "redirect_s", 0, least=0)
    if redirect_s > REDIRECT_MAX_S:
        raise InvalidArgumentError(f"'redirect_s' is at most {REDIRECT_MAX_S}")
    store = S3BlobStore(settings, parts=limits, redirect_s=redirect_s)
    try:
        store.leases()  # a wrong address, key or bucket is told now
    except BaseException:
        store.close()
        raise
    return store


def _count(config: Mapping[str, Any], key: str, default: int, *, least: int = 1) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(f"{key!r} must be a whole number above {least - 1}")
    return value
