"""Verifying a finished cache: all its bytes, and a sample of pages against the live teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from pipeline.cache.cached_teacher import CachedTeacher
from pipeline.cache.compare import MAX_LOSS_DIFFERENCE, Agreement, compare_with_live
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
    agreement: Agreement | None
    """None if damage was found first, or no page was to be compared."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"problems": self.problems, "agreement": self.agreement and asdict(self.agreement)}


def verify_cache(
    context: RunContext,
    pages: int = 16,
    workers: int = 0,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> VerifyReport:
    """Check every byte of a student's cache, then compare ``pages`` pages with the live teacher.

    Raises:
        CacheError: if there is no finished cache, or it was built from something else, naming what differs.
    """
    identity, folder = context.cache_identity, context.config.cache_folder
    description = read_cache_json(LocalStore(folder))
    check_identity(description.identity, identity, folder, "give the config that it was built for")
    problems = check_bytes(folder, description, workers, partial(progress, "files"))
    if problems or not pages:
        return VerifyReport(problems=problems, agreement=None)
    cached = CachedTeacher(folder, context.dataset, identity)
    agreement = compare_with_live(context, cached, pages, partial(progress, "pages"))
    limit = MAX_LOSS_DIFFERENCE[description.precision]
    if not agreement.loss_difference <= limit:
        problems = [f"losses differ from the live teacher's by {agreement.loss_difference:.2%}, more than {limit:.2%}"]
    return VerifyReport(problems=problems, agreement=agreement)


def check_bytes(folder: Path, description: CacheJson, workers: int, progress: Callable[[int, int], None]) -> list[str]:
    """Problems of a finished cache's files, one line each."""
    tasks = [(folder, shard, description) for shard in description.shards]
    problems: list[str] = []
    for done, found in enumerate(map_unordered(_check_shard, tasks, workers), start=1):
        problems += found
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
    bad = []
    with path.open("rb") as file:
        for entry in index.entries:
            file.seek(entry.offset)
            if xxhash.xxh3_64_intdigest(file.read(entry.bytes)) != entry.digest:
                bad.append(f"sample {entry.sample} view {entry.view}")
    where = ", ".join(bad) if bad else "the schema or the footer"
    return [f"{path} is damaged (its SHA-256 differs) in {where}; {REMEDY}"]
