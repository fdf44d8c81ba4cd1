"""Command line options both daemons share. A value is looked for on the command line, in ``MISTIFY_*``, in the file, in that order."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from rpc.auth import LOOPBACK
from rpc.daemon import DaemonSettings
from rpc.logs import LEVELS

ENV_PREFIX = "MISTIFY"

CONTEXT_SETTINGS: dict[str, Any] = {
    "auto_envvar_prefix": ENV_PREFIX,
    "help_option_names": ["-h", "--help"],
    "show_default": True,
}
"""For ``@click.command(context_settings=CONTEXT_SETTINGS)``: makes every option readable from ``MISTIFY_<NAME>``."""

CONFIG_MAX_BYTES = 1 << 20
"""A configuration is a page of text."""

F = TypeVar("F", bound=Callable[..., Any])

Translate = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns the keys of an older file into ours; what it does not know it leaves as it is, to be refused."""


def daemon_options(*, default_port: int, port_flag: str = "-p") -> Callable[[F], F]:
    """Where to listen, whom to let in, how to log. The values come back by :func:`daemon_settings`."""
    options = [
        click.option(
            port_flag, "--port", type=click.IntRange(0, 65535), default=default_port, help="Port; 0 takes a free one."
        ),
        click.option("--bind", default=LOOPBACK, metavar="ADDRESS", help="Address to listen on."),
        click.option(
            "--token-file", type=_path(), help="File with the token callers must show (Authorization: Bearer ...)."
        ),
        click.option("--insecure", is_flag=True, help="Serve other machines without a token."),
        click.option(
            "--host-name", multiple=True, metavar="NAME", help="A name callers may use for this server. Repeatable."
        ),
        click.option("--port-file", type=_path(), help="Write the port here once it is open."),
        click.option(
            "-l",
            "--log-level",
            type=click.Choice([*LEVELS], case_sensitive=False),
            default="warning",
            help="Log from this level.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            help="Lines for people or for machines.",
        ),
    ]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _path() -> click.Path:
    return click.Path(path_type=Path, dir_okay=False)


def daemon_settings(params: dict[str, Any], *, component: str, version: str, use_uvloop: bool) -> DaemonSettings:
    """Take the values of :func:`daemon_options` out of a command's parameters; what remains is the daemon's own."""
    return DaemonSettings(
        component=component,
        version=version,
        use_uvloop=use_uvloop,
        port=params.pop("port"),
        address=params.pop("bind"),
        token_file=params.pop("token_file"),
        insecure=params.pop("insecure"),
        host_names=tuple(params.pop("host_name")),
        port_file=params.pop("port_file"),
        log_level=params.pop("log_level"),
        log_style=params.pop("log_format"),
    )


def config_option(*flags: str, translate: Translate | None = None) -> Callable[[F], F]:
    """``--config FILE``: TOML (or JSON, by its name) with the long names of the options as keys; an unknown key is an error."""

    def load(context: click.Context, param: click.Parameter, value: Path | None) -> None:
        if value is None:
            return
        given = read_config(value)
        if translate is not None:
            given = translate(given)
        known = {
            name: one for one in context.command.params if (name := one.name) and one is not param and one.expose_value
        }
        context.default_map = {**(context.default_map or {}), **_checked(value, given, known)}

    return click.option(
        *(flags or ("--config",)),
        "config_file",
        envvar=[f"{ENV_PREFIX}_CONFIG", f"{ENV_PREFIX}_CONFIG_FILE"],
        type=_path(),
        is_eager=True,
        expose_value=False,
        callback=load,
        help="File with values for these options.",
    )


def read_config(path: Path) -> dict[str, Any]:
    """The file's top level; click.BadParameter says what is wrong with it and where."""
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_MAX_BYTES + 1)
        if len(data) > CONFIG_MAX_BYTES:
            raise click.BadParameter(f"{path} is larger than {CONFIG_MAX_BYTES} bytes")
        text = data.decode("utf-8")
        value = json.loads(text) if path.suffix == ".json" or text.lstrip().startswith("{") else tomllib.loads(text)
    except OSError as err:
        raise click.BadParameter(f"cannot read {path}: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise click.BadParameter(f"{path} is not valid: {err}") from err
    if not isinstance(value, dict):
        raise click.BadParameter(f"{path} does not hold keys and values")
    return value


def _checked(path: Path, given: Mapping[str, Any], known: Mapping[str, click.Parameter]) -> dict[str, Any]:
    values = {key.replace("-", "_"): value for key, value in given.items()}
    unknown = sorted(key for key in given if key.replace("-", "_") not in known)
    if unknown:
        raise click.BadParameter(
            f"{path}: unknown {_keys(unknown)}; known are {', '.join(sorted(_dashed(set(known))))}"
        )
    return {name: _value(path, known[name], value) for name, value in values.items()}


def _value(path: Path, option: click.Parameter, value: Any) -> Any:
    """One value as click takes it: a word where several may stand is one of them, not its letters; a number is finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise click.BadParameter(f"{path}: {option.name} is not a finite number")
    is_list = isinstance(value, list)
    if option.multiple and not is_list:
        return [value]
    if is_list and not option.multiple:
        raise click.BadParameter(f"{path}: {option.name} takes one value, not a list")
    return value


def _keys(names: Sequence[str]) -> str:
    return f"{'key' if len(names) == 1 else 'keys'} {', '.join(names)}"


def _dashed(names: set[str]) -> set[str]:
    return {name.replace("_", "-") for name in names}
