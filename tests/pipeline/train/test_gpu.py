"""Training on a GPU: bit for bit after a kill with repeatable algorithms, and half precision near full."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from graphkd.batch import PageBatch
from graphkd.distill import TrainingStep
from pipeline.cache.build import build_cache, local_builders
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.runs.metrics import read_metrics
from pipeline.teacher.source import SignalSource
from pipeline.train.run import train_run
from pipeline.train.signal_source import signal_source
from pipeline.training_step import build_training_step
from tests.support.runs import small_run

pytestmark = pytest.mark.gpu

CODE = """
import os, signal, sys, torch
from pathlib import Path
from pipeline.config import load_config
from pipeline.context import RunContext
from pipeline.teacher.source import SignalSource
from pipeline.train.run import train_run
from pipeline.train.signal_source import signal_source
from pipeline.training_step import build_training_step

step, calls, last = torch.optim.AdamW.step, 0, int(sys.argv[2])

def dying(*arguments, **named):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **named)

torch.optim.AdamW.step = dying
train_run(RunContext(load_config(Path(sys.argv[1]))))
"""


def on_gpu(folder: Path, packed: Path, name: str, **changes: Any) -> RunConfig:
    changes = {"schedule": {"steps": 6}, "engine": {"device": "cuda"}, **changes}
    content = small_run(folder, packed, name, **changes)
    content["data"]["val"] = None
    return resolve(content, name)


@pytest.fixture(scope="module")
def teacher(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained teacher with the cache of its signals, as the section of a student's config."""
    folder = tmp_path_factory.mktemp("teacher")
    settings = {"run": str(folder / "teacher"), "statistics_pages": 4, "cache": str(folder / "cache")}
    train_run(RunContext(on_gpu(folder, dataset_folder, "teacher")))
    student = on_gpu(folder, dataset_folder, "student", teacher=settings, method={"name": "graphkd"})
    build_cache(RunContext(student), local_builders(RunContext(student)))
    return settings


def start(config: RunConfig, die_at: int = 0) -> subprocess.Popen[bytes]:
    path = config.folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return subprocess.Popen([sys.executable, "-c", CODE, str(path), str(die_at)])


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 6
    return load_weights(checkpoint.weights)


@pytest.mark.parametrize("signals", [None, "cache", "live"])
def test_a_killed_run_ends_bit_for_bit_as_if_it_was_not(
    dataset_folder: Path, tmp_path: Path, teacher: dict[str, Any], signals: str | None
) -> None:
    changes: dict[str, Any] = {"compute": {"deterministic": True}}
    if signals:
        changes |= {"method": {"name": "graphkd"}, "teacher": {**teacher, "signals": signals}}
    whole, killed = (on_gpu(tmp_path, dataset_folder, name, **changes) for name in ("whole", "killed"))
    undisturbed, dying = start(whole), start(killed, die_at=4)
    assert dying.wait() == -signal.SIGKILL
    assert start(killed).wait() == 0 and undisturbed.wait() == 0
    expected, found = weights(whole), weights(killed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_half_precision_compiled_is_near_full_precision(dataset_folder: Path, tmp_path: Path) -> None:
    exact = on_gpu(tmp_path, dataset_folder, "exact")
    compute = {"precision": "bf16", "channels_last": True, "compile": True}
    fast = on_gpu(tmp_path, dataset_folder, "fast", compute=compute)
    train_run(RunContext(exact))
    train_run(RunContext(fast))
    first, second = (read_metrics(config.folder)[0]["loss"] for config in (exact, fast))
    assert second == pytest.approx(first, rel=0.03)


def test_a_step_never_waits_for_the_gpu(dataset_folder: Path, tmp_path: Path, teacher: dict[str, Any]) -> None:
    """Neither a student alone nor one with a live teacher, from the batch on the host to the gradients."""
    device = torch.device("cuda")
    for name, changes in (
        ("alone", {}),
        ("live", {"method": {"name": "graphkd"}, "teacher": {**teacher, "signals": "live"}}),
    ):
        context = RunContext(on_gpu(tmp_path, dataset_folder, name, **changes))
        step, source = build_training_step(context, device), signal_source(context, device)
        pages = PageDataset(context.dataset, context.config.data.view, 0, EVALUATION_VIEW)
        batch = collate([pages[SampleRef(0, sample)] for sample in range(4)]).pin_memory()

        def work(batch: PageBatch = batch, step: TrainingStep = step, source: SignalSource = source) -> None:
            moved = batch.to(device)
            losses = step(moved, source.signals(moved))
            torch.stack([values.sum() for values in losses.values()]).sum().backward()

        work()  # kernels are chosen, constants are made
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_is_near_an_eager_one(dataset_folder: Path, tmp_path: Path) -> None:
    plain = on_gpu(tmp_path, dataset_folder, "plain")
    compiled = on_gpu(tmp_path, dataset_folder, "compiled", compute={"compile": "step"})
    for config in (plain, compiled):
        train_run(RunContext(config))
    first, second = (read_metrics(config.folder)[0]["loss"] for config in (plain, compiled))
    assert second == pytest.approx(first, rel=1e-3)
