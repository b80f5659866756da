"""``graphkd``: all commands, and the mapping of errors to exit codes."""

from __future__ import annotations

import io
import logging
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated

import typer

from graphkd import __version__
from graphkd.errors import UserError
from pipeline.core.wait_policy import set_wait_policy

app = typer.Typer(
    name="graphkd",
    help="Distil document-layout detectors: pages -> shards -> teacher -> cache -> student -> report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = (
    *("quickstart", "data", "train", "cache", "evaluate", "predict", "export", "bench"),
    *("report", "config", "weights"),
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"graphkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more of the log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    set_wait_policy()  # before a command imports torch
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO if debug else logging.WARNING)  # a run's log file gets more than the terminal
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[handler], level=handler.level)


for _name in COMMANDS:
    import_module(f"pipeline.cli.{_name}").register(app)
for _plug_in in entry_points(group="graphkd.commands"):  # such as cluster's; the pipeline works without them
    _plug_in.load()(app)


def main() -> None:
    """Run the command line.

    Exit codes: 0 success, 1 error, 2 wrong usage, 75 another try may succeed, 128 + signal number if stopped by one.
    """
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted; rerun the same command to resume", err=True)
        sys.exit(130)
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(_exit_code(error))
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())[:300]
        typer.echo(f"error: {type(error).__name__}: {reason}; --debug before the command shows where", err=True)
        sys.exit(1)


def _exit_code(error: UserError) -> int:
    from pipeline.core.errors import TEMPORARY_FAILURE, LostWorkersError, StoppedError

    if isinstance(error, LostWorkersError):
        return TEMPORARY_FAILURE
    return 128 + error.signal if isinstance(error, StoppedError) else 1  # as shells and schedulers expect
