"""Training metrics: one JSON line per logged step, and TensorBoard events."""

from __future__ import annotations

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.core.distributed import World
from pipeline.core.jsonl import append_jsonl, read_jsonl
from pipeline.core.run_paths import METRICS, TENSORBOARD

log = logging.getLogger(__name__)

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere


class Metrics:
    """Averages loss terms between log lines. Only rank 0 writes.

    A line holds step, loss and terms (means per page over all ranks), lr, pages_per_s, data_wait (share of time that
    rank 0 waited for data, 0 to 1), memory_gb (peak so far of its GPU, else of its process), seconds (training time
    behind the step, without work lost to kills) and time (Unix seconds).
    """

    def __init__(self, folder: Path, world: World, every: int, start_step: int) -> None:
        self.world = world
        self.every = every
        self._path = folder / METRICS
        self._events = SummaryWriter(str(folder / TENSORBOARD), purge_step=start_step) if world.is_main else None
        self._begin = self._since = time.perf_counter()
        self._wait_s = 0.0
        self._pages = 0
        self._sums: dict[str, Tensor] = {}
        self.last_step = start_step
        """Newest step that was logged or page_progress."""

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last line, over all ranks, for a checkpoint. A collective."""
        sums = dict(zip(sorted(self._sums), self._summed(), strict=True))
        return {"sums": sums, "pages": self._pages, "seconds": time.perf_counter() - self._begin}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from :meth:`state_dict`, so that the next line equals that of an uninterrupted run."""
        if state is None:
            return
        self._pages = int(state["pages"])
        self._begin -= float(state.get("seconds", 0.0))
        own = state["sums"] if self.world.is_main else dict.fromkeys(state["sums"], 0.0)
        device = self.world.device
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in own.items()}

    def _summed(self) -> list[float]:
        if not self._sums:
            return []
        summed: list[float] = self.world.all_reduce_sum(
            torch.stack([self._sums[name] for name in sorted(self._sums)])
        ).tolist()
        return summed

    def add_data_wait(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._wait_s += seconds

    def exclude_time(self, seconds: float) -> None:
        """Exclude time spent on something else, such as evaluation, from the speed."""
        self._since += seconds

    def add(self, parts: list[dict[str, Tensor]], pages: int) -> None:
        """Add one step: loss terms [B] of each micro-batch, and its global number of pages."""
        for terms in parts:
            for name, values in terms.items():
                summed = values.detach().double().sum()
                self._sums[name] = self._sums[name] + summed if name in self._sums else summed
        self._pages += pages

    def log(self, step: int, rate: float, last: bool = False) -> dict[str, Any] | None:
        """Write a line if ``step`` is due. A collective, since terms are averaged over ranks."""
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
            "data_wait": self._wait_s / (now - self._since),
            "memory_gb": _memory_gb(self.world.device),
            "seconds": now - self._begin,
            "time": time.time(),
        }
        self._since, self._wait_s, self._pages, self._sums = now, 0.0, 0, {}
        self._write(line)
        return line

    def _write(self, line: dict[str, Any]) -> None:
        if self._events is None:
            return
        append_jsonl(self._path, line)
        log.info("%s", _log_message(line))
        for name, value in {"loss": line["loss"], "lr": line["lr"], **line["terms"]}.items():
            self._events.add_scalar(f"train/{name}", value, line["step"])
        for name in ("pages_per_s", "data_wait", "memory_gb"):
            self._events.add_scalar(f"speed/{name}", line[name], line["step"])

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Write an evaluation's metrics to TensorBoard."""
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(f"val/{name}", value, step)

    def close(self) -> None:
        """Flush TensorBoard events."""
        if self._events is not None:
            self._events.close()


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def _log_message(line: dict[str, Any]) -> str:
    terms = " ".join(f"{name} {value:.4g}" for name, value in line["terms"].items())
    return (
        f"step {line['step']}: loss {line['loss']:.4g} ({terms}), lr {line['lr']:.3g}, {line['pages_per_s']:.3g} "
        f"pages/s, {100 * line['data_wait']:.1f} % waiting for data, {line['memory_gb']:.2f} GB"
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics by step, without lines that are cut off. Steps repeated after a restart count once."""
    lines: list[dict[str, Any]] = []
    for line in read_jsonl(folder / METRICS):
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines
