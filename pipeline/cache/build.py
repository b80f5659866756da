"""Building a teacher cache: claim the folder, let builders make what is missing, describe the whole at the end.

Killed anywhere and started again, it makes only the files that are not whole. Several builds of one cache share the
work: each file is locked by whoever makes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from graphkd.errors import ConfigError
from pipeline.cache.builder import CacheBuilder, Progress, is_built
from pipeline.cache.format import (
    CACHE_FILE,
    CACHE_VERSION,
    CachedShard,
    CacheJson,
    cache_index_name,
    cache_shard_name,
    read_cache_json,
)
from pipeline.cache.index import read_cache_index
from pipeline.cache.rows import check_file
from pipeline.config import RunConfig
from pipeline.core.errors import CacheError, OutputError
from pipeline.core.files import locked, sha256_file, stale_temp_files, write_json
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.local import LocalStore
from pipeline.teacher.identity import TeacherRun, cache_identity, check_identity, open_teacher, statistics_identity
from pipeline.teacher.statistics import STATISTICS_FILE, read_statistics

IDENTITY_FILE = "identity.json"
REMEDY = "delete that folder, or give another teacher.cache"
CLAIM_LOCK, FINISH_LOCK = ".claim.lock", ".finish.lock"
POLL_S = 0.5  # between looks at what other builds are at


class Builders(Protocol):
    """One or many builders, here or on a cluster."""

    def statistics(self, progress: Progress) -> None:
        """Have one of them compute the teacher's statistics."""
        ...

    def build(self, shards: Sequence[int], written: Callable[[int], None]) -> Iterator[tuple[int, bool]]:
        """(shard, whether its file is there now) as they come; ``written`` gets rows of a file that is being made."""
        ...


class LocalBuilders:
    """One builder in this process, which loads the teacher when it is first needed."""

    def __init__(self, student: RunConfig, device: torch.device) -> None:
        self.student = student
        self.device = device

    @cached_property
    def _builder(self) -> CacheBuilder:
        return CacheBuilder(self.student, self.device)

    def statistics(self, progress: Progress) -> None:
        """Compute them here."""
        self._builder.statistics(progress)

    def build(self, shards: Sequence[int], written: Callable[[int], None]) -> Iterator[tuple[int, bool]]:
        """One after the other."""
        return ((shard, self._builder.build(shard, written)) for shard in shards)


@contextmanager
def local_builders(student: RunConfig, device: torch.device) -> Iterator[Builders]:
    """A builder on this machine."""
    yield LocalBuilders(student, device)


def build_cache(
    student: RunConfig,
    builders: AbstractContextManager[Builders],
    progress: Callable[[str, int, int], None] | None = None,
) -> CacheJson:
    """Build statistics and cache for ``student``, going on with what is there.

    Args:
        student: whose config names teacher, dataset and cache.
        builders: entered where there is something to build.
        progress: called with (what is being done, pages done, pages in all).

    Raises:
        CacheError: where the folder belongs to another teacher, dataset or setting, naming it.
        OutputError: where the disk is full.
    """
    check_has_teacher(student)
    dataset, teacher = PackedDataset(student.data.train, student.data.storage), open_teacher(student)
    identity, folder = cache_identity(student, teacher, dataset), student.cache_folder
    if is_finished(folder):
        _claim(folder, identity)
        description = _require_whole(folder, identity)
        _tidy(folder)
        if (folder / STATISTICS_FILE).exists():
            read_statistics(folder, statistics_identity(student, teacher, dataset))
            return description
    with locked(folder / CLAIM_LOCK):
        _claim(folder, identity)
    with builders as ready:
        ready.statistics(_named(progress, "statistics"))
        _build_all(ready, folder, dataset, teacher.settings.views, _named(progress, "features"))
    with locked(folder / FINISH_LOCK):
        if not is_finished(folder):
            write_json(folder / CACHE_FILE, _describe(folder, dataset, teacher, identity).model_dump())
    _tidy(folder)
    return _require_whole(folder, identity)


def _tidy(folder: Path) -> None:
    """Remove locks and what killed builders left, once nobody has a use for them."""
    if [*stale_temp_files(folder), *folder.glob(".*.lock")]:
        with locked(folder / FINISH_LOCK):
            for path in [*stale_temp_files(folder), *folder.glob(".*.lock")]:
                path.unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether ``cache.json``, which comes last, is there."""
    return (folder / CACHE_FILE).exists()


def check_has_teacher(student: RunConfig) -> None:
    """Raise ConfigError where ``student`` names no teacher to precompute."""
    if student.teacher is None:
        raise ConfigError(f"{student.name} has no teacher; a cache is built for the config of a distilled student")


def _claim(folder: Path, identity: dict[str, str]) -> None:
    if not check_ownership(folder, identity):
        write_json(folder / IDENTITY_FILE, identity)


def check_ownership(folder: Path, identity: dict[str, str]) -> bool:
    """Whether ``folder`` holds this cache, finished or not.

    Raises CacheError where it holds another, naming what differs, OutputError where it holds something else.
    """
    path = folder / IDENTITY_FILE
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise CacheError(f"{path} is damaged ({error}); {REMEDY}") from error
        check_identity(found, identity, folder, REMEDY)
        return True
    others = [name.name for name in folder.iterdir() if name.name != STATISTICS_FILE] if folder.is_dir() else []
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise OutputError(f"{folder} already holds something that is no cache (such as {others[0]!r}); {REMEDY}")
    return False


def _require_whole(folder: Path, identity: dict[str, str]) -> CacheJson:
    store = LocalStore(folder)
    description = read_cache_json(store)
    check_identity(description.identity, identity, folder, REMEDY)
    for shard in description.shards:
        check_file(store, shard)
        if not is_built(folder, shard.name):
            raise CacheError(f"{folder / cache_index_name(shard.name)} is missing from the cache; {REMEDY}")
    return description


def _build_all(builders: Builders, folder: Path, dataset: PackedDataset, views: int, progress: Progress) -> None:
    names = [cache_shard_name(shard.name) for shard in dataset.description.shards]
    rows = [size * views for size in dataset.shard_sizes]
    while missing := [shard for shard, name in enumerate(names) if not is_built(folder, name)]:
        done, made = sum(rows) - sum(rows[shard] for shard in missing), False
        progress(done, sum(rows))
        for shard, built in builders.build(missing, lambda written: progress(done + written, sum(rows))):  # noqa: B023
            if built:
                done, made = done + rows[shard], True
                progress(done, sum(rows))
        if not made:
            time.sleep(POLL_S)  # other builds are at all that is left
    progress(sum(rows), sum(rows))


def _describe(folder: Path, dataset: PackedDataset, teacher: TeacherRun, identity: dict[str, str]) -> CacheJson:
    settings, detector = teacher.settings, teacher.config.detector
    names = [cache_shard_name(shard.name) for shard in dataset.description.shards]
    side = (1, 2) if settings.store == "descriptors" else (detector.pooled_side, detector.pooled_side)
    return CacheJson(
        version=CACHE_VERSION,
        identity=identity,
        precision=settings.cache_dtype,
        store=settings.store,
        views=settings.views,
        nodes=settings.nodes.count,
        classifies=detector.classifies_regions,
        feature_shape=(detector.fpn_channels, *side),
        num_classes=dataset.num_classes,
        shards=[
            _whole_shard(folder, name, shard.samples * settings.views, shard.sha256, identity)
            for name, shard in zip(names, dataset.description.shards, strict=True)
        ],
        indexes={name: sha256_file(folder / cache_index_name(name)) for name in names},
    )


def _whole_shard(folder: Path, name: str, rows: int, tar_sha256: str, identity: dict[str, str]) -> CachedShard:
    store = LocalStore(folder)
    index = read_cache_index(store, name)
    shard = index.check(index.shard, identity, str(folder / name)).shard
    check_file(store, shard)
    if (shard.name, shard.rows, shard.tar_sha256) != (name, rows, tar_sha256):
        raise CacheError(f"{folder / cache_index_name(name)} is of another shard; delete it and build the cache again")
    return shard


def _named(progress: Callable[[str, int, int], None] | None, what: str) -> Progress:
    return lambda done, total: progress(what, done, total) if progress is not None else None
