"""Following a run from outside through its metrics file, the same for every engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.run_paths import METRICS
from pipeline.runs.metrics import read_metrics

POLL_S = 0.5


@contextmanager
def watch_metrics(folder: Path, callback: Callable[[dict[str, Any]], None] | None) -> Iterator[None]:
    """Call ``callback`` from a thread with each new last line of the run's metrics."""
    if callback is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, callback, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(folder: Path, callback: Callable[[dict[str, Any]], None], stop: threading.Event) -> None:
    path, seen = folder / METRICS, -1
    while True:
        ended = stop.wait(POLL_S)
        size = path.stat().st_size if path.exists() else 0
        if size != seen and (lines := read_metrics(folder)):
            callback(lines[-1])
        seen = size
        if ended:
            return
