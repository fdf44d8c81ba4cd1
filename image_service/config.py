"""The image service's configuration: flags, ``MISTIFY_*``, and a file, either ours or the original's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from image_service.admission import AdmissionLimits
from image_service.catalog import CatalogSettings
from image_service.collector import GRACE_MIN_S, GRACE_S, INTERVAL_S
from image_service.derive_work import DeriveLimits
from image_service.facts import InspectionLimits
from image_service.fetcher import ConversationLimits
from image_service.importer import FetchLimits
from image_service.replica import TTL_S
from image_service.scrubbing import INTERVAL_S as SCRUB_INTERVAL_S
from image_service.sources import SourcePolicy
from image_service.uploads import UploadLimits
from image_service.web import WebLimits
from imaging.kv.leases import TTL_MIN_S

DEFAULT_PORT = 20_000
STATE_NAME = "mistify-image-service"

ORIGINAL_KEYS = {
    "imagestoretype": "image_store_type",
    "imagestoreconfig": "image_store_config",
    "metadatastoretype": "metadata_store_type",
    "metadatastoreconfig": "metadata_store_config",
    "port": "port",
}
"""The original's keys (it read them in any case) and the options they set."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Everything the composition root needs to know."""

    state_dir: Path
    image_store_type: str
    image_store_config: Mapping[str, Any]
    metadata_store_type: str
    metadata_store_config: Mapping[str, Any]
    policy: SourcePolicy
    conversation: ConversationLimits
    fetches: FetchLimits
    admission: AdmissionLimits
    derive: DeriveLimits
    inspection: InspectionLimits
    web: WebLimits
    lease_ttl_s: float
    collect_interval_s: float
    collect_grace_s: float
    uploads: UploadLimits
    scrub_interval_s: float
    catalog: CatalogSettings

    @property
    def images_dir(self) -> Path:
        """Where the ``fs`` image store is."""
        return Path(str(self.image_store_config.get("dir", "")))


def default_state_dir() -> Path:
    """Where state is kept if nobody says: the system's place for root, the user's place for others."""
    if os.geteuid() == 0:
        return Path("/var/lib") / STATE_NAME
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / STATE_NAME


def translate_original(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of the original's file as ours; other keys stay as they are."""
    return {ORIGINAL_KEYS.get(key.lower(), key): value for key, value in given.items()}


class _Table(click.ParamType[Mapping[str, Any]]):
    """A table of settings: from a file as it is, from a flag or the environment as JSON."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mapping[str, Any]:
        """The table, its keys as they were written."""
        try:
            table = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value[:80]!r} is not JSON", param, ctx)
        if not isinstance(table, dict):
            self.fail("must be a table of keys and values", param, ctx)
        return table


_DERIVE = DeriveLimits()


def _positive() -> click.FloatRange:
    return click.FloatRange(min=0, min_open=True)


_FETCH, _TALK, _ROOM, _WEB, _LOOK, _PARTS = (
    FetchLimits(),
    ConversationLimits(),
    AdmissionLimits(),
    WebLimits(),
    InspectionLimits(),
    UploadLimits(),
)

_OPTIONS = [
    click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_state_dir,
        show_default="/var/lib/mistify-image-service for root, else below ~/.local/state",
        envvar=["MISTIFY_STATE_DIR", "STATE_DIRECTORY"],
        help="Where records and images are kept, unless the stores are configured.",
    ),
    click.option("--image-store-type", default="fs", help="Registered name of the store of image data."),
    click.option("--image-store-config", type=_Table(), help="Its settings, as JSON; fs wants dir."),
    click.option("--metadata-store-type", default="kvite", help="Registered name of the store of records."),
    click.option("--metadata-store-config", type=_Table(), help="Its settings, as JSON; kvite wants filename."),
    click.option(
        "--allow-source-net",
        multiple=True,
        metavar="CIDR",
        help="Also fetch from addresses of this network. Repeatable. Public addresses are always allowed.",
    ),
    click.option(
        "--allow-private-sources", is_flag=True, help="Fetch from any address, private and loopback ones too."
    ),
    click.option("--fetches", type=click.IntRange(1, 256), default=_FETCH.fetches_max, help="Fetches at a time."),
    click.option(
        "--fetch-failures-max",
        type=click.IntRange(1, 100),
        default=_FETCH.failures_max,
        help="Failures in a row without progress before a fetch is given up.",
    ),
    click.option("--fetch-backoff-s", type=_positive(), default=_FETCH.backoff_s, help="Pause before the second try."),
    click.option("--fetch-timeout-s", type=_positive(), default=_FETCH.total_timeout_s, help="Limit on a whole fetch."),
    click.option(
        "--fetch-checkpoint-s",
        type=_positive(),
        default=_FETCH.checkpoint_s,
        help="How often progress is made durable.",
    ),
    click.option(
        "--connect-timeout-s",
        type=_positive(),
        default=_TALK.connect_timeout_s,
        help="Limit on connecting to a source.",
    ),
    click.option(
        "--fetch-stall-timeout-s",
        type=_positive(),
        default=_TALK.stall_timeout_s,
        help="A source that sends nothing for so long is given up and tried again.",
    ),
    click.option(
        "--upload-stall-timeout-s",
        type=_positive(),
        default=_WEB.upload_stall_timeout_s,
        help="An upload that brings nothing for so long is given up.",
    ),
    click.option(
        "--image-size-max-bytes",
        type=click.IntRange(min=1),
        default=_ROOM.size_max_bytes,
        help="Limit on one image (413 beyond it).",
    ),
    click.option(
        "--unpacked-size-max-bytes",
        type=click.IntRange(min=1),
        default=_LOOK.unpacked_size_max_bytes,
        help="Limit on one image without its compression (413 beyond it).",
    ),
    click.option(
        "--virtual-size-max-bytes",
        type=click.IntRange(min=1),
        default=_LOOK.virtual_size_max_bytes,
        help="Limit on the disk a guest would see (413 beyond it).",
    ),
    click.option(
        "--derivations",
        type=click.IntRange(1, 64),
        default=_DERIVE.derivations_max,
        help="Derived images made at a time.",
    ),
    click.option(
        "--derive-timeout-s", type=_positive(), default=_DERIVE.total_timeout_s, help="Limit on making one of them."
    ),
    click.option(
        "--derive-cache-max-bytes",
        type=click.IntRange(min=0),
        default=_DERIVE.cache_max_bytes,
        help="Derived images kept; the least recently used go first.",
    ),
    click.option(
        "--quota-bytes",
        type=click.IntRange(min=0),
        default=_ROOM.quota_bytes,
        help="Limit on all images together (507 beyond it); 0 is none.",
    ),
    click.option(
        "--free-min-bytes",
        type=click.IntRange(min=0),
        default=_ROOM.free_min_bytes,
        help="Disk space that stays free (507 beyond it).",
    ),
    click.option(
        "--upload-expiry-s",
        type=_positive(),
        default=_PARTS.expiry_s,
        help="An upload in parts that gets none for so long is given up.",
    ),
    click.option(
        "--scrub-interval-s",
        type=_positive(),
        default=SCRUB_INTERVAL_S,
        help="Time between two passes that read every image again.",
    ),
    click.option(
        "--collect-interval-s", type=_positive(), default=INTERVAL_S, help="Time between two garbage collections."
    ),
    click.option(
        "--lease-ttl-s",
        type=click.FloatRange(TTL_MIN_S, 600.0),
        default=TTL_S,
        help="A replica that gives no sign of life for so long loses its work to the others.",
    ),
    click.option(
        "--collect-grace-s",
        type=click.FloatRange(min=GRACE_MIN_S),
        default=GRACE_S,
        help="Nothing younger is collected.",
    ),
    click.option(
        "--catalog-key",
        type=click.Path(path_type=Path, dir_okay=False),
        help="OpenPGP private key to sign the catalogue with.",
    ),
    click.option("--catalog-region", default="", help="This site's region, for clients that deploy by image id."),
    click.option("--catalog-endpoint", default="", help="Where this site's API is, for the same clients."),
]


def service_options(function: F) -> F:
    """The image service's own options; their values come back by :func:`service_config`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _plain_keys(table: Mapping[str, Any] | None) -> dict[str, Any]:
    """A store's table with the original's keys in the case the stores know (it read them in any case)."""
    return {key if key == key.lower() else key[0].lower() + key[1:]: value for key, value in (table or {}).items()}


def _catalog(params: Mapping[str, Any], state_dir: Path) -> CatalogSettings:
    return CatalogSettings(
        directory=state_dir / "catalog",
        key_file=params["catalog_key"],
        region=params["catalog_region"],
        endpoint=params["catalog_endpoint"],
    )


def _fetch_limits(params: Mapping[str, Any]) -> FetchLimits:
    return FetchLimits(
        fetches_max=params["fetches"],
        failures_max=params["fetch_failures_max"],
        total_timeout_s=params["fetch_timeout_s"],
        backoff_s=params["fetch_backoff_s"],
        checkpoint_s=params["fetch_checkpoint_s"],
    )


def service_config(params: Mapping[str, Any]) -> ServiceConfig:
    """The configuration from the parsed options; InvalidArgumentError says what does not fit."""
    state_dir: Path = params["state_dir"]
    images, metadata = _plain_keys(params["image_store_config"]), _plain_keys(params["metadata_store_config"])
    if params["image_store_type"] == "fs":
        images = {
            "dir": str(state_dir / "images"),
            "quota_bytes": params["quota_bytes"],
            "free_min_bytes": params["free_min_bytes"],
        } | images
    if params["metadata_store_type"] in {"kvite", "sqlite"}:
        metadata = {"filename": str(state_dir / "records.db")} | metadata
    return ServiceConfig(
        state_dir=state_dir,
        image_store_type=params["image_store_type"],
        image_store_config=images,
        metadata_store_type=params["metadata_store_type"],
        metadata_store_config=metadata,
        policy=SourcePolicy.parse(params["allow_source_net"], private=params["allow_private_sources"]),
        conversation=ConversationLimits(
            connect_timeout_s=params["connect_timeout_s"],
            stall_timeout_s=params["fetch_stall_timeout_s"],
            size_max_bytes=params["image_size_max_bytes"],
        ),
        fetches=_fetch_limits(params),
        derive=DeriveLimits(
            derivations_max=params["derivations"],
            total_timeout_s=params["derive_timeout_s"],
            cache_max_bytes=params["derive_cache_max_bytes"],
            free_min_bytes=params["free_min_bytes"],
        ),
        admission=AdmissionLimits(
            size_max_bytes=params["image_size_max_bytes"],
            quota_bytes=params["quota_bytes"],
            free_min_bytes=params["free_min_bytes"],
        ),
        inspection=InspectionLimits(
            unpacked_size_max_bytes=params["unpacked_size_max_bytes"],
            virtual_size_max_bytes=params["virtual_size_max_bytes"],
        ),
        web=WebLimits(upload_stall_timeout_s=params["upload_stall_timeout_s"]),
        lease_ttl_s=params["lease_ttl_s"],
        collect_interval_s=params["collect_interval_s"],
        collect_grace_s=params["collect_grace_s"],
        uploads=UploadLimits(expiry_s=params["upload_expiry_s"]),
        scrub_interval_s=params["scrub_interval_s"],
        catalog=_catalog(params, state_dir),
    )
