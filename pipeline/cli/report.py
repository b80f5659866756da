"""``graphkd report``: one page that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import out


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, in the order of the table.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="By default report.html in the last run.")] = None,
    pages: Annotated[int, typer.Option(min=0, help="Evaluated pages to draw.")] = 4,
    title: Annotated[str, typer.Option(help="Headline.")] = "GraphKD runs",
) -> None:
    """Write one HTML page: AP tables, curves, pages with boxes, and the graph drawn over a page."""
    from pipeline.report.compose import report_runs
    from pipeline.report.runs import load_run

    path = report_runs([load_run(folder) for folder in runs], out_file or runs[-1] / "report.html", title, pages)
    out.print(f"{path}")
