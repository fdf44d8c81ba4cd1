"""``mistify-image``: what the image service can do, for a person at a terminal.

Each module of this package is a subcommand and offers it as ``command``; it is imported only when it is called.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import click

from imaging.errors import MistifyError, from_os_error


class LazyGroup(click.Group):
    """A group whose commands are the modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names of the modules."""
        return _modules()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the same
        """Import the module and take its command."""
        if cmd_name not in _modules():
            return None
        command = importlib.import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an error of ours becomes one line and exit status 1."""
        try:
            return super().invoke(ctx)
        except MistifyError as err:
            raise click.ClickException(_one_line(err)) from err
        except BrokenPipeError:
            # Whoever read our output has gone: nobody is left to tell, and a flush at exit must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(1) from None
        except OSError as err:
            what = f"cannot read or write {err.filename or 'standard input or output'}"
            translated = from_os_error(err, what)
            translated.__cause__ = err
            raise click.ClickException(_one_line(translated)) from err


def _modules() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _one_line(err: MistifyError) -> str:
    """The message, and what the system said if it was the system that refused."""
    cause = err.__cause__
    why = f": {cause.strerror}" if isinstance(cause, OSError) and cause.strerror else ""
    return " ".join(f"{err.message}{why}".split())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mistify-image-stack")
def cli() -> None:
    """Work with disk images and volume streams."""


def main() -> None:
    """Entry point of the ``mistify-image`` script."""
    try:
        cli.main(prog_name="mistify-image")
    except Exception as err:  # noqa: BLE001 - the last line of defence: a person gets one line, never a traceback
        click.echo(
            f"Error: internal error, please report it: {type(err).__name__}: {' '.join(str(err).split())}", err=True
        )
        sys.exit(1)
