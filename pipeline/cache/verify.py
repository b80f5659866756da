"""Whether a finished cache is what it says: all its bytes, and some pages that the live teacher looks at again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from pipeline.cache.compare import LOSS_BOUND, Agreement, compare_with_live
from pipeline.cache.format import CachedShard, CacheJson, read_cache_json
from pipeline.cache.index import read_cache_index
from pipeline.cache.reader import CachedTeacher
from pipeline.cache.rows import check_file
from pipeline.config import RunConfig
from pipeline.core.errors import CacheError, DataError
from pipeline.core.files import sha256_file
from pipeline.core.parallel import map_unordered
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.local import LocalStore
from pipeline.teacher.identity import cache_identity, check_identity, open_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What verification found."""

    problems: list[str]
    agreement: Agreement | None
    """None where damage was found first, or no page was to be looked at."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"problems": self.problems, "agreement": self.agreement and asdict(self.agreement)}


def verify_cache(
    student: RunConfig,
    device: torch.device,
    pages: int = 16,
    workers: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> VerifyReport:
    """Check every byte of a student's cache, then ``pages`` pages against the live teacher.

    Raises CacheError where there is no finished cache, or it was made for something else, naming what differs.
    """
    dataset, teacher = PackedDataset(student.data.train, student.data.storage), open_teacher(student)
    identity = cache_identity(student, teacher, dataset)
    folder = student.cache_folder
    description = read_cache_json(LocalStore(folder))
    check_identity(description.identity, identity, folder, "give the config that it was made for")
    problems = check_bytes(folder, description, workers, partial(progress, "files"))
    if problems or not pages:
        return VerifyReport(problems=problems, agreement=None)
    cached = CachedTeacher(folder, dataset, identity)
    agreement = compare_with_live(student, cached, device, pages, partial(progress, "pages"))
    bound = LOSS_BOUND[description.precision]
    if not agreement.loss_difference <= bound:
        problems = [f"losses differ from the live teacher's by {agreement.loss_difference:.2%}, more than {bound:.2%}"]
    return VerifyReport(problems=problems, agreement=agreement)


def check_bytes(folder: Path, description: CacheJson, workers: int, progress: Callable[[int, int], None]) -> list[str]:
    """What is wrong with the files of a finished cache, one line each."""
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
    return [f"{path} is damaged (its SHA-256 differs) in {where}; copy it again, or build the cache again"]
