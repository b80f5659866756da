"""Training on a GPU: bit for bit after a kill with repeatable algorithms, and half precision near full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import RunConfig, resolve
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.runs.metrics import read_metrics
from pipeline.train.run import train_run
from tests.common import small_run

pytestmark = pytest.mark.gpu

CODE = """
import os, signal, sys, torch
from pathlib import Path
from pipeline.config import load_config
from pipeline.train.run import train_run

step, calls, last = torch.optim.AdamW.step, 0, int(sys.argv[2])

def dying(*arguments, **named):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments, **named)

torch.optim.AdamW.step = dying
train_run(load_config(Path(sys.argv[1])))
"""


def on_gpu(folder: Path, packed: Path, name: str, **compute: Any) -> RunConfig:
    content = small_run(folder, packed, name, schedule={"steps": 6}, compute=compute, engine={"device": "cuda"})
    content["data"]["val"] = None
    return resolve(content, name)


def trained(config: RunConfig, folder: Path, die_at: int = 0) -> dict[str, torch.Tensor]:
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", CODE, str(path)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if die_at:
        assert subprocess.run([*command, str(die_at)], env=environment, check=False).returncode == -signal.SIGKILL
    subprocess.run([*command, "0"], env=environment, check=True)
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 6
    return load_weights(checkpoint.weights)


def test_a_killed_run_ends_bit_for_bit_as_if_it_was_not(dataset_folder: Path, tmp_path: Path) -> None:
    whole = trained(on_gpu(tmp_path, dataset_folder, "whole", deterministic=True), tmp_path)
    killed = trained(on_gpu(tmp_path, dataset_folder, "killed", deterministic=True), tmp_path, die_at=4)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_half_precision_compiled_is_near_full_precision(dataset_folder: Path, tmp_path: Path) -> None:
    exact = on_gpu(tmp_path, dataset_folder, "exact")
    fast = on_gpu(tmp_path, dataset_folder, "fast", precision="bf16", channels_last=True, compile=True)
    train_run(exact)
    train_run(fast)
    first, second = (read_metrics(config.folder)[0]["loss"] for config in (exact, fast))
    assert second == pytest.approx(first, rel=0.03)
