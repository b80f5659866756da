"""What is wrong with a dataset, and taking out what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.files import write_json
from pipeline.core.parallel import map_unordered
from pipeline.data.format.index import build_index
from pipeline.data.format.schema import DATASET_FILE, DatasetJson, read_dataset_json
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
    """Check every shard of the dataset in ``folder`` and list what is wrong, in order of shards.

    Checked are size and SHA-256 of tars, their structure, every sample's bytes against the index, images (they decode,
    are what their name says, and have the size stated), jsons, categories, boxes, and keys and image ids, which must be
    unique in the whole dataset.

    Args:
        folder: of a dataset on this machine.
        exclude: take bad samples, and shards that cannot be read, out of the dataset for good, which gives it another
            identity; the tars stay as they are.
        workers: processes; 0 for as many as is worthwhile.
        on_ray: on a Ray cluster, which must see the same folder.
        progress: called with (shards done, shards in all).

    Raises DataError where ``folder`` holds no dataset, or nothing of it would be left.
    """
    dataset = read_dataset_json(folder)
    categories = frozenset(category.id for category in dataset.categories)
    tasks = [ShardCheck(folder, shard, categories) for shard in dataset.shards]
    found: dict[str, ShardReport] = {}
    for report in map_unordered(check_shard, tasks, workers, on_ray):
        found[report.shard.name] = report
        if progress is not None:
            progress(len(found), len(tasks))
    ordered = [found[shard.name] for shard in dataset.shards]
    problems = [problem for report in ordered for problem in report.problems] + list(_doubled(ordered))
    if exclude and problems:
        _exclude(folder, dataset, ordered, problems)
    return problems


def _doubled(found: Sequence[ShardReport]) -> Iterator[Problem]:
    """Keys and image ids that more than one shard, or sample, has; the first that has one may keep it."""
    seen: dict[tuple[str, str | int], str] = {}
    for report in found:
        counted = Counter[tuple[str, str | int]]()
        for key in report.keys:
            names: list[tuple[str, str | int]] = [("key", key)]
            if key in report.image_ids:
                names.append(("image id", report.image_ids[key]))
            for name in names:
                counted[name] += 1
                if name in seen or counted[name] > 1:
                    where = seen.get(name, report.shard.name)
                    yield Problem(report.shard.name, key, f"its {name[0]} {name[1]} stands in {where} already")
        seen = {**dict.fromkeys(counted, report.shard.name), **seen}


def _exclude(folder: Path, dataset: DatasetJson, found: Sequence[ShardReport], problems: Sequence[Problem]) -> None:
    bad: dict[str, set[str]] = {}
    for problem in problems:
        if problem.key is not None:
            bad.setdefault(problem.shard, set()).add(problem.key)
    kept = []
    for report in found:
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
    # With the source gone, packing again would no longer take this for what it makes.
    changed = dataset.model_copy(update={"shards": kept, "source": ""})
    write_json(folder / DATASET_FILE, changed.model_dump())
