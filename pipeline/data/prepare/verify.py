"""Finding the problems of a dataset, and excluding what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.parallel import map_unordered
from pipeline.data.format.scan import build_index
from pipeline.data.format.schema import FORMAT_VERSION, DatasetJson, read_dataset_json, write_dataset_json
from pipeline.data.prepare.check_shard import Problem, ShardCheck, ShardReport, check_shard
from pipeline.data.prepare.shard_writer import shard_entry


def verify(
    folder: Path,
    *,
    exclude: bool = False,
    workers: int = 0,
    on_ray: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Check every shard of a dataset and return its problems, in the order of shards.

    Checks size and SHA-256 of tars and indexes, the structure of tars, every sample against its row in the index,
    images (decodable, of the named format and the stated size, and with the pixels that packing saw, by another decoder
    than training uses), jsons, categories, boxes, and that keys and image ids are unique in the dataset.

    Args:
        folder: local dataset folder.
        exclude: permanently exclude bad samples and unreadable shards, which changes the dataset's identity; tars stay
            unchanged.
        workers: processes; 0 picks a number by the amount of work.
        on_ray: run on a Ray cluster, which must see the same folder.
        progress: called with (shards done, shards in total).

    Raises:
        DataError: if ``folder`` holds no dataset, or excluding would leave nothing.
    """
    dataset = read_dataset_json(folder)
    categories = frozenset(category.id for category in dataset.categories)
    tasks = [ShardCheck(folder, shard, categories) for shard in dataset.shards]
    by_name: dict[str, ShardReport] = {}
    for report in map_unordered(check_shard, tasks, workers, on_ray):
        by_name[report.shard.name] = report
        if progress is not None:
            progress(len(by_name), len(tasks))
    reports = [by_name[shard.name] for shard in dataset.shards]
    problems = [problem for report in reports for problem in report.problems] + list(_duplicates(reports))
    if exclude and problems:
        _exclude(folder, dataset, reports, problems)
    return problems


def _duplicates(reports: Sequence[ShardReport]) -> Iterator[Problem]:
    """Keys and image ids that several shards or samples have; the first one may keep it."""
    seen: dict[tuple[str, str | int], str] = {}
    for report in reports:
        page_progress = Counter[tuple[str, str | int]]()
        for key in report.keys:
            names: list[tuple[str, str | int]] = [("key", key)]
            if key in report.image_ids:
                names.append(("image id", report.image_ids[key]))
            for name in names:
                page_progress[name] += 1
                if name in seen or page_progress[name] > 1:
                    where = seen.get(name, report.shard.name)
                    yield Problem(report.shard.name, key, f"its {name[0]} {name[1]} is used in {where} already")
        seen = {**dict.fromkeys(page_progress, report.shard.name), **seen}


def _exclude(folder: Path, dataset: DatasetJson, reports: Sequence[ShardReport], problems: Sequence[Problem]) -> None:
    bad: dict[str, set[str]] = {}
    for problem in problems:
        if problem.key is not None:
            bad.setdefault(problem.shard, set()).add(problem.key)
    kept = []
    for report in reports:
        name = report.shard.name
        if not report.readable:
            continue
        excluded = tuple(sorted({*report.shard.excluded, *bad.get(name, ())}))
        samples = len(set(report.keys) - set(excluded))
        if samples:
            build_index(folder / name, excluded)
            kept.append(shard_entry(folder / name, samples, excluded))
    if not kept:
        raise DataError(f"{folder} holds no sample that can be used; pack it again")
    # Without its source, packing again no longer takes this for its own result.
    changed = dataset.model_copy(update={"version": FORMAT_VERSION, "shards": kept, "source": ""})
    write_dataset_json(folder, changed)
