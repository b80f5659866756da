"""``graphkd``: the commands, and what becomes of an error."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated

import typer

from graphkd import __version__

app = typer.Typer(
    name="graphkd",
    help="Distil document-layout detectors: pages -> shards -> teacher -> cache -> student -> report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = ("quickstart", "data", "train", "cache", "evaluate", "report", "config", "weights")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more of the log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    shown = logging.StreamHandler()
    shown.setLevel(logging.INFO if debug else logging.WARNING)  # a run's log file takes in more than the terminal
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[shown], level=shown.level)


for _name in COMMANDS:
    import_module(f"pipeline.cli.{_name}").register(app)
for _plug_in in entry_points(group="graphkd.commands"):  # such as cluster's, without which the pipeline works too
    _plug_in.load()(app)


def main() -> None:
    """Run the command line: exit code 0 only for success, 1 for an error, 2 for wrong usage, 75 where another try may
    succeed, 128 and the signal's number when a signal ended it.
    """
    debug = "--debug" in sys.argv
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(130)
    except Exception as error:
        if debug or not _is_users(error):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    from pipeline.core.errors import TEMPORARY_FAILURE, LostWorkersError, StoppedError

    if isinstance(error, LostWorkersError):
        return TEMPORARY_FAILURE
    return 128 + error.signal if isinstance(error, StoppedError) else 1  # as shells and schedulers read it


def _is_users(error: Exception) -> bool:
    from graphkd.errors import UserError

    return isinstance(error, UserError)
