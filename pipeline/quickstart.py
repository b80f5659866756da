"""The whole pipeline on synthetic pages. Every stage that is already complete is skipped."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.build import build_cache, local_builders
from pipeline.config import RunConfig, load_config
from pipeline.context import RunContext
from pipeline.core.errors import OutputError
from pipeline.core.files import ensure_owned_dir, write_json
from pipeline.core.locks import checked_lock, file_lock
from pipeline.core.progress import ProgressBar, phased_progress
from pipeline.core.ray_session import ray_session
from pipeline.data.prepare.pack import pack
from pipeline.report.html import report_runs
from pipeline.report.runs import load_run
from pipeline.synth import write_pages
from pipeline.train.run import evaluate_run, train_run

MARKER, LOCK = "quickstart.json", ".claim.lock"
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"  # beside this package, also when installed


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartSize:
    """Amount of data and training."""

    train_pages: int
    val_pages: int
    teacher_steps: int
    student_steps: int


SIZES = {
    "full": QuickstartSize(train_pages=640, val_pages=96, teacher_steps=520, student_steps=160),
    # Enough to run every stage and learn something within minutes. Its AP says nothing about the method.
    "small": QuickstartSize(train_pages=96, val_pages=24, teacher_steps=60, student_steps=40),
}
RUNS = {"teacher": "teacher", "student_alone": "student", "student_graphkd": "student-graphkd"}


def quickstart(out: Path, size: str, seed: int, bar: ProgressBar) -> dict[str, Any]:
    """Draw, pack, train, cache, distil, evaluate and report below ``out``. Return each run's metrics and the seconds.

    Raises:
        OutputError: if ``out`` holds something else.
    """
    begin = time.monotonic()
    amount = SIZES[size]
    _claim(out, size, seed)
    _make_split(out, "train", amount.train_pages, 2 * seed, bar)
    _make_split(out, "val", amount.val_pages, 2 * seed + 1, bar)
    contexts = {name: RunContext(_config(out, file, amount, seed)) for name, file in RUNS.items()}
    _train(contexts["teacher"], bar)
    with phased_progress(bar, "teacher", "pages") as update:
        build_cache(contexts["student_graphkd"], local_builders(contexts["student_graphkd"]), update)
    with ray_session(contexts["student_alone"].config.engine.max_workers):
        _train(contexts["student_alone"], bar)
        _train(contexts["student_graphkd"], bar)
    metrics = {name: _evaluate(context, bar) for name, context in contexts.items()}
    runs = [load_run(context.config.folder) for context in contexts.values()]
    report_runs(runs, out / "report.html", title="GraphKD quickstart")
    return {**metrics, "seconds": round(time.monotonic() - begin, 1)}


def _claim(out: Path, size: str, seed: int) -> None:
    with checked_lock(lambda: ensure_owned_dir(out, MARKER, "quickstart"), file_lock(out / LOCK)):
        _store_marker(out, size, seed)


def _store_marker(out: Path, size: str, seed: int) -> None:
    path, content = out / MARKER, {"size": size, "seed": seed}
    if path.exists() and json.loads(path.read_text()) != content:
        raise OutputError(f"{out} holds a quickstart of {path.read_text().strip()}; give another --out, or delete it")
    write_json(path, content)


def _make_split(out: Path, split: str, count: int, seed: int, bar: ProgressBar) -> None:
    pages = out / "pages" / split
    with bar(f"drawing {split} pages", "pages") as update:
        write_pages(pages, count=count, seed=seed, progress=lambda done: update(done, count, ""))
    with bar(f"packing {split} pages", "pages") as update:
        pack(
            pages / "annotations.json",
            pages / "images",
            out / "data" / split,
            samples_per_shard=64,
            workers=1,  # starting another process takes longer than packing these pages
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


def _train(context: RunContext, bar: ProgressBar) -> None:
    steps = context.config.schedule.scaled().steps
    with bar(f"training {context.config.name}", "steps") as update:
        train_run(context, lambda line: update(line["step"], steps, f"loss {line['loss']:.3f}"))


def _evaluate(context: RunContext, bar: ProgressBar) -> dict[str, Any]:
    with bar(f"evaluating {context.config.name}", "pages") as update:
        return evaluate_run(context, progress=lambda done, total: update(done, total, ""))
