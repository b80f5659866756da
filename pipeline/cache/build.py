"""Building a teacher cache: claim the folder, let builders make missing files, then write ``cache.json``.

If killed at any point, rerunning builds only the files that are not complete. Several builds of one cache share the
work: each file is locked by its builder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from graphkd.errors import ConfigError
from pipeline.cache.builder import CacheBuilder, Progress
from pipeline.cache.format import (
    CACHE_FILE,
    CACHE_VERSION,
    CachedShard,
    CacheJson,
    cache_index_name,
    cache_shard_name,
    is_built,
    read_cache_json,
)
from pipeline.cache.index import read_cache_index
from pipeline.cache.reader import check_file
from pipeline.config import TeacherConfig
from pipeline.context import RunContext
from pipeline.core.errors import CacheError, OutputError
from pipeline.core.files import sha256_file, stale_temp_files, write_json
from pipeline.core.locks import checked_lock, file_lock
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.storage.local import LocalStore
from pipeline.teacher.identity import Identity, check_identity
from pipeline.teacher.statistics import STATISTICS_FILE

IDENTITY_FILE = "identity.json"
REMEDY = "delete that folder, or give another teacher.cache"
CLAIM_LOCK, FINISH_LOCK = ".claim.lock", ".finish.lock"
POLL_S = 0.5  # between checks of what other builds are building


class Builders(Protocol):
    """One or several builders, local or on a cluster."""

    def statistics(self, progress: Progress) -> None:
        """Compute the teacher's statistics, on one of the builders, unless they exist."""
        ...

    def build(self, shards: Sequence[int], written: Callable[[int], None]) -> Iterator[tuple[int, bool]]:
        """Yield (shard, whether its file exists now) as they complete; ``written`` gets rows of a file in progress."""
        ...


class LocalBuilders:
    """One builder in this process."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self._builder = CacheBuilder(context)

    def statistics(self, progress: Progress) -> None:
        """Compute the statistics in this process."""
        self.context.ensure_statistics(progress)

    def build(self, shards: Sequence[int], written: Callable[[int], None]) -> Iterator[tuple[int, bool]]:
        """Build one file after the other."""
        return ((shard, self._builder.build(shard, written)) for shard in shards)


@contextmanager
def local_builders(context: RunContext) -> Iterator[Builders]:
    """A builder in this process."""
    yield LocalBuilders(context)


def build_cache(
    context: RunContext,
    builders: AbstractContextManager[Builders],
    progress: Callable[[str, int, int], None] | None = None,
) -> CacheJson:
    """Build the statistics and cache of a student's teacher, keeping files that exist.

    Args:
        context: of the student.
        builders: entered only if there is something to build.
        progress: called with (phase, pages done, pages in total).

    Raises:
        CacheError: if the folder belongs to another teacher, dataset or setting, naming it.
        OutputError: if the disk is full.
    """
    check_has_teacher(context.config.teacher)
    identity, folder = context.cache_identity, context.config.cache_folder
    if is_finished(folder):
        _claim(folder, identity)
        description = _check_complete(folder, identity)
        _remove_locks(folder)
        if (folder / STATISTICS_FILE).exists():
            _ = context.statistics  # verifies them
            return description
    with checked_lock(lambda: check_ownership(folder, identity), file_lock(folder / CLAIM_LOCK)):
        _claim(folder, identity)
    with builders as ready:
        ready.statistics(_phase(progress, "statistics"))
        _build_files(ready, folder, context.dataset, context.teacher.settings.views, _phase(progress, "features"))
    with file_lock(folder / FINISH_LOCK):
        if not is_finished(folder):
            write_json(folder / CACHE_FILE, _describe(folder, context).model_dump())
    _remove_locks(folder)
    return _check_complete(folder, identity)


def is_finished(folder: Path) -> bool:
    """Whether ``cache.json``, which is written last, exists."""
    return (folder / CACHE_FILE).exists()


def check_has_teacher(teacher: TeacherConfig | None) -> None:
    """Raise ConfigError if a config has no teacher to precompute."""
    if teacher is None:
        raise ConfigError("this config has no teacher; a cache is built for the config of a distilled student")


def _remove_locks(folder: Path) -> None:
    """Remove locks and temporary files of killed builders, once nobody needs them."""
    if [*stale_temp_files(folder), *folder.glob(".*.lock")]:
        with file_lock(folder / FINISH_LOCK):
            for path in [*stale_temp_files(folder), *folder.glob(".*.lock")]:
                path.unlink(missing_ok=True)


def _claim(folder: Path, identity: Identity) -> None:
    if not check_ownership(folder, identity):
        write_json(folder / IDENTITY_FILE, identity)


def check_ownership(folder: Path, identity: Identity) -> bool:
    """Whether ``folder`` holds this cache, finished or not.

    Raises:
        CacheError: if it holds another cache, naming what differs.
        OutputError: if it holds something else.
    """
    path = folder / IDENTITY_FILE
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise CacheError(f"{path} is damaged ({error}); {REMEDY}") from error
        check_identity(found, identity, folder, REMEDY)
        return True
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in names if name != STATISTICS_FILE and not name.startswith(".")]
    if others:
        raise OutputError(f"{folder} already holds something that is no cache (such as {others[0]!r}); {REMEDY}")
    return False


def _check_complete(folder: Path, identity: Identity) -> CacheJson:
    store = LocalStore(folder)
    description = read_cache_json(store)
    check_identity(description.identity, identity, folder, REMEDY)
    for shard in description.shards:
        check_file(store, shard)
        if not is_built(folder, shard.name):
            raise CacheError(f"{folder / cache_index_name(shard.name)} is missing from the cache; {REMEDY}")
    return description


def _build_files(builders: Builders, folder: Path, dataset: PackedDataset, views: int, progress: Progress) -> None:
    names = [cache_shard_name(shard.name) for shard in dataset.description.shards]
    rows = [size * views for size in dataset.shard_sizes]
    while missing := [shard for shard, name in enumerate(names) if not is_built(folder, name)]:
        done, any_built = sum(rows) - sum(rows[shard] for shard in missing), False
        progress(done, sum(rows))
        for shard, built in builders.build(missing, lambda written: progress(done + written, sum(rows))):  # noqa: B023
            if built:
                done, any_built = done + rows[shard], True
                progress(done, sum(rows))
        if not any_built:
            time.sleep(POLL_S)  # other builds are building the rest
    progress(sum(rows), sum(rows))


def _describe(folder: Path, context: RunContext) -> CacheJson:
    settings, detector = context.teacher.settings, context.teacher.detector_config
    shards = context.dataset.description.shards
    names = [cache_shard_name(shard.name) for shard in shards]
    side = (1, 2) if settings.store == "descriptors" else (detector.pooled_side, detector.pooled_side)
    return CacheJson(
        version=CACHE_VERSION,
        identity=context.cache_identity,
        precision=settings.cache_dtype,
        store=settings.store,
        views=settings.views,
        nodes=settings.nodes.count,
        classifies=detector.classifies_regions,
        feature_shape=(detector.fpn_channels, *side),
        num_classes=context.dataset.num_classes,
        classes=context.dataset.class_entries,
        shards=[
            _read_shard(folder, name, shard.samples * settings.views, shard.sha256, context.cache_identity)
            for name, shard in zip(names, shards, strict=True)
        ],
        indexes={name: sha256_file(folder / cache_index_name(name)) for name in names},
    )


def _read_shard(folder: Path, name: str, rows: int, tar_sha256: str, identity: Identity) -> CachedShard:
    store = LocalStore(folder)
    index = read_cache_index(store, name)
    shard = index.check(index.shard, identity, str(folder / name)).shard
    check_file(store, shard)
    if (shard.name, shard.rows, shard.tar_sha256) != (name, rows, tar_sha256):
        raise CacheError(f"{folder / cache_index_name(name)} is of another shard; delete it and build the cache again")
    return shard


def _phase(progress: Callable[[str, int, int], None] | None, name: str) -> Progress:
    return lambda done, total: progress(name, done, total) if progress is not None else None
