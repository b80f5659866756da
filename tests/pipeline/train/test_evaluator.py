"""Evaluation during training: exact when shared out, the best checkpoint kept, an early end, and kills in between."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from graphkd.errors import ConfigError
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.core.errors import OutputError
from pipeline.models import best_checkpoint
from pipeline.runs.attempts import read_attempts
from pipeline.runs.checkpoint import newest_checkpoint
from pipeline.runs.evaluations import best_step, out_of_patience, read_evaluations
from pipeline.runs.metrics import read_metrics
from pipeline.runs.run_folder import run_lock
from pipeline.train.run import evaluate_run, is_finished, train_run
from tests.support.processes import end_ranks, output_of, spawn_ranks
from tests.support.runs import small_run

pytestmark = pytest.mark.e2e


def run(folder: Path, packed: Path, name: str, **changes: Any) -> RunConfig:
    changes["run"] = {"eval_every": 2, **changes.get("run", {})}
    changes["schedule"] = {"batch": 4, "reference_batch": 4, **changes.get("schedule", {})}
    changes["detector"] = {"score_threshold": 0.0}  # so that a detector that has learned little says something
    return resolve(small_run(folder, packed, name, **changes), name)


@pytest.fixture(scope="module")
def evaluated(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of four steps that was evaluated twice."""
    config = run(tmp_path_factory.mktemp("evaluated"), dataset_folder, "one", engine={"threads": 1})
    train_run(RunContext(config))
    return config


def test_what_is_evaluated_in_training_is_what_its_checkpoint_gives(evaluated: RunConfig) -> None:
    evaluations = read_evaluations(evaluated.folder)
    assert [line["step"] for line in evaluations] == [2, 4] and [line["pages"] for line in evaluations] == [10, 10]
    best = best_checkpoint(evaluated.folder)
    figures = evaluate_run(RunContext(evaluated))
    assert best.step == figures["step"] == best_step(evaluations)
    (line,) = [line for line in evaluations if line["step"] == best.step]
    assert {name: line[name] for name in ("ap", "ar_100", "per_class")} == {
        name: figures[name] for name in ("ap", "ar_100", "per_class")
    }


def test_evaluating_changes_nothing_of_training(evaluated: RunConfig, dataset_folder: Path) -> None:
    plain = run(evaluated.folder.parent, dataset_folder, "plain", run={"eval_every": 0}, engine={"threads": 1})
    train_run(RunContext(plain))
    first, second = newest_checkpoint(evaluated.folder / "checkpoints"), newest_checkpoint(plain.folder / "checkpoints")
    assert first is not None and second is not None and first.weights_sha256 == second.weights_sha256


def test_three_ranks_evaluate_ten_pages_once_each(evaluated: RunConfig, dataset_folder: Path, tmp_path: Path) -> None:
    """Three ranks start from weights of one and evaluate what it did, without a step of their own in between."""
    folder = tmp_path / "three"
    shutil.copytree(evaluated.folder, folder)
    (folder / "evaluations.jsonl").unlink()
    content = evaluated.model_dump(mode="json")
    content["run"]["folder"] = str(folder)
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump(content))
    assert not is_finished(RunContext(resolve(content, "three"))), "the last checkpoint is still to be evaluated"
    code = "import sys; from pipeline.cli.main import main; main()"
    processes = spawn_ranks([sys.executable, "-c", code, "train", str(path)], 3)
    try:
        codes = [process.wait(timeout=120) for process in processes]
        assert codes == [0, 0, 0], output_of(processes)
    finally:
        end_ranks(processes)
    before = {line["step"]: line for line in read_evaluations(evaluated.folder)}
    assert read_evaluations(folder) == [before[4]]


def test_a_run_ends_early_when_its_accuracy_does_not_rise(dataset_folder: Path, tmp_path: Path) -> None:
    still = {"schedule": {"lr": 1e-12, "steps": 9, "optimizer": "sgd"}}
    config = run(tmp_path, dataset_folder, "early", run={"eval_every": 1, "patience": 2, "keep": 1}, **still)
    checkpoint = train_run(RunContext(config))
    assert [line["step"] for line in read_evaluations(config.folder)] == [1, 2, 3]
    assert checkpoint.step == 1, "the first of equals is the best, and was kept"
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]
    assert is_finished(RunContext(config))
    train_run(RunContext(config))
    assert len(read_attempts(config.folder)) == 1, "it is not started again"


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(evaluated: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(evaluated.folder, folder)
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    (folder / "evaluations.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    config = evaluated.model_copy(update={"run": evaluated.run.model_copy(update={"folder": folder})})
    train_run(RunContext(config))
    assert read_evaluations(folder) == read_evaluations(evaluated.folder)
    assert [start.step for start in read_attempts(folder)] == [0, 2]


@pytest.mark.parametrize(
    ("scores", "patience", "best", "ends"),
    [
        ([], 1, None, False),
        ([0.1], 1, 1, False),
        ([0.1, 0.1], 1, 1, True),
        ([0.1, 0.2, 0.2], 2, 2, False),
        ([0.1, 0.3, 0.2, 0.3], 2, 2, True),
        ([0.1, 0.0, 0.0, 0.0], 0, 1, False),
    ],
)
def test_best_and_patience_by_hand(scores: list[float], patience: int, best: int | None, ends: bool) -> None:
    evaluations = [{"step": step, "ap": ap} for step, ap in enumerate(scores, start=1)]
    assert best_step(evaluations) == best
    assert out_of_patience(evaluations, patience) is ends


def test_a_missing_best_checkpoint_falls_back_to_the_newest(evaluated: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(evaluated.folder, folder)
    best = best_step(read_evaluations(folder))
    shutil.rmtree(folder / "checkpoints" / f"step-{best:08d}")
    assert best_checkpoint(folder).step == {2: 4, 4: 2}[best or 0]


def test_evaluating_needs_pages_and_patience_needs_evaluations(dataset_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val names nothing to evaluate on"):
        run(tmp_path, dataset_folder, "no-pages", data={"val": None})
    with pytest.raises(ConfigError, match=r"set run\.eval_every too"):
        run(tmp_path, dataset_folder, "patient", run={"eval_every": 0, "patience": 3})


def test_a_run_keeps_a_log_and_a_record_of_its_starts(evaluated: RunConfig) -> None:
    text = (evaluated.folder / "log.txt").read_text()
    assert "step 4: loss" in text and "step 4: AP" in text and "waiting for data" in text
    (start,) = read_attempts(evaluated.folder)
    assert (start.step, start.last_step, start.workers, start.reason) == (0, 4, 1, "finished")
    lines = read_metrics(evaluated.folder)
    assert all(line["memory_gb"] > 0.1 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_a_changed_config_continues_if_allowed(evaluated: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(evaluated.folder, folder)
    content = evaluated.model_dump(mode="json")
    content["run"]["folder"] = str(folder)
    content["schedule"] |= {"steps": 6}
    longer = resolve(content, "longer")
    with pytest.raises(OutputError, match=r"schedule\.steps was 4, is 6.*--allow-changes"):
        train_run(RunContext(longer))
    train_run(RunContext(longer), allow_changes=True)
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None and newest.step == 6
    (change,) = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    assert change["changes"] == ["schedule.steps was 4, is 6"]


def test_two_starts_do_not_train_one_run_at_a_time(tmp_path: Path) -> None:
    trained = pytest.raises(OutputError, match="is being trained by another process")
    with run_lock(tmp_path), trained, run_lock(tmp_path, wait_s=0):
        pass
    with run_lock(tmp_path, wait_s=0):
        pass


def test_another_process_evaluates_during_training(evaluated: RunConfig, dataset_folder: Path, tmp_path: Path) -> None:
    """Training never evaluates itself, and keeps what the other one found best."""
    from pipeline.train.watch import watch

    beside = {"eval_on": "side", "eval_every": 1, "keep": 1, "checkpoint_every": 1, "patience": 9}
    config = run(tmp_path, dataset_folder, "beside", run=beside, schedule={"steps": 6})
    with ThreadPoolExecutor(1) as pool:
        seen: list[int] = []
        following = pool.submit(watch, RunContext(config), lambda line: seen.append(line["step"]), poll_s=0.02)
        train_run(RunContext(config))
        following.result(timeout=60)
    assert seen == sorted(set(seen)) and seen[-1] == 6
    best = best_step(read_evaluations(config.folder))
    assert best_checkpoint(config.folder).step == best
    assert {path.name for path in (config.folder / "checkpoints").glob("step-*")} >= {f"step-{best:08d}"}
    assert "step 6: AP" not in (config.folder / "log.txt").read_text()


def test_training_ends_early_by_evaluations_of_another_process(dataset_folder: Path, tmp_path: Path) -> None:
    beside = {"eval_on": "side", "eval_every": 1, "patience": 2}
    config = run(tmp_path, dataset_folder, "beside", run=beside, schedule={"steps": 50})
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    lines = [{"step": step, "ap": 0.5} for step in (1, 2, 3)]
    (config.folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_run(RunContext(config))
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.step < 50 and is_finished(RunContext(config))
