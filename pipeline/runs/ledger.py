"""The sample ledger: which samples each training step used, even if processes were killed.

A line is written before its step is computed. Gradients are averaged over all ranks, so a step that any rank finished
has lines of all ranks. An unfinished step is repeated, and its later lines count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from graphkd.batch import PageBatch
from pipeline.core.distributed import World
from pipeline.core.jsonl import read_jsonl
from pipeline.core.run_paths import LEDGER

WithBatch = TypeVar("WithBatch", bound=tuple[PageBatch, Any])


class Ledger:
    """Writer of one rank's lines. Creating it is a collective, since all ranks share one start time."""

    def __init__(self, folder: Path, world: World) -> None:
        own = time.time_ns() if world.is_main else 0
        self._start = int(world.all_reduce_sum(torch.tensor(own, device=world.device)))
        path = folder / LEDGER / f"start-{self._start}-rank-{world.rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf8")

    def record(self, batches: Iterable[WithBatch], first_step: int, parts: int = 1) -> Iterator[WithBatch]:
        """Write down the samples of each batch, then pass it on; ``parts`` batches make one step."""
        for number, item in enumerate(batches, start=first_step * parts):
            batch: PageBatch = item[0]
            self._file.write(json.dumps({"step": number // parts, "samples": batch.samples.tolist()}) + "\n")
            self._file.flush()  # to the operating system, which outlives this process
            yield item

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(folder: Path) -> dict[int, list[int]]:
    """Samples of every global step of a run, in the order of ranks. The last start that did a step counts."""
    steps: dict[int, tuple[int, list[int]]] = {}
    for path in sorted((folder / LEDGER).glob("start-*-rank-*.jsonl")):
        _, start, _, _ = path.stem.split("-")
        for line in read_jsonl(path):
            found, samples = steps.get(line["step"], (0, []))
            kept = samples if found == int(start) else []
            steps[line["step"]] = (int(start), kept + line["samples"])
    return {step: samples for step, (_, samples) in sorted(steps.items())}
