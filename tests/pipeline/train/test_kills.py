"""Training that is killed at every stage, signalled, or left with damaged checkpoints ends as if it was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import RunConfig
from pipeline.config.schema import ComputeConfig
from pipeline.context import RunContext
from pipeline.runs.checkpoint import MANIFEST, newest_checkpoint
from pipeline.runs.ledger import read_ledger
from pipeline.train.run import train_run
from tests.support.kill_runs import STEPS, Outcome, check, configured, outcome, same
from tests.support.processes import clean_processes, die_at, end_all, processes_of, small_disk, spawn_ranks, wait_for
from tests.support.runs import build_here

pytestmark = pytest.mark.kill


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """All runs on one thread, so that their arithmetic is the same."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return clean_processes("tests.pipeline.train.test_kills")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def unkilled(root: Path, dataset_folder: Path) -> dict[str, Outcome]:
    """What runs of each kind end with when nobody disturbs them."""
    torch.set_num_threads(1)
    outcomes = {}
    for kind in ("teacher", "live", "cache"):
        config = configured(root, dataset_folder, f"{kind}-unkilled", kind)
        if kind == "cache":
            build_here(config)
        train_run(RunContext(config))
        outcomes[kind] = outcome(config)
    return outcomes


def train_and_die(config: RunConfig, stage: str, call: int, after: bool) -> None:
    from pipeline.runs import checkpoint_writer

    owner, function = {
        "step": (torch.optim.AdamW, "step"),
        "model": (checkpoint_writer, "save"),
        "optimizer": (checkpoint_writer, "_serialize"),
        "temporary": (os, "replace"),
        "hash": (checkpoint_writer, "sha256_file"),
        "rename": (Path, "rename"),
        "prune": (checkpoint_writer, "prune"),
        "remove": (shutil, "rmtree"),
    }[stage]
    torch.set_num_threads(1)
    die_at(owner, function, call, after)
    train_run(RunContext(config))


STAGES = [
    *[("step", call, after) for call in (1, 2, 3, 5, 6) for after in (False, True)],
    *[("model", call, after) for call in (1, 3) for after in (False, True)],
    *[("optimizer", call, after) for call in (1, 2) for after in (False, True)],
    *[("temporary", call, after) for call in (1, 2, 4, 8, 12) for after in (False, True)],
    *[("hash", call, after) for call in (2, 6) for after in (False, True)],
    *[("rename", call, after) for call in (1, 2, 3) for after in (False, True)],
    *[("prune", call, after) for call in (1, 3) for after in (False, True)],
    *[("remove", call, after) for call in (1, 4, 7) for after in (False, True)],
]


def kill(
    processes: ForkServerContext, config: RunConfig, expected: Outcome, stages: list[tuple[str, int, bool]]
) -> None:
    for stage in stages:
        child = processes.Process(target=train_and_die, args=(config, *stage))
        child.start()
        child.join(120)
        assert child.exitcode in (0, -signal.SIGKILL)
    assert child.exitcode == -signal.SIGKILL, f"{stages[-1]} was never reached"
    try:
        check(config, expected)
    finally:
        shutil.rmtree(config.folder)


@pytest.mark.parametrize(
    "stage", STAGES, ids=lambda stage: f"{stage[0]}-{stage[1]}-{'after' if stage[2] else 'before'}"
)
def test_a_run_killed_at_any_stage_ends_as_if_it_was_not(
    stage: tuple[str, int, bool],
    processes: ForkServerContext,
    root: Path,
    dataset_folder: Path,
    unkilled: dict[str, Outcome],
) -> None:
    kill(processes, configured(root, dataset_folder, "killed", "teacher"), unkilled["teacher"], [stage])


@pytest.mark.parametrize("kind", ["live", "cache"])
@pytest.mark.parametrize("stage", [("step", 3, True), ("temporary", 6, False)], ids=lambda stage: stage[0])
def test_a_distilled_run_ends_as_if_it_was_not_killed(
    kind: str,
    stage: tuple[str, int, bool],
    processes: ForkServerContext,
    root: Path,
    dataset_folder: Path,
    unkilled: dict[str, Outcome],
) -> None:
    kill(processes, configured(root, dataset_folder, f"killed-{kind}", kind), unkilled[kind], [stage])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_run_ends_as_if_it_was_not_killed(
    processes: ForkServerContext, root: Path, dataset_folder: Path, unkilled: dict[str, Outcome]
) -> None:
    compute = ComputeConfig(compile="step", deterministic=True)
    whole, killed = (
        configured(root, dataset_folder, f"compiled-{name}", "cache").model_copy(update={"compute": compute})
        for name in ("whole", "killed")
    )
    never = ("step", STEPS + 1, True)
    for config, stage in ((whole, never), (killed, ("step", 3, True)), (killed, never)):
        child = processes.Process(target=train_and_die, args=(config, *stage))
        child.start()
        child.join(280)
        assert child.exitcode == (0 if stage == never else -signal.SIGKILL)
    assert same(outcome(killed), outcome(whole))
    for config in (whole, killed):
        shutil.rmtree(config.folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_again_and_again_ends_as_if_it_was_not(
    seed: int, processes: ForkServerContext, root: Path, dataset_folder: Path, unkilled: dict[str, Outcome]
) -> None:
    """Ten runs at a time, each killed up to four times; the last kill is one that any start reaches."""
    import random

    draw = random.Random(seed)
    config = configured(root, dataset_folder, f"killed-{seed}", "teacher")
    for _ in range(10):
        stages = [draw.choice(STAGES) for _ in range(draw.randint(0, 3))]
        for stage in stages:
            child = processes.Process(target=train_and_die, args=(config, *stage))
            child.start()
            child.join(120)
            assert child.exitcode in (0, -signal.SIGKILL)
        check(config, unkilled["teacher"])
        shutil.rmtree(config.folder)


def damaged(folder: Path, kind: str) -> None:
    newest = folder / f"step-{STEPS:08d}"
    if kind == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif kind == "missing manifest":
        (newest / MANIFEST).unlink()
    elif kind == "truncated":
        path = newest / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flipped":
        path = newest / "optimizer.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "foreign":
        shutil.rmtree(newest)
        (folder / "step-99999999").mkdir()
        (folder / "step-99999999" / "checkpoint.pth").write_bytes(b"of another tool")
    elif kind == "all":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "kind",
    [
        *("missing manifest", "flipped", "all"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("empty", "truncated", "foreign")),
    ],
)
def test_damaged_checkpoints_are_skipped_and_named(
    kind: str, root: Path, dataset_folder: Path, unkilled: dict[str, Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(root, dataset_folder, f"damaged-{kind.replace(' ', '-')}", "teacher")
    train_run(RunContext(config))
    damaged(config.folder / "checkpoints", kind)
    check(config, unkilled["teacher"])
    if kind != "all":
        named = "step-99999999" if kind == "foreign" else f"step-{STEPS:08d}"
        assert f"skipped {config.folder}/checkpoints/{named}" in caplog.text


def test_a_full_disk_ends_a_run_cleanly_and_it_resumes(
    root: Path, dataset_folder: Path, unkilled: dict[str, Outcome], tmp_path: Path
) -> None:
    from pipeline.core.errors import OutputError

    config = configured(root, dataset_folder, "full", "teacher")
    size = sum(path.stat().st_size for path in (root / "teacher-unkilled" / "checkpoints").rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", str(size // 2 + 300_000)) as disk:  # room for one checkpoint, not for two
        folder = disk / "run"
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": folder})})
        with pytest.raises(OutputError, match=r"no space left while writing .*checkpoints"):
            train_run(RunContext(config))
        (checkpoint,) = (folder / "checkpoints").iterdir()
        assert checkpoint.name == "step-00000002"
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        check(config, unkilled["teacher"])


def test_a_folder_that_turns_read_only_ends_a_run_in_one_line_and_it_resumes(
    root: Path, dataset_folder: Path, unkilled: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.core.errors import OutputError

    config = configured(root, dataset_folder, "read-only", "teacher")
    folder, step, calls = config.folder / "checkpoints", torch.optim.AdamW.step, 0

    def step_then_lock(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            wait_for(lambda: newest_checkpoint(folder), "the first checkpoint")
            subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
            subprocess.run(["mount", "-o", "bind,remount,ro", str(folder)], check=True)
        return step(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step_then_lock)
        try:
            with pytest.raises(OutputError, match=r"cannot write .*checkpoints.*Read-only.*give a folder"):
                train_run(RunContext(config))
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None and checkpoint.step == 2
    check(config, unkilled["teacher"])


def slow_run(config: RunConfig, folder: Path) -> list[str]:
    """The command that trains ``config`` with a pause in every step."""
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code = (
        "import sys, time, torch; from pipeline.cli.main import main; step = torch.optim.AdamW.step\n"
        "torch.optim.AdamW.step = lambda *a, **k: (time.sleep(0.3), step(*a, **k))[1]\n"
        f"sys.argv = ['graphkd', 'train', {str(path)!r}]; main()"
    )
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGUSR2))],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_its_exit_code(
    number: signal.Signals, root: Path, dataset_folder: Path, unkilled: dict[str, Outcome], tmp_path: Path
) -> None:
    config = configured(root, dataset_folder, f"signalled-{number.name}", "teacher")
    run = subprocess.Popen(slow_run(config, tmp_path), stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: read_ledger(config.folder), "the first step")
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)  # Ctrl-C reaches all
        assert run.wait(60) == 128 + number
        assert run.stderr is not None
        said = run.stderr.read().decode()
        assert f"{number.name} received: saving a checkpoint after the running step" in said
        assert f"stopped by {number.name} after a checkpoint" in said and "Traceback" not in said
        assert not processes_of(run.pid)
    finally:
        end_all(run.pid)
    done = newest_checkpoint(config.folder / "checkpoints")
    assert done is not None and done.step == max(read_ledger(config.folder)) + 1 < STEPS
    check(config, unkilled["teacher"])


def test_a_second_ctrl_c_ends_a_run_at_once(root: Path, dataset_folder: Path, tmp_path: Path) -> None:
    config = configured(root, dataset_folder, "impatient", "teacher")
    command = slow_run(config, tmp_path)
    run = subprocess.Popen(
        [part.replace("sleep(0.3)", "sleep(60)") for part in command], stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_for(lambda: (config.folder / "starts.jsonl").exists(), "the start")
        assert run.stderr is not None
        os.set_blocking(run.stderr.fileno(), False)
        said = b""
        while b"press Ctrl-C again" not in said:  # acknowledged within the long step
            os.killpg(run.pid, signal.SIGINT)
            time.sleep(1)
            said += run.stderr.read() or b""
            if run.poll() is not None:
                break
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGINT)
        assert run.wait(10) == 130
    finally:
        end_all(run.pid)


def test_a_signal_to_one_rank_ends_all_at_the_same_step(root: Path, dataset_folder: Path, tmp_path: Path) -> None:
    config = configured(root, dataset_folder, "two-ranks", "teacher")
    ranks = spawn_ranks(slow_run(config, tmp_path), 2)
    try:
        wait_for(lambda: read_ledger(config.folder), "the first step")
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(60) for rank in ranks] == [128 + signal.SIGTERM] * 2
    finally:
        for rank in ranks:
            end_all(rank.pid)
    done = newest_checkpoint(config.folder / "checkpoints")
    assert done is not None and done.step < STEPS
    steps = [json.loads(line)["step"] for path in config.folder.glob("ledger/*") for line in path.open()]
    assert sorted(steps) == sorted([*range(done.step), *range(done.step)]), "no rank began a step more"
    train_run(RunContext(config))
    assert sorted(read_ledger(config.folder)) == list(range(STEPS))
