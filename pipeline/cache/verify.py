"""Verifying a finished cache: all its bytes, and a sample of pages against the live teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from pipeline.cache.cached_teacher import CachedTeacher
from pipeline.cache.compare import MAX_RELATIVE_LOSS_DIFFERENCE, TeacherComparison, compare_with_live
from pipeline.cache.format import CachedShard, CacheJson, read_cache_json
from pipeline.cache.index import REMEDY, read_cache_index
from pipeline.cache.reader import check_file
from pipeline.context import RunContext
from pipeline.core.errors import CacheError, DataError
from pipeline.core.files import sha256_file
from pipeline.core.parallel import map_unordered
from pipeline.data.storage.local import LocalStore
from pipeline.teacher.identity import check_identity


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of a verification."""

    problems: list[str]
    comparison: TeacherComparison | None
    """None if files are damaged, or no pages were to be compared."""

    def as_dict(self) -> dict[str, Any]:
        """Content for JSON."""
        return {"problems": self.problems, "agreement": self.comparison and asdict(self.comparison)}


def verify_cache(
    context: RunContext,
    pages: int = 16,
    workers: int = 0,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> VerifyReport:
    """Check every byte of the cache of a student's teacher, then compare some pages with the live teacher.

    Args:
        context: of the student.
        pages: number of pages to compare.
        workers: number of processes that read files; 0 chooses it by the amount of work.
        progress: called with (``files`` or ``pages``, done, total).

    Raises:
        CacheError: if the cache is not finished, or its identity differs, naming the field.
    """
    identity, folder = context.cache_identity, context.config.cache_folder
    description = read_cache_json(LocalStore(folder))
    check_identity(description.identity, identity, folder, "give the config that it was built for")
    problems = check_bytes(folder, description, workers, partial(progress, "files"))
    if problems or not pages:
        return VerifyReport(problems=problems, comparison=None)
    cached = CachedTeacher(folder, context.dataset, identity)
    comparison = compare_with_live(context, cached, pages, partial(progress, "pages"))
    limit = MAX_RELATIVE_LOSS_DIFFERENCE[description.precision]
    if not comparison.loss_difference <= limit:  # also if it is NaN
        problems = [f"losses differ from the live teacher's by {comparison.loss_difference:.2%}, more than {limit:.2%}"]
    return VerifyReport(problems=problems, comparison=comparison)


def check_bytes(folder: Path, description: CacheJson, workers: int, progress: Callable[[int, int], None]) -> list[str]:
    """Verify every file of a finished cache and return its problems, sorted."""
    tasks = [(folder, shard, description) for shard in description.shards]
    problems: list[str] = []
    for done, shard_problems in enumerate(map_unordered(_check_shard, tasks, workers), start=1):
        problems += shard_problems
        progress(done, len(tasks))
    return sorted(problems)


def _check_shard(task: tuple[Path, CachedShard, CacheJson]) -> list[str]:
    folder, shard, description = task
    path = folder / shard.name
    try:
        store = LocalStore(folder)
        check_file(store, shard)
        index = read_cache_index(store, shard.name, description.indexes.get(shard.name))
        index.check(shard, description.identity, str(path))
    except (CacheError, DataError) as error:
        return [str(error)]
    if sha256_file(path) == shard.sha256:
        return []
    damaged = []
    with path.open("rb") as file:
        for entry in index.entries:
            file.seek(entry.offset)
            if xxhash.xxh3_64_intdigest(file.read(entry.bytes)) != entry.digest:
                damaged.append(f"sample {entry.sample} view {entry.view}")
    location = ", ".join(damaged) if damaged else "the schema or the footer"
    return [f"{path} is damaged (its SHA-256 differs) in {location}; {REMEDY}"]
