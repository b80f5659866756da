"""What training says of itself: one JSON line per logged step, and TensorBoard events."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.runs.world import World

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Averages each loss term between log lines; only the leading rank writes.

    A line holds step, loss and terms (means per page over all ranks), lr, pages_per_s, data_wait (share of the time,
    0 to 1, that the leading rank waited for data) and seconds since this start.
    """

    def __init__(self, folder: Path, world: World, every: int, start_step: int) -> None:
        self.world = world
        self.every = every
        self._path = folder / METRICS_FILE
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step) if world.leads else None
        self._begin = self._since = time.perf_counter()
        self._waited = 0.0
        self._pages = 0
        self._sums: dict[str, Tensor] = {}
        self.last_step = start_step
        """The newest step that was taken in."""

    def state(self) -> dict[str, Any]:
        """What has come since the last line, over all ranks, for a checkpoint; a collective."""
        return {"sums": dict(zip(sorted(self._sums), self._summed(), strict=True)), "pages": self._pages}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from :meth:`state`: the next line is that of a run that was never stopped."""
        if state is None:
            return
        self._pages = int(state["pages"])
        own = state["sums"] if self.world.leads else dict.fromkeys(state["sums"], 0.0)
        device = self.world.device
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in own.items()}

    def _summed(self) -> list[float]:
        if not self._sums:
            return []
        summed: list[float] = self.world.sum(torch.stack([self._sums[name] for name in sorted(self._sums)])).tolist()
        return summed

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited += seconds

    def add(self, terms: dict[str, Tensor], pages: int) -> None:
        """Take in one step's terms, each [B], and its global number of pages."""
        for name, values in terms.items():
            summed = values.detach().double().sum()
            self._sums[name] = self._sums[name] + summed if name in self._sums else summed
        self._pages += pages

    def log(self, step: int, rate: float, last: bool = False) -> dict[str, Any] | None:
        """Write a line when ``step`` is due; a collective, since terms are averaged over ranks."""
        self.last_step = step
        if not self._sums or (step % self.every and not last):
            return None
        terms = {name: value / self._pages for name, value in zip(sorted(self._sums), self._summed(), strict=True)}
        now = time.perf_counter()
        line = {
            "step": step,
            "loss": sum(terms.values()),
            "lr": rate,
            "terms": terms,
            "pages_per_s": self._pages / (now - self._since),
            "data_wait": self._waited / (now - self._since),
            "seconds": now - self._begin,
        }
        self._since, self._waited, self._pages, self._sums = now, 0.0, 0, {}
        self._write(line)
        return line

    def _write(self, line: dict[str, Any]) -> None:
        if self._events is None:
            return
        with self._path.open("a", encoding="utf8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in {"loss": line["loss"], "lr": line["lr"], **line["terms"]}.items():
            self._events.add_scalar(f"train/{name}", value, line["step"])

    def close(self) -> None:
        """Flush TensorBoard events."""
        if self._events is not None:
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics by step; a step redone after a restart counts once, a cut-off last line not at all."""
    path = folder / METRICS_FILE
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines
