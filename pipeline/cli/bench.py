"""``graphkd bench``: latency, memory and size of models, side by side."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.console import console, percent, print_json, progress_bar
from pipeline.predict import DEFAULT_DPI

COLUMNS = (
    *("model", "kind", "threads", "AP", "parameters", "GFLOPs", "MB"),
    *("preparing ms", "network ms", "finishing ms", "page ms", "p90 ms", "peak MB"),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    models: Annotated[list[Path], typer.Argument(help="Run folders, checkpoints and bundles.", show_default=False)],
    data: Annotated[str, typer.Option(help="Pages: an image, PDF, folder, pattern or packed dataset.")],
    count: Annotated[int, typer.Option(min=1, help="Pages to use.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over them; models take turns on each page.")] = 7,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Of the network; repeatable; default: 1, 2 and all cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON document.")] = False,
) -> None:
    """Time models on the CPU, one page at a time, and keep the figures for the report in their folders."""
    from rich.table import Table

    from pipeline.predict.bench import bench as measure
    from pipeline.predict.inputs import find_documents, read_pages
    from pipeline.predict.page import PageSource

    read = (page for document in find_documents([data]) for page in read_pages(document, DEFAULT_DPI))
    pages = [page.image for page in islice((page for page in read if isinstance(page, PageSource)), count)]
    with progress_bar("timing", "rounds") as update:
        found = measure(
            models, pages, threads=threads or (), rounds=rounds, progress=lambda done, total: update(done, total, "")
        )
    if as_json:
        print_json(found)
        return
    table = Table(title=f"One page at a time, {len(pages)} pages, {rounds} rounds")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "kind") else "right")
    for row in found:
        table.add_row(*_cells(row))
    console.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    parameters = "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.1f} M"
    gflops = "-" if row["gflops"] is None else f"{row['gflops']:.1f}"
    parts = ("preparing_ms", "network_ms", "finishing_ms", "total_ms", "p90_ms")
    about = [row["model"], row["kind"], str(row["threads"]), percent(row["ap"]), parameters, gflops]
    return [*about, f"{row['mb']:.1f}", *(f"{row[name]:.1f}" for name in parts), f"{row['peak_mb']:.0f}"]
