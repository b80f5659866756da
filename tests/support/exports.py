"""Trained runs and their exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import resolve
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.export.bundle import ExportSettings, export_bundle
from pipeline.predict.native import open_native
from pipeline.train.run import evaluate_run, train_run
from tests.support.runs import small_run


def train(folder: Path, packed: Path, steps: int, **detector: Any) -> tuple[Path, float]:
    """A run on ten pages, and its AP on them."""
    schedule = {"steps": steps, "batch": 4, "reference_batch": 4, "lr": 3e-3}
    content = small_run(folder, packed, "run", schedule=schedule, run={"checkpoint_every": 1000, "log_every": 100})
    content["detector"] |= detector
    context = RunContext(resolve(content, "run"))
    train_run(context)
    return context.config.folder, evaluate_run(context)["ap"]


def export(run: Path, out: Path, data: Path, **settings: Any) -> dict[str, Any]:
    """Export a run, compared and calibrated on the same pages; returns the parity."""
    dataset = PackedDataset(data)
    return export_bundle(open_native(run), out, dataset, dataset, ExportSettings(**settings)).to_dict()
