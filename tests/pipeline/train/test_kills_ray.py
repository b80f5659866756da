"""Ray training whose worker, driver or whole cluster is killed, or whose nodes come and go, ends as if it was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.core.ray_session import ray_session
from pipeline.runs.attempts import read_attempts
from pipeline.runs.checkpoint import newest_checkpoint
from pipeline.runs.ledger import read_ledger
from pipeline.train.run import train_run
from tests.support.kill_runs import STEPS, Outcome, check, configured, outcome, same
from tests.support.processes import end_all, processes_of, wait_for
from tests.support.ray_workers import dying_worker

pytestmark = [pytest.mark.kill, pytest.mark.ray]

STAGES = [
    ("step", 3, True),
    *[
        pytest.param(stage, marks=pytest.mark.slow)
        for stage in (
            *(("step", call, after) for call in (1, 2, 4, 5, 6) for after in (False, True)),
            *(("report", call, after) for call in (1, 2) for after in (False, True)),
            *(("temporary", call, after) for call in (1, 4, 6, 8, 12) for after in (False, True)),
            *(("hash", call, after) for call in (2, 4, 6) for after in (False, True)),
            *(("rename", call, after) for call in (1, 2, 3) for after in (False, True)),
            *(("remove", call, after) for call in (1, 4, 7) for after in (False, True)),
        )
    ],
]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray-kills")


@pytest.fixture(scope="module")
def unkilled(root: Path, dataset_folder: Path) -> Outcome:
    """What one process ends with: one Ray worker must end with the same."""
    torch.set_num_threads(1)
    config = configured(root, dataset_folder, "unkilled", "teacher")
    train_run(RunContext(config))
    return outcome(config)


def on_ray(root: Path, packed: Path, name: str, **engine: Any) -> RunConfig:
    config = configured(root, packed, name, "teacher", **engine)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"name": "ray"})})


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(2):
        yield


def dies(monkeypatch: pytest.MonkeyPatch, once: Path, stage: str, call: int, after: bool) -> None:
    """Have the next Ray worker die once."""
    from ray.train.torch import TorchTrainer

    make = TorchTrainer.__init__

    def with_stage(self: Any, worker: Any, *, train_loop_config: dict[str, Any], **rest: Any) -> None:
        given = {**train_loop_config, "dies": (stage, call, after, str(once))}
        make(self, dying_worker, train_loop_config=given, **rest)

    monkeypatch.setattr(TorchTrainer, "__init__", with_stage)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[0]}-{stage[1]}-{stage[2]}")
def test_a_killed_worker_is_started_again_and_nothing_is_lost(
    stage: tuple[str, int, bool],
    session: None,
    root: Path,
    dataset_folder: Path,
    unkilled: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = on_ray(root, dataset_folder, f"worker-{'-'.join(map(str, stage))}")
    dies(monkeypatch, tmp_path / "once", *stage)
    check(config, unkilled)
    assert [start.reason for start in read_attempts(config.folder)] == ["killed", "finished"]


@pytest.mark.slow
def test_one_of_two_workers_killed_mid_step(
    session: None, root: Path, dataset_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = on_ray(root, dataset_folder, "two-whole", workers=2)
    train_run(RunContext(whole))
    killed = on_ray(root, dataset_folder, "two-killed", workers=2)
    dies(monkeypatch, tmp_path / "once", "step", 3, False)  # whichever comes first
    train_run(RunContext(killed))
    assert same(outcome(killed), outcome(whole))


def command(config: RunConfig, folder: Path, pause: float = 0.3) -> list[str]:
    """The command that trains ``config`` on a Ray of its own, whose workers pause in every step."""
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code = (
        "import sys; from pipeline.train.engines import ray as ray_engine\n"
        "from tests.support.ray_workers import slow_worker\n"
        f"ray_engine._worker = slow_worker; sys.argv = ['graphkd', 'train', {str(path)!r}]\n"
        "from pipeline.cli.main import main; main()"
    )
    return [sys.executable, "-c", code]


def started(config: RunConfig, folder: Path) -> subprocess.Popen[bytes]:
    run = subprocess.Popen(command(config, folder), stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: len(read_ledger(config.folder)) > 3 or run.poll() is not None, "the fourth step", 120)
    if run.poll() is not None:
        raise AssertionError(run.stderr.read().decode() if run.stderr else "")
    return run


def kill_driver(run: subprocess.Popen[bytes]) -> None:
    run.kill()


def kill_head(run: subprocess.Popen[bytes]) -> None:
    """Everything of Ray but the driver: the head's services, its node and its workers."""
    for pid, line in processes_of(run.pid).items():
        if pid != run.pid and ("ray" in line):
            os.kill(pid, signal.SIGKILL)


def kill_everything(run: subprocess.Popen[bytes]) -> None:
    end_all(run.pid)


@pytest.mark.parametrize(
    "kill",
    [kill_head, *(pytest.param(kill, marks=pytest.mark.slow) for kill in (kill_driver, kill_everything))],
    ids=lambda kill: kill.__name__[5:],
)
def test_a_killed_driver_or_cluster_loses_nothing(
    kill: Callable[[subprocess.Popen[bytes]], None],
    root: Path,
    dataset_folder: Path,
    unkilled: Outcome,
    tmp_path: Path,
) -> None:
    config = on_ray(root, dataset_folder, f"killed-{kill.__name__}")
    run = started(config, tmp_path)
    try:
        kill(run)
        assert run.wait(120) != 0
        wait_for(
            lambda: not any("RayTrain" in line for line in processes_of(run.pid).values()), "the end of its workers"
        )
    finally:
        end_all(run.pid)
    for path in (config.folder / "ray").rglob("*"):  # Ray's own record may be cut off anywhere
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    local = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "local"})})
    check(local, unkilled)


@pytest.mark.slow
def test_what_ray_wrote_itself_decides_nothing(
    session: None, root: Path, dataset_folder: Path, unkilled: Outcome
) -> None:
    """Checkpoints are gone back in time, and Ray's snapshots are cut off or empty: the newest whole one counts."""
    config = on_ray(root, dataset_folder, "snapshot")
    train_run(RunContext(config))
    newest = config.folder / "checkpoints" / f"step-{STEPS:08d}"
    newest.rename(config.folder / newest.name)
    files = [path for path in (config.folder / "ray").rglob("*") if path.is_file()]
    assert files, "Ray keeps a record"
    for number, path in enumerate(files):
        path.write_bytes(b"" if number % 2 else path.read_bytes()[:7])
    check(config, unkilled)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR2))],
)
def test_a_signal_to_the_driver_ends_its_workers_with_a_checkpoint(
    number: signal.Signals, root: Path, dataset_folder: Path, unkilled: Outcome, tmp_path: Path
) -> None:
    config = on_ray(root, dataset_folder, f"signalled-{number.name}")
    run = started(config, tmp_path)
    try:
        run.send_signal(number)
        assert run.wait(60) == 128 + number
        assert run.stderr is not None and f"stopped by {number.name} after a checkpoint" in run.stderr.read().decode()
    finally:
        end_all(run.pid)
    done = newest_checkpoint(config.folder / "checkpoints")
    assert done is not None and 3 < done.step < STEPS
    local = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "local"})})
    train_run(RunContext(local))
    assert same(outcome(local), unkilled)


def drained(address: str, node: str, seconds: int) -> None:
    """Have Ray announce that a node goes, as a provider of preemptible machines does."""
    arguments = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
    when = ["--deadline-remaining-seconds", str(seconds)]
    tool = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node]
    subprocess.run([*tool, *arguments, *when], check=True, capture_output=True, timeout=60)


@pytest.mark.slow
def test_a_node_that_is_taken_back_costs_no_step_and_one_worker(
    root: Path, dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers at first; the announcement makes a checkpoint, and one worker goes on from it alone."""
    from ray.cluster_utils import Cluster

    steps = 40
    config = on_ray(root, dataset_folder, "elastic", workers=(1, 2))
    settings = config.run.model_copy(update={"checkpoint_every": 1000})
    config = config.model_copy(
        update={"run": settings, "schedule": config.schedule.model_copy(update={"steps": steps})}
    )
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(**{name: value for name, value in node.items() if name != "include_dashboard"})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    run = subprocess.Popen(command(config, tmp_path), stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: len(read_ledger(config.folder)) > 3, "the fourth step", 120)
        assert [start.workers for start in read_attempts(config.folder)] == [2]
        drained(cluster.address, second.node_id, 10)
        wait_for(lambda: len(read_attempts(config.folder)) == 2, "the start after it", 120)
        assert run.wait(120) == 0, run.stderr.read().decode() if run.stderr else ""
    finally:
        end_all(run.pid)
        cluster.shutdown()
    starts = read_attempts(config.folder)
    assert [start.workers for start in starts] == [2, 1] and starts[1].step >= 4
    whole = configured(root, dataset_folder, "elastic-whole", "teacher")
    whole = whole.model_copy(update={"schedule": config.schedule})
    train_run(RunContext(whole))
    assert read_ledger(config.folder) == read_ledger(whole.folder)
