"""``graphkd cache``: precomputing a teacher's signals."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipeline.cli.console import console, print_json, progress_bar
from pipeline.cli.train import ConfigArgument, EngineOption, OverridesArgument, open_context
from pipeline.core.progress import phased_progress

if TYPE_CHECKING:
    from pipeline.cache.format import CacheJson
    from pipeline.cache.plan import Plan
    from pipeline.cache.verify import VerifyReport
    from pipeline.context import RunContext

commands = typer.Typer(help="Precompute a teacher's signals once for many students.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="cache")


def _student_context(config: Path, overrides: list[str] | None, engine: str | None = None) -> RunContext:
    from pipeline.cache.build import check_has_teacher

    context = open_context(config, overrides, engine)
    check_has_teacher(context.config.teacher)
    return context


@commands.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    workers: Annotated[int, typer.Option(min=1, help="Parallel builders (assumed as fast as this host).")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that will train from the cache.")] = 1,
    rate: Annotated[float, typer.Option(min=0.1, help="Pages per second of each of them.")] = 100.0,
    pages: Annotated[int, typer.Option(min=1, help="Pages to measure the teacher on.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Estimate size, build time and read rate of a cache. Exit code 1 if it does not fit on the disk."""
    from pipeline.cache.plan import plan_cache

    found = plan_cache(_student_context(config, overrides), workers, gpus, rate, pages)
    if as_json:
        print_json(found.as_dict())
    else:
        _show_plan(found, gpus, rate)
    found.check_space()


def _show_plan(plan: Plan, gpus: int, rate: float) -> None:
    console.print(
        f"{plan.rows} pages with {plan.mean_nodes:.1f} nodes on average: {_size(plan.page_bytes)} per page, "
        f"{_size(plan.need_bytes)} to write (at most {_size(plan.most_bytes)}), {_size(plan.free_bytes)} free"
    )
    console.print(
        f"{timedelta(seconds=round(3600 * plan.hours))} with {plan.builders} builders, limited by the {plan.bound}: "
        f"{plan.pages_s:.1f} pages/s per builder; the disk writes {plan.write_mb_s:.0f} MB/s"
    )
    table = Table(title="maximum size by form and nodes per page")
    for heading in ("store", "dtype", "nodes", "per page", "total"):
        table.add_column(heading, justify="left" if heading in ("store", "dtype") else "right")
    for size in plan.sizes:
        table.add_row(size.store, size.precision, str(size.nodes), _size(size.page_bytes), _size(size.total_bytes))
    console.print(table)
    feeds = Table(title=f"reading: {gpus} x {rate:g} pages/s need {plan.read_mb_s:.0f} MB/s")
    for heading in ("storage", "about GB/s", "pages/s", "enough"):
        feeds.add_column(heading, justify="left" if heading == "storage" else "right")
    for feed in plan.feeds:
        feeds.add_row(feed.storage, f"{feed.gb_s:g}", f"{feed.pages_s:.0f}", "yes" if feed.enough else "no")
    console.print(feeds)


@commands.command()
def build(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    engine: EngineOption = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Maximum number of builders on Ray; 0 for as many as the cluster has room for.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute the teacher's statistics and features for a student's config. Finished shards are kept."""
    context = _student_context(config, overrides, engine)
    description, folder = _build(context, workers), context.config.cache_folder
    if as_json:
        print_json({"folder": str(folder), "rows": description.rows, "bytes": description.bytes})
    else:
        console.print(f"{description.rows} pages, {_size(description.bytes)}: {folder}")


def _build(context: RunContext, workers: int) -> CacheJson:
    from pipeline.cache.build import build_cache, local_builders
    from pipeline.cache.ray_builders import ray_builders

    on_ray = context.config.engine.name == "ray"
    builders = ray_builders(context, workers) if on_ray else local_builders(context)
    with phased_progress(progress_bar, "teacher", "pages") as update:
        return build_cache(context, builders, update)


@commands.command()
def verify(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    pages: Annotated[int, typer.Option(min=0, help="Pages to compare with the live teacher.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number by the amount of work.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a student's cache, and some pages against the live teacher. Exit code 1 if one differs."""
    from pipeline.cache.verify import verify_cache

    context = _student_context(config, overrides)
    with phased_progress(progress_bar, "verifying", "") as update:
        found = verify_cache(context, pages, workers, update)
    if as_json:
        print_json(found.as_dict())
    else:
        _show_report(found)
    if found.problems:
        raise typer.Exit(1)


def _show_report(found: VerifyReport) -> None:
    for problem in found.problems:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    seen = found.comparison
    if seen is not None:
        console.print(
            f"{seen.pages} pages against the live teacher: features differ by at most {seen.max_error:.3g}, "
            f"{seen.mean_error:.3g} on average (mean absolute feature {seen.scale:.3g}), cosine {seen.cosine:.6f}, "
            f"losses by {seen.loss_difference:.3%}; it would choose {seen.same_nodes:.1%} of the boxes again",
            soft_wrap=True,
        )
    console.print(f"{len(found.problems)} problems" if found.problems else "every byte is as written")


@commands.command()
def info(location: Annotated[str, typer.Argument(help="Cache folder or URL.")], as_json: AsJson = False) -> None:
    """Show what a cache was built from, its size, and the teacher's statistics."""
    from pipeline.cache.format import read_cache_json
    from pipeline.data.storage.open import open_store
    from pipeline.teacher.statistics import read_statistics

    description, statistics = read_cache_json(open_store(location)), read_statistics(location)
    if as_json:
        print_json(description.model_dump() | {"energy": statistics.mean_square, "accuracy": statistics.accuracy})
        return
    nodes = sum(shard.nodes for shard in description.shards)
    channels, *side = description.feature_shape
    rows = max(1, description.rows)
    console.print(
        f"{description.rows} pages in {len(description.shards)} shards, {_size(description.bytes)}, "
        f"{_size(description.bytes / rows)} per page"
    )
    compression = ", ".join(sorted({shard.compression for shard in description.shards}))
    console.print(f"{description.store}, {description.precision}, compression {compression}; views {description.views}")
    console.print(f"{nodes / rows:.1f} of {description.nodes} nodes per page, {channels} x {side[0]} x {side[1]} each")
    accuracy = ", ".join(f"{name} {value:.1%}" for name, value in statistics.accuracy.items())
    console.print(f"balanced accuracy of text or not: {accuracy}")
    for name, value in description.identity.items():
        console.print(f"  {name:<24} {value}", soft_wrap=True)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
