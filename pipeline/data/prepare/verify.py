"""What is wrong with a dataset, and taking out what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.files import write_json
from pipeline.core.parallel import each
from pipeline.data.format.index import build_index
from pipeline.data.format.schema import DATASET_FILE, DatasetJson, read_dataset_json
from pipeline.data.prepare.check_shard import Findings, Problem, ShardToInspect, inspect_shard
from pipeline.data.prepare.shard_writer import describe_shard


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
    tasks = [ShardToInspect(folder, shard, categories) for shard in dataset.shards]
    found: dict[str, Findings] = {}
    for findings in each(inspect_shard, tasks, workers, on_ray):
        found[findings.shard.name] = findings
        if progress is not None:
            progress(len(found), len(tasks))
    ordered = [found[shard.name] for shard in dataset.shards]
    problems = [problem for findings in ordered for problem in findings.problems] + list(_doubled(ordered))
    if exclude and problems:
        _exclude(folder, dataset, ordered, problems)
    return problems


def _doubled(found: Sequence[Findings]) -> Iterator[Problem]:
    """Keys and image ids that more than one shard, or sample, has; the first that has one may keep it."""
    seen: dict[tuple[str, str | int], str] = {}
    for findings in found:
        counted = Counter[tuple[str, str | int]]()
        for key in findings.keys:
            names: list[tuple[str, str | int]] = [("key", key)]
            if key in findings.image_ids:
                names.append(("image id", findings.image_ids[key]))
            for name in names:
                counted[name] += 1
                if name in seen or counted[name] > 1:
                    where = seen.get(name, findings.shard.name)
                    yield Problem(findings.shard.name, key, f"its {name[0]} {name[1]} stands in {where} already")
        seen = {**dict.fromkeys(counted, findings.shard.name), **seen}


def _exclude(folder: Path, dataset: DatasetJson, found: Sequence[Findings], problems: Sequence[Problem]) -> None:
    bad: dict[str, set[str]] = {}
    for problem in problems:
        if problem.key is not None:
            bad.setdefault(problem.shard, set()).add(problem.key)
    kept = []
    for findings in found:
        name = findings.shard.name
        if not findings.readable:
            continue
        excluded = tuple(sorted({*findings.shard.excluded, *bad.get(name, ())}))
        samples = len(set(findings.keys) - set(excluded))
        if samples:
            build_index(folder / name, excluded)
            kept.append(describe_shard(folder / name, samples, excluded))
    if not kept:
        raise DataError(f"{folder} holds no sample that can be used; pack it again")
    # With the source gone, packing again would no longer take this for what it makes.
    changed = dataset.model_copy(update={"shards": kept, "source": ""})
    write_json(folder / DATASET_FILE, changed.model_dump())
