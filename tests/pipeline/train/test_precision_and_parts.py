"""How a run is computed: parts of a batch, moving average, precision, memory format, compilation, finite losses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from graphkd.errors import ConfigError
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.core.errors import TrainingError
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.runs.ledger import read_ledger
from pipeline.runs.metrics import read_metrics
from pipeline.train.run import train_run
from tests.support.processes import end_ranks, output_of, spawn_ranks
from tests.support.runs import build_here, small_run

pytestmark = pytest.mark.e2e

# Small plain steps: at random weights, large ones let rounding grow a hundredfold from one step to the next.
PLAIN = {"optimizer": "sgd", "lr": 1e-5}


def run(folder: Path, packed: Path, name: str, **changes: Any) -> RunConfig:
    merged = {"data": {"val": None}, **changes, "schedule": {**PLAIN, **changes.get("schedule", {})}}
    return resolve(small_run(folder, packed, name, **merged), name)


def student(folder: Path, packed: Path, name: str, **changes: Any) -> RunConfig:
    teacher = {"run": str(folder / "teacher"), "statistics_pages": 4, "nodes": {"count": 8, "min_score": 0.0}}
    teacher |= changes.pop("teacher", {})
    return run(folder, packed, name, **{"method": {"name": "graphkd"}, **changes, "teacher": teacher})


@pytest.fixture(scope="module")
def folder(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a teacher, its cache, and a student trained plainly."""
    made = tmp_path_factory.mktemp("computing")
    train_run(RunContext(run(made, dataset_folder, "teacher", schedule={"optimizer": "adamw", "lr": 1e-3})))
    build_here(student(made, dataset_folder, "any"))
    train_run(RunContext(student(made, dataset_folder, "plain", schedule={"batch": 4, "reference_batch": 4})))
    return made


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return load_weights(checkpoint.folder / name)


def test_parts_of_a_batch_give_the_losses_and_weights_of_the_whole(folder: Path, dataset_folder: Path) -> None:
    batch = {"batch": 4, "reference_batch": 4}
    parted = student(folder, dataset_folder, "parted", schedule={**batch, "accumulate": 3}, run={"ledger": True})
    train_run(RunContext(parted))
    assert losses(parted.folder) == pytest.approx(losses(folder / "plain"), rel=1e-5)
    whole, ours = tensors(folder / "plain"), tensors(parted.folder)
    assert all(torch.allclose(whole[name], ours[name], rtol=1e-4, atol=1e-6) for name in whole)
    assert [len(samples) for samples in read_ledger(parted.folder).values()] == [4] * 4


@pytest.mark.parametrize(("ranks", "accumulate"), [(3, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_give_the_same_losses(
    ranks: int, accumulate: int, folder: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    """Eight pages on three ranks are unequal shares; two ranks with two parts each take turns at averaging."""
    changes: dict[str, Any] = {"schedule": {"batch": 8, "reference_batch": 8}, "run": {"ledger": True}}
    changes["engine"] = {"threads": 1}
    teacher = {"run": str(folder / "teacher")}
    one = student(tmp_path, dataset_folder, "one", **changes, teacher=teacher)
    train_run(RunContext(one))
    changes["schedule"] |= {"accumulate": accumulate}
    many = student(tmp_path, dataset_folder, "many", **changes, teacher=teacher)
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump(many.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipeline.cli.main", "train", str(path)]
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = {command[2:]!r}; from pipeline.cli.main import main; main()",
    ]
    processes = spawn_ranks(command, ranks)
    try:
        codes = [process.wait(timeout=120) for process in processes]
        errors = output_of(processes)
    finally:
        end_ranks(processes)
    assert codes == [0] * ranks, errors
    assert read_ledger(many.folder) == read_ledger(one.folder)
    # Rounding can exchange two proposals of equal score, and with them a sampled region.
    assert losses(many.folder) == pytest.approx(losses(one.folder), rel=1e-4)


def test_a_batch_that_cannot_be_cut_so_is_refused_with_the_nearest(dataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"each of schedule\.accumulate=3 parts.*nearest .* schedule\.batch=3"):
        run(tmp_path, dataset_folder, "cut", schedule={"accumulate": 3})


def test_the_moving_average_follows_its_formula_and_is_evaluated(folder: Path, dataset_folder: Path) -> None:
    changes: dict[str, Any] = {"schedule": {"optimizer": "adamw", "lr": 1e-3, "ema": 0.75, "policy": "constant"}}
    changes |= {"run": {"checkpoint_every": 1, "keep": 9}}
    config = run(folder, dataset_folder, "averaged", **changes)
    evaluated = train_run(RunContext(config))
    expected: dict[str, torch.Tensor] = {}
    for path in sorted((config.folder / "checkpoints").iterdir()):
        weights = load_weights(path / "model.safetensors")
        expected = {
            name: value if not expected else 0.75 * expected[name] + 0.25 * value for name, value in weights.items()
        }
    average = load_weights(evaluated.weights)
    assert evaluated.weights.name == "average.safetensors"
    assert all(torch.allclose(average[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.equal(
        average["detector.model.rpn.head.conv.0.0.weight"], weights["detector.model.rpn.head.conv.0.0.weight"]
    )


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_half_precision_is_close_and_resumes_to_the_bit(
    precision: str, folder: Path, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"schedule": {"steps": 3, "ema": 0.5}}
    changes |= {"compute": {"precision": precision}, "run": {"checkpoint_every": 1, "keep": 9}}
    whole = student(folder, dataset_folder, f"{precision}-whole", **changes)
    train_run(RunContext(whole))
    # Only the first: fp16 leaves out steps until it has found a scale.
    exact = student(folder, dataset_folder, f"{precision}-exact", schedule={"steps": 1})
    train_run(RunContext(exact))
    assert losses(whole.folder)[0] == pytest.approx(losses(exact.folder)[0], rel=0.02)
    assert losses(whole.folder)[0] != losses(exact.folder)[0]
    parted = student(folder, dataset_folder, f"{precision}-parted", **changes)
    train_run(RunContext(parted))
    for path in sorted((parted.folder / "checkpoints").iterdir())[2:]:
        path.rename(parted.folder / path.name)
    train_run(RunContext(parted))
    for name in ("model.safetensors", "average.safetensors"):
        first, second = tensors(whole.folder, name), tensors(parted.folder, name)
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
    assert losses(parted.folder) == losses(whole.folder)


def test_a_loss_too_large_for_fp16_is_scaled_down_and_its_step_left_out(folder: Path, dataset_folder: Path) -> None:
    from torch.amp.grad_scaler import GradScaler

    from pipeline.core.distributed import World
    from pipeline.train.nonfinite import is_nonfinite

    scaler = GradScaler("cpu", init_scale=4.0)
    infinite, fine = torch.tensor(float("inf")), [(torch.tensor([3]), {"loss": torch.tensor([1.0])})]
    nonfinite = [(torch.tensor([3]), {"loss": torch.tensor([float("nan")])})]
    scaler.scale(torch.tensor(1.0))  # which makes it begin
    assert not is_nonfinite(infinite, fine, scaler, World())
    assert is_nonfinite(infinite, nonfinite, scaler, World())
    assert is_nonfinite(infinite, fine, GradScaler("cpu", enabled=False), World())
    assert not is_nonfinite(torch.tensor(1.0), fine, scaler, World())
    tiny = GradScaler("cpu", init_scale=0.5)
    tiny.scale(torch.tensor(1.0))
    assert is_nonfinite(infinite, fine, tiny, World()), "nothing is left to scale down"


@pytest.mark.parametrize(
    "compute",
    [
        {"channels_last": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
        pytest.param({"compile": "step"}, marks=pytest.mark.slow),
    ],
    ids=["channels_last", "backbone", "step"],
)
def test_memory_format_and_compilation_change_rounding_only(
    compute: dict[str, Any], folder: Path, dataset_folder: Path
) -> None:
    name = "-".join(map(str, *compute.items()))
    config = student(folder, dataset_folder, name, schedule={"batch": 4, "reference_batch": 4}, compute=compute)
    train_run(RunContext(config))
    assert losses(config.folder) == pytest.approx(losses(folder / "plain"), rel=1e-4)
    assert tensors(config.folder).keys() == tensors(folder / "plain").keys()


@pytest.mark.parametrize("nodes", ["fixed", "student"])
def test_a_live_teacher_in_half_precision_gives_nearly_the_same(
    nodes: str, folder: Path, dataset_folder: Path, tmp_path: Path
) -> None:
    method = {"name": "dsig", "nodes": nodes}
    changes: dict[str, Any] = {"method": method, "schedule": {"steps": 1}, "run": {"log_every": 1}}
    teacher = {"run": str(folder / "teacher"), "signals": "live"}
    found = []
    for precision in ("fp32", "bf16"):
        compute = {"teacher_precision": precision}
        config = student(tmp_path, dataset_folder, precision, **changes, teacher=teacher, compute=compute)
        train_run(RunContext(config))
        found.append(losses(config.folder)[0])
    assert found[1] == pytest.approx(found[0], rel=0.05) and found[1] != found[0]


WORKER = """
import sys
import torch
from graphkd.distill import TrainingStep
from pipeline.cli.main import main

forward, calls = TrainingStep.forward, 0

def nonfinite_forward(self, batch, signals):
    global calls
    calls += 1
    terms = forward(self, batch, signals)
    bad = (batch.samples == {sample}).to(terms["loss_box"])
    return terms | {{"loss_box": terms["loss_box"] * torch.where(bad > 0, torch.nan, 1.0)}}

TrainingStep.forward = nonfinite_forward
sys.argv = ["graphkd", "train", {config!r}]
main()
"""


def test_a_page_with_a_nonfinite_loss_stops_all_ranks_before_the_step(dataset_folder: Path, tmp_path: Path) -> None:
    from pipeline.data.format.dataset import PackedDataset

    changes: dict[str, Any] = {"schedule": {"steps": 5}, "run": {"ledger": True, "checkpoint_every": 100}}
    whole = run(tmp_path, dataset_folder, "whole", **changes)
    train_run(RunContext(whole))
    ledger = read_ledger(whole.folder)
    seen = [sample for step in range(2) for sample in ledger[step]]
    step = next(step for step in range(2, 5) if not set(ledger[step]) & set(seen))
    sample = ledger[step][1]  # on the second of two ranks
    bad_step = next(step for step in ledger if sample in ledger[step])
    config = run(tmp_path, dataset_folder, "spoiled", **changes)
    path = tmp_path / "spoiled.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    processes = spawn_ranks([sys.executable, "-c", WORKER.format(sample=sample, config=str(path))], 2)
    try:
        assert [process.wait(timeout=120) for process in processes] == [1, 1]
        output = output_of(processes)
    finally:
        end_ranks(processes)
    key = PackedDataset(dataset_folder).sample(sample).key
    assert output.count(f"step {bad_step}: gradients are not finite (loss_box nan on {key}") == 2
    assert output.count("loss_box nan); the step was not taken") == 2
    last = newest_checkpoint(config.folder / "checkpoints")
    assert last is not None and last.step == bad_step
    assert all(torch.isfinite(value).all() for value in load_weights(last.weights).values())
    assert max(read_ledger(config.folder)) == bad_step


def test_nonfinite_weights_are_not_kept(dataset_folder: Path, tmp_path: Path) -> None:
    config = run(tmp_path, dataset_folder, "explodes", schedule={"lr": 1e12, "steps": 6}, run={"checkpoint_every": 1})
    with pytest.raises(TrainingError, match="gradients are not finite"):
        train_run(RunContext(config))
    last = newest_checkpoint(config.folder / "checkpoints")
    assert last is None or all(torch.isfinite(value).all() for value in load_weights(last.weights).values())


def test_deterministic_algorithms_are_enabled(dataset_folder: Path, tmp_path: Path) -> None:
    config = run(tmp_path, dataset_folder, "exact", compute={"deterministic": True}, run={"log_every": 4})
    try:
        train_run(RunContext(config))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
