"""``graphkd report``: one HTML page that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import console


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, in the order of the table.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="Default: report.html in the last run.")] = None,
    pages: Annotated[int, typer.Option(min=0, help="Evaluated pages to draw.")] = 4,
    title: Annotated[str, typer.Option(help="Heading.")] = "GraphKD runs",
) -> None:
    """Write one HTML page: AP tables, curves, pages with boxes, and the graph drawn on a page."""
    from pipeline.core.run_paths import REPORT
    from pipeline.report.html import report_runs
    from pipeline.report.runs import load_run

    path = report_runs([load_run(folder) for folder in runs], out_file or runs[-1] / REPORT, title, pages)
    console.print(f"{path}")
