"""Log file of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.distributed import World
from pipeline.core.run_paths import LOG


@contextmanager
def log_to_file(folder: Path, world: World) -> Iterator[None]:
    """On rank 0, also write the pipeline's log to the run folder."""
    if not world.is_main:
        yield
        return
    handler = logging.FileHandler(folder / LOG, encoding="utf8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    logger = logging.getLogger("pipeline")
    previous_level = logger.level
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous_level)
        handler.close()
