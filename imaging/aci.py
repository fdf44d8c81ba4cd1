"""Manifests of app container images (ACI): parse, validate, write canonically; app strings.

:func:`parse_manifest` gives an :class:`ImageManifest` that keeps every rule of the format; BadDataError says which one is broken.
:func:`canonical_json` writes it in the format's own order, compact, without what the format does not know.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

import msgspec

from imaging.aci_types import (
    IMAGE_KIND,
    check_date,
    check_identifier,
    check_image_id,
    check_kind,
    check_labels,
    check_name,
    check_url,
    check_version,
    shown,
)
from imaging.errors import BadDataError, InvalidArgumentError

MANIFEST_MAX_BYTES = 1 << 20
"""The largest known manifest has some tens of kilobytes; this much is parsed in a few milliseconds."""

PORT_MAX = 65535

EVENTS = ("pre-start", "post-stop")


class Label(msgspec.Struct, frozen=True):
    """A name and a value that tell images of one name apart."""

    name: str = ""
    value: str = ""


class Annotation(msgspec.Struct, frozen=True):
    """A note on an image."""

    name: str = ""
    value: str = ""


class Variable(msgspec.Struct, frozen=True):
    """One variable of the environment."""

    name: str = ""
    value: str = ""


class EventHandler(msgspec.Struct, frozen=True):
    """What runs before the app starts or after it stopped."""

    name: str = ""
    exec: tuple[str, ...] = ()


class MountPoint(msgspec.Struct, frozen=True, rename="camel"):
    """Where the app wants a volume."""

    name: str = ""
    path: str = ""
    read_only: bool | msgspec.UnsetType = msgspec.UNSET


class Port(msgspec.Struct, frozen=True, rename="camel"):
    """Where the app listens."""

    name: str = ""
    protocol: str = ""
    port: int = 0
    count: int = 1
    socket_activated: bool = False


class Isolator(msgspec.Struct, frozen=True):
    """A limit on the app; the value's form is the isolator's own."""

    name: str = ""
    value: Any = None


class App(msgspec.Struct, frozen=True, rename="camel"):
    """How to run the image."""

    exec: tuple[str, ...] | None = None
    event_handlers: tuple[EventHandler, ...] | msgspec.UnsetType = msgspec.UNSET
    user: str = ""
    group: str = ""
    supplementary_gids: tuple[int, ...] | msgspec.UnsetType = msgspec.field(
        name="supplementaryGIDs", default=msgspec.UNSET
    )
    working_directory: str | msgspec.UnsetType = msgspec.UNSET
    environment: tuple[Variable, ...] | msgspec.UnsetType = msgspec.UNSET
    mount_points: tuple[MountPoint, ...] | msgspec.UnsetType = msgspec.UNSET
    ports: tuple[Port, ...] | msgspec.UnsetType = msgspec.UNSET
    isolators: tuple[Isolator, ...] | msgspec.UnsetType = msgspec.UNSET
    user_annotations: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    user_labels: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


class Dependency(msgspec.Struct, frozen=True, rename="camel"):
    """An image whose files this one is laid over."""

    image_name: str = ""
    image_id: str | msgspec.UnsetType = msgspec.field(name="imageID", default=msgspec.UNSET)
    labels: tuple[Label, ...] | msgspec.UnsetType = msgspec.UNSET
    size: int | msgspec.UnsetType = msgspec.UNSET


class ImageManifest(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A manifest; the order of the fields is the order in which they are written."""

    ac_kind: str = ""
    ac_version: str = ""
    name: str = ""
    labels: tuple[Label, ...] = ()
    app: App | None = None
    annotations: tuple[Annotation, ...] = ()
    dependencies: tuple[Dependency, ...] = ()
    path_whitelist: tuple[str, ...] = ()

    @property
    def label_values(self) -> dict[str, str]:
        """The labels by name."""
        return {label.name: label.value for label in self.labels}


def parse_manifest(data: bytes) -> ImageManifest:
    """Parse and validate; BadDataError."""
    if len(data) > MANIFEST_MAX_BYTES:
        raise BadDataError(f"the manifest is larger than {MANIFEST_MAX_BYTES} bytes")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadDataError("the manifest is not a JSON document") from err
    if not isinstance(value, dict):
        raise BadDataError("the manifest is not a JSON object")
    check_kind(_text(value.get("acKind")))
    try:
        manifest = msgspec.convert(_without_empty(value), ImageManifest)
    except msgspec.ValidationError as err:
        raise BadDataError(f"the manifest has a wrong type: {err}") from err
    _check(manifest)
    return manifest


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


_KEPT_EMPTY = frozenset({"value", "exec", "name", "user", "group", "imageName", "path"})


def _without_empty(value: Any, depth: int = 3) -> Any:
    """Members that are null or empty are as good as absent (the format leaves them out), down to an app's lists."""
    if depth and isinstance(value, dict):
        return {
            key: _without_empty(item, depth - 1) if key != "value" else item
            for key, item in value.items()
            if item not in (None, "", [], {}) or (key in _KEPT_EMPTY and item is not None)
        }
    if depth and isinstance(value, list):
        return [_without_empty(item, depth - 1) for item in value]
    return value


def canonical_json(manifest: ImageManifest) -> bytes:
    """The manifest as it is stored: fields in order, compact, nothing unknown."""
    return msgspec.json.encode(manifest)


def _check(manifest: ImageManifest) -> None:
    check_version(manifest.ac_version)
    check_image_name(manifest.name)
    check_labels((label.name, label.value) for label in manifest.labels)
    _check_annotations(manifest.annotations)
    for dependency in manifest.dependencies:
        _check_dependency(dependency)
    if manifest.app is not None:
        _check_app(manifest.app)


def check_image_name(name: str) -> None:
    """The name of an image: a set ACIdentifier."""
    if not name:
        raise BadDataError("name must be set")
    check_identifier(name)


def _check_annotations(annotations: tuple[Annotation, ...]) -> None:
    seen: dict[str, str] = {}
    for annotation in annotations:
        check_identifier(annotation.name)
        if annotation.name in seen:
            raise BadDataError(f"duplicate annotations of name {shown(annotation.name)}")
        seen[annotation.name] = annotation.value
    if "created" in seen:
        check_date(seen["created"])
    for name in ("homepage", "documentation"):
        if name in seen:
            check_url(seen[name])


def _check_dependency(dependency: Dependency) -> None:
    if not dependency.image_name:
        raise BadDataError("imageName cannot be empty")
    check_identifier(dependency.image_name)
    if dependency.image_id:
        check_image_id(dependency.image_id)
    check_labels((label.name, label.value) for label in dependency.labels or ())
    if dependency.size and dependency.size < 0:
        raise BadDataError("size of a dependency cannot be negative")


def _check_app(app: App) -> None:
    for what, value in (("user", app.user), ("group", app.group)):
        if not value:
            raise BadDataError(f"{what} is required")
    if app.working_directory and not posixpath.isabs(app.working_directory):
        raise BadDataError("workingDirectory must be an absolute path")
    _check_handlers(app.event_handlers or ())
    _check_once("environment variable", [variable.name for variable in app.environment or ()])
    for point in app.mount_points or ():
        check_name(point.name)
        if not point.path:
            raise BadDataError("path of a mount point must be set")
    _check_once("mount point", [point.name for point in app.mount_points or ()])
    for port in app.ports or ():
        _check_port(port)
    for isolator in app.isolators or ():
        check_identifier(isolator.name)


def _check_handlers(handlers: tuple[EventHandler, ...]) -> None:
    for handler in handlers:
        if handler.name not in EVENTS:
            raise BadDataError(f"bad eventHandler name: {shown(handler.name)}")
    _check_once("eventHandler", [handler.name for handler in handlers])


def _check_port(port: Port) -> None:
    check_name(port.name)
    if not 1 <= port.port <= PORT_MAX:
        raise BadDataError("port must be in 1-65535 range")
    if not 1 <= port.port + port.count - 1 <= PORT_MAX or port.count < 1:
        raise BadDataError("end of port range must be in 1-65535 range")


def _check_once(what: str, names: list[str]) -> None:
    if "" in names:
        raise BadDataError(f"name of an {what} must be set" if what[0] in "aeiou" else f"name of a {what} must be set")
    for name in names:
        if names.count(name) > 1:
            raise BadDataError(f"duplicate {what} of name {shown(name)}")


# -- app strings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AppName:
    """What a person asks for: an image's name and the labels it must have."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """``name:version,label=value``."""
        rest = [f"{name}={value}" for name, value in self.labels.items() if name != "version"]
        version = f":{self.labels['version']}" if "version" in self.labels else ""
        return ",".join([self.name + version, *rest])


def parse_app_string(text: str) -> AppName:
    """Parse ``name[:version][,label=value]...``; InvalidArgumentError."""
    _check_colon(text)
    parts = ("name=" + text.replace(":", ",version=", 1)).split(",")
    values: dict[str, list[str]] = {}
    for part in parts:
        label, equals, value = part.partition("=")
        if not equals or not label:
            raise InvalidArgumentError(f"malformed app string - has a label without a value: {part[:128]}")
        values.setdefault(label, []).append(unquote_plus(value))
    for label, found in values.items():
        if len(found) > 1:
            raise InvalidArgumentError(f"label {label} with multiple values [{' '.join(shown(v) for v in found)}]")
    labels = {label: found[0] for label, found in values.items()}
    name = labels.pop("name")
    try:
        check_identifier(name)
        for label in labels:
            check_identifier(label)
    except BadDataError as err:
        raise InvalidArgumentError(err.message) from err
    return AppName(name, labels)


def _check_colon(text: str) -> None:
    colon, comma = text.find(":"), text.find(",")
    if -1 < comma < colon:
        raise InvalidArgumentError("malformed app string - colon may appear only right after the app name")
    if text.count(":") > 1:
        raise InvalidArgumentError("malformed app string - colon may appear at most once")


def new_manifest(name: str, labels: Mapping[str, str], *, version: str = "0.8.11") -> ImageManifest:
    """A minimal manifest, validated: for images that come without one."""
    manifest = ImageManifest(IMAGE_KIND, version, name, tuple(Label(key, value) for key, value in labels.items()))
    _check(manifest)
    return manifest
