"""Terminal output: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipeline.core.progress import ProgressUpdate

# Paths and names of classes may look like Rich's markup.
console = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)
SHOWN_METRICS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "S",
    "ap_medium": "M",
    "ap_large": "L",
    "ar_100": "AR100",
}
PLAIN_SHARE = 0.1  # of the work, between two lines without a terminal


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[ProgressUpdate]:
    """Show a live bar on a terminal, else a line for each tenth; yields ``update(done, total, note)``."""
    if err.is_terminal:
        with _rich_progress() as progress:
            yield _bar_updater(progress, progress.add_task(title, total=None, note="", unit=unit))
    else:
        yield _plain_updater(title, unit)


def _rich_progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=err,
    )


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Rate per second, once known."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def _bar_updater(progress: Progress, task: TaskID) -> ProgressUpdate:
    def update(done: int, total: int, note: str) -> None:
        progress.update(task, completed=done, total=total, note=note)

    return update


def _plain_updater(title: str, unit: str) -> ProgressUpdate:
    reached, begin = [-1], list[tuple[float, int]]()

    def update(done: int, total: int, note: str) -> None:
        if not begin:
            begin.append((time.monotonic(), done))
        share = int(done / max(1, total) / PLAIN_SHARE)
        if share > reached[0]:
            reached[0] = share
            parts = f"{title}: {done}/{total}", unit, _pace(*begin[0], done, total), note
            err.print(" ".join(part for part in parts if part), highlight=False, soft_wrap=True)

    return update


def _pace(since: float, before: int, done: int, total: int) -> str:
    """Rate and time left, from the work done ``since`` that time."""
    seconds = time.monotonic() - since
    if done <= before or seconds < 1:
        return ""
    rate = (done - before) / seconds
    left = timedelta(seconds=round((total - done) / rate))
    return f"({rate:.1f}/s, {left} left)" if done < total else f"({rate:.1f}/s)"


@contextmanager
def page_progress(title: str, unit: str = "pages") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar; yields ``update(done, total)``."""
    with progress_bar(title, unit) as update:
        yield lambda done, total: update(done, total, "")


def print_json(content: Any) -> None:
    """Print one JSON document as the last line of stdout."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def percent(value: float | None) -> str:
    """A fraction as a percentage with two decimals; a dash if it is undefined (None or negative)."""
    return "-" if value is None or value < 0 else f"{100 * value:.2f}"


def metrics_table(rows: dict[str, dict[str, Any]], title: str = "COCO AP, %") -> Table:
    """Table of COCO metrics, one row per run."""
    table = Table(title=title)
    table.add_column("")
    for heading in SHOWN_METRICS.values():
        table.add_column(heading, justify="right")
    for label, metrics in rows.items():
        table.add_row(label, *(percent(metrics.get(name)) for name in SHOWN_METRICS))
    return table
