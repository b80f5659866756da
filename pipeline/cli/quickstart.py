"""``graphkd quickstart``: the whole pipeline on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import console, metrics_table, print_json, progress_bar


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(quickstart)


def quickstart(
    out_folder: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("runs/quickstart"),
    small: Annotated[
        bool, typer.Option("--small", help="Run every stage in a few minutes; its AP means nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of pages and weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Synthetic pages -> shards -> teacher -> cache -> distilled student -> report. Rerun to resume."""
    from pipeline.quickstart import quickstart as run

    result = run(out_folder, "small" if small else "full", seed, progress_bar)
    rows = {name.replace("_", " "): metrics for name, metrics in result.items() if isinstance(metrics, dict)}
    console.print(metrics_table(rows, "COCO AP on held-out pages, %"))
    console.print(f"{result['seconds']:.0f} s; open {out_folder / 'report.html'}")
    if as_json:
        print_json(result)
