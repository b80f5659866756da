"""The whole pipeline on synthetic pages: every stage is skipped where its result is complete already."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.build import build_cache, local_builders
from pipeline.config import RunConfig, load_config
from pipeline.core.errors import OutputError
from pipeline.core.files import ensure_owned_dir, write_json
from pipeline.core.progress import ProgressBar, phased_progress
from pipeline.core.ray_session import ray_session
from pipeline.data.prepare.pack import pack
from pipeline.report.compose import report_runs
from pipeline.report.runs import load_run
from pipeline.synth import write_pages
from pipeline.train.run import evaluate_run, train_run

MARKER = "quickstart.json"
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"  # beside this package, also when installed


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartSize:
    """How much is drawn and trained."""

    train_pages: int
    val_pages: int
    teacher_steps: int
    student_steps: int


SIZES = {
    "full": QuickstartSize(train_pages=640, val_pages=96, teacher_steps=520, student_steps=160),
    # Enough to run every stage and learn something, in a few minutes; its AP says nothing about the method.
    "small": QuickstartSize(train_pages=96, val_pages=24, teacher_steps=60, student_steps=40),
}
RUNS = {"teacher": "teacher", "student_alone": "student", "student_graphkd": "student-graphkd"}


def quickstart(out: Path, size: str, seed: int, stage: ProgressBar) -> dict[str, Any]:
    """Draw, pack, train, cache, distil, evaluate and report below ``out``; gives each run's figures and the seconds.

    ``stage(title, unit)`` opens a progress bar. Raises OutputError where ``out`` holds something else.
    """
    begin = time.monotonic()
    amount = SIZES[size]
    _claim(out, size, seed)
    _make_data(out, amount, seed, stage)
    configs = {name: _config(out, file, amount, seed) for name, file in RUNS.items()}
    _train(configs["teacher"], stage)
    _build_cache(configs["student_graphkd"], stage)
    with ray_session(configs["student_alone"].engine.max_workers):
        _train(configs["student_alone"], stage)
        _train(configs["student_graphkd"], stage)
    figures = {name: _evaluate(config, stage) for name, config in configs.items()}
    runs = [load_run(config.folder) for config in configs.values()]
    report_runs(runs, out / "report.html", title="GraphKD quickstart")
    return {**figures, "seconds": round(time.monotonic() - begin, 1)}


def _claim(out: Path, size: str, seed: int) -> None:
    ensure_owned_dir(out, MARKER, "quickstart")
    path, content = out / MARKER, {"size": size, "seed": seed}
    if path.exists() and json.loads(path.read_text()) != content:
        raise OutputError(f"{out} holds a quickstart of {path.read_text().strip()}; give another --out, or delete it")
    write_json(path, content)


def _make_data(out: Path, amount: QuickstartSize, seed: int, stage: ProgressBar) -> None:
    _make_split(out, "train", amount.train_pages, 2 * seed, stage)
    _make_split(out, "val", amount.val_pages, 2 * seed + 1, stage)


def _make_split(out: Path, split: str, count: int, seed: int, stage: ProgressBar) -> None:
    pages = out / "pages" / split
    with stage(f"drawing {split} pages", "pages") as update:
        write_pages(pages, count=count, seed=seed, progress=lambda done: update(done, count, ""))
    with stage(f"packing {split} pages", "pages") as update:
        pack(
            pages / "annotations.json",
            pages / "images",
            out / "data" / split,
            samples_per_shard=64,
            workers=1,  # another process would take longer to start than these pages to pack
            progress=lambda done, total: update(done, total, ""),
        )


def _config(out: Path, file: str, amount: QuickstartSize, seed: int) -> RunConfig:
    path = CONFIGS / f"{file}.yaml"
    plain = load_config(path)
    steps = amount.teacher_steps if file == "teacher" else amount.student_steps
    overrides = [
        f"data.train={out / 'data' / 'train'}",
        f"data.val={out / 'data' / 'val'}",
        f"run.folder={out / plain.name}",
        f"run.seed={seed}",
        f"schedule.steps={steps}",
    ]
    if plain.teacher is not None:
        overrides.append(f"teacher.run={out / plain.teacher.run.name}")
    return load_config(path, overrides)


def _train(config: RunConfig, stage: ProgressBar) -> None:
    steps = config.schedule.scaled().steps
    with stage(f"training {config.name}", "steps") as update:
        train_run(config, lambda line: update(line["step"], steps, f"loss {line['loss']:.3f}"))


def _build_cache(config: RunConfig, stage: ProgressBar) -> None:
    with phased_progress(stage, "teacher", "pages") as update:
        build_cache(config, local_builders(config, torch.device("cpu")), update)


def _evaluate(config: RunConfig, stage: ProgressBar) -> dict[str, Any]:
    with stage(f"evaluating {config.name}", "pages") as update:
        return evaluate_run(config, progress=lambda done, total: update(done, total, ""))
