"""The ledger of samples: which pages each step of a run was trained on, whatever was killed in between.

A line is written before its step is computed. Gradients are averaged over all ranks, so a step that was finished by any
rank has the lines of all; a step that was not is done again, and its later lines count instead.
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

LEDGER_FOLDER = "ledger"
WithBatch = TypeVar("WithBatch", bound=tuple[PageBatch, Any])


class Ledger:
    """Writes one rank's lines; starting it is a collective, since all ranks agree on the time of their start."""

    def __init__(self, folder: Path, world: World) -> None:
        own = time.time_ns() if world.is_main else 0
        self._start = int(world.sum(torch.tensor(own, device=world.device)))
        path = folder / LEDGER_FOLDER / f"start-{self._start}-rank-{world.rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf8")

    def recorded(self, batches: Iterable[WithBatch], first_step: int, parts: int = 1) -> Iterator[WithBatch]:
        """Pass on batches, ``parts`` a step, each with what else belongs to it, after writing down their samples."""
        for number, item in enumerate(batches, start=first_step * parts):
            batch: PageBatch = item[0]
            self._file.write(json.dumps({"step": number // parts, "samples": batch.samples.tolist()}) + "\n")
            self._file.flush()  # to the system, which survives this process
            yield item

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(folder: Path) -> dict[int, list[int]]:
    """Samples of every global step of a run, ranks put together in their order; the last start that did a step counts.

    A last line that was cut off is left out.
    """
    steps: dict[int, tuple[int, list[int]]] = {}
    for path in sorted((folder / LEDGER_FOLDER).glob("start-*-rank-*.jsonl")):
        _, start, _, _ = path.stem.split("-")
        for line in read_jsonl(path):
            found, samples = steps.get(line["step"], (0, []))
            kept = samples if found == int(start) else []
            steps[line["step"]] = (int(start), kept + line["samples"])
    return {step: samples for step, (_, samples) in sorted(steps.items())}
