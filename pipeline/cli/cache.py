"""``graphkd cache``: precomputing a teacher's signals."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.cli.console import out, print_json, progress_bar
from pipeline.cli.train import ConfigFile, Engine, Overrides, configured
from pipeline.core.progress import phased_progress

commands = typer.Typer(help="Precompute what a teacher says, once for many students.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON document.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands, name="cache")


def _student(config: Path, overrides: list[str] | None, engine: str | None = None) -> Any:
    """The config of a student that has a teacher."""
    from pipeline.cache.build import check_has_teacher

    settings = configured(config, overrides, engine)
    check_has_teacher(settings)
    return settings


@commands.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Builders side by side, each as fast as this machine.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that will train from the cache.")] = 1,
    rate: Annotated[float, typer.Option(min=0.1, help="Pages a second that each of them takes.")] = 100.0,
    pages: Annotated[int, typer.Option(min=1, help="Pages that the teacher looks at to be timed.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Say what a cache will cost before it is built; exit code 1 where it will not fit."""
    from pipeline.cache.plan import plan_cache
    from pipeline.core.distributed import pick_device

    settings = _student(config, overrides)
    found = plan_cache(settings, pick_device(settings.engine.device, 0), workers, gpus, rate, pages)
    if as_json:
        print_json(found.as_dict())
    else:
        _show_plan(found, gpus, rate)
    found.require_room()


def _show_plan(plan: Any, gpus: int, rate: float) -> None:
    out.print(
        f"{plan.rows} pages, {plan.mean_nodes:.1f} nodes each on those looked at: {_size(plan.page_bytes)} a page, "
        f"{_size(plan.need_bytes)} to write (at most {_size(plan.most_bytes)}), {_size(plan.free_bytes)} free"
    )
    out.print(
        f"{timedelta(seconds=round(3600 * plan.hours))} with builders: {plan.builders}, bound by the {plan.bound}: "
        f"{plan.pages_s:.1f} pages/s each here; the disk takes {plan.write_mb_s:.0f} MB/s"
    )
    table = Table(title="at most, by form and nodes a page")
    for heading in ("store", "dtype", "nodes", "a page", "in all"):
        table.add_column(heading, justify="left" if heading in ("store", "dtype") else "right")
    for size in plan.sizes:
        table.add_row(size.store, size.precision, str(size.nodes), _size(size.page_bytes), _size(size.total_bytes))
    out.print(table)
    feeds = Table(title=f"reading: {gpus} x {rate:g} pages/s take {plan.read_mb_s:.0f} MB/s")
    for heading in ("storage", "about GB/s", "pages/s", "enough"):
        feeds.add_column(heading, justify="left" if heading == "storage" else "right")
    for feed in plan.feeds:
        feeds.add_row(feed.storage, f"{feed.gb_s:g}", f"{feed.pages_s:.0f}", "yes" if feed.enough else "no")
    out.print(feeds)


@commands.command()
def build(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: Engine = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Most builders on Ray; 0 for as many as the cluster has room for.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute the teacher's statistics and features for a student's config; finished shards are kept."""
    settings = _student(config, overrides, engine)
    description = build_with_progress(settings, workers)
    if as_json:
        print_json({"folder": str(settings.cache_folder), "rows": description.rows, "bytes": description.bytes})
    else:
        out.print(f"{description.rows} pages, {_size(description.bytes)}: {settings.cache_folder}")


def build_with_progress(settings: Any, workers: int = 0) -> Any:
    """Build under a progress bar for statistics, then one for features."""
    from pipeline.cache.build import build_cache, local_builders
    from pipeline.cache.ray_builders import ray_builders
    from pipeline.core.distributed import pick_device

    device, on_ray = pick_device(settings.engine.device, 0), settings.engine.name == "ray"
    builders = ray_builders(settings, workers) if on_ray else local_builders(settings, device)
    with phased_progress(progress_bar, "teacher", "pages") as update:
        return build_cache(settings, builders, update)


@commands.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    pages: Annotated[int, typer.Option(min=0, help="Pages that the live teacher looks at again.")] = 16,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 for as many as is worthwhile.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a student's cache and some pages against the live teacher. Exit code 1 where one differs."""
    from pipeline.cache.verify import verify_cache
    from pipeline.core.distributed import pick_device

    settings = _student(config, overrides)
    with phased_progress(progress_bar, "verifying", "") as update:
        found = verify_cache(settings, pick_device(settings.engine.device, 0), pages, workers, update)
    if as_json:
        print_json(found.as_dict())
    else:
        _show_verdict(found)
    if found.problems:
        raise typer.Exit(1)


def _show_verdict(found: Any) -> None:
    for problem in found.problems:
        out.print(problem, markup=False, highlight=False, soft_wrap=True)
    seen = found.agreement
    if seen is not None:
        out.print(
            f"{seen.pages} pages against the live teacher: features off by {seen.max_error:.3g} at most, "
            f"{seen.mean_error:.3g} on average (their mean size is {seen.scale:.3g}), cosine {seen.cosine:.6f}, "
            f"losses by {seen.loss_difference:.3%}; it would choose {seen.same_nodes:.1%} of the boxes again",
            soft_wrap=True,
        )
    out.print(f"{len(found.problems)} problems" if found.problems else "every byte is as written")


@commands.command()
def info(location: Annotated[str, typer.Argument(help="Cache folder or URL.")], as_json: AsJson = False) -> None:
    """Say what a cache was made from, how large it is, and what the teacher's statistics are."""
    from pipeline.cache.format import read_cache_json
    from pipeline.data.storage.open import open_store
    from pipeline.teacher.statistics import read_statistics

    description, statistics = read_cache_json(open_store(location)), read_statistics(location)
    if as_json:
        print_json(description.model_dump() | {"energy": statistics.mean_square, "accuracy": statistics.accuracy})
        return
    nodes = sum(shard.nodes for shard in description.shards)
    channels, *side = description.feature_shape
    out.print(
        f"{description.rows} pages in {len(description.shards)} shards, {_size(description.bytes)}, "
        f"{_size(description.bytes / max(1, description.rows))} a page"
    )
    packed = ", ".join(sorted({shard.compression for shard in description.shards}))
    form = f"{description.store}, {description.precision}, compression {packed}"
    shape = f"{channels} x {side[0]} x {side[1]}"
    mean = nodes / max(1, description.rows)
    out.print(f"{form}; views {description.views}; {mean:.1f} of {description.nodes} nodes a page, {shape} each")
    told = ", ".join(f"{name} {value:.1%}" for name, value in statistics.accuracy.items())
    out.print(f"text told from the rest: {told}")
    for name, value in description.identity.items():
        out.print(f"  {name:<24} {value}", soft_wrap=True)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
