"""``graphkd cache``: precomputing a teacher's signals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.console import out, print_json, progress_bar
from pipeline.cli.train import ConfigFile, Overrides, configured
from pipeline.stages import phased

commands = typer.Typer(help="Precompute what a teacher says, once for many students.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="cache")


@commands.command()
def build(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compute the teacher's statistics and features for a student's config; finished shards are kept."""
    settings = configured(config, overrides)
    description = build_with_progress(settings)
    size = sum(shard.bytes for shard in description.shards)
    rows = sum(shard.rows for shard in description.shards)
    if as_json:
        print_json({"folder": str(settings.cache_folder), "rows": rows, "bytes": size})
    else:
        out.print(f"{rows} pages, {size / 1e6:.1f} MB: {settings.cache_folder}")


def build_with_progress(settings: Any) -> Any:
    """Build under a progress bar for statistics, then one for features."""
    from pipeline.runs.world import pick_device
    from pipeline.teacher.cache_build import build_cache, require_teacher

    require_teacher(settings)
    with phased(progress_bar, "teacher", "pages") as update:
        return build_cache(settings, pick_device(settings.engine.device, 0), update)


@commands.command()
def info(folder: Annotated[Path, typer.Argument(help="Cache folder.")], as_json: AsJson = False) -> None:
    """Say what a cache was made from and how large it is."""
    from pipeline.teacher.cache_format import read_cache_json

    description = read_cache_json(folder)
    if as_json:
        print_json(description.model_dump())
        return
    size = sum(shard.bytes for shard in description.shards)
    rows = sum(shard.rows for shard in description.shards)
    out.print(f"{rows} pages in {len(description.shards)} shards, {size / 1e6:.1f} MB, {description.precision}")
    for name, value in description.identity.items():
        out.print(f"  {name:<24} {value}")
