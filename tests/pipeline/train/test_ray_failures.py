"""A local Ray is reachable from nowhere else, and whatever is wrong with Ray is one line and an exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.core.errors import TEMPORARY_FAILURE
from tests.support.processes import end_all, wait_for
from tests.support.runs import small_run

pytestmark = [pytest.mark.ray, pytest.mark.kill]

TRAIN = "import sys; sys.argv = ['graphkd', 'train', *sys.argv[1:]]; from pipeline.cli.main import main; main()"


@pytest.fixture(scope="module")
def config(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    content = small_run(folder, dataset_folder, "run", data={"val": None}, schedule={"steps": 4})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def environment(**changes: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**plain, "OMP_NUM_THREADS": "1", **changes}


def train(config: Path, *overrides: str, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAIN, str(config), "engine.name=ray", *overrides]
    return subprocess.Popen(
        command,
        env=environment(**changes),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell in the background ignores
    )


def ended(run: subprocess.Popen[str], seconds: float) -> tuple[int, list[str]]:
    """Exit code, and the lines of standard error that are no progress."""
    try:
        _, error = run.communicate(timeout=seconds)
    finally:
        end_all(run.pid)
    return run.returncode, [line for line in error.splitlines() if line.strip() and not line.startswith("training ")]


def test_no_socket_of_a_local_ray_listens_beyond_loopback(config: Path, tmp_path: Path) -> None:
    run = train(config, f"run.folder={tmp_path / 'run'}", "schedule.steps=400")
    listening: dict[tuple[str, int], str] = {}
    try:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), "the first step")
        driver = psutil.Process(run.pid)
        for process in [driver, *driver.children(recursive=True)]:
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    listening[(each.laddr.ip, each.laddr.port)] = process.name()
        token = Path(driver.children()[0].environ()["RAY_AUTH_TOKEN_PATH"])
        assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    finally:
        run.send_signal(signal.SIGINT)
        code, _ = ended(run, 60)
    assert code == 130 and not token.exists()
    assert len(listening) >= 5, "Ray's servers were seen"
    outside = {place: name for place, name in listening.items() if place[0].removeprefix("::ffff:") != "127.0.0.1"}
    assert not outside


def test_a_stale_address_is_one_line(config: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    code, lines = ended(train(config, RAY_ADDRESS=address), 60)
    assert code == TEMPORARY_FAILURE
    assert len(lines) == 1 and f"no Ray cluster answers at RAY_ADDRESS {address}" in lines[0]


CLUSTER = """
import sys, time, ray
found = ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
print(found.address_info["gcs_address"], flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[dict[str, str]]:
    """A cluster of one CPU; yields what one needs to use it."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 40, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment(**access),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert cluster.stdout is not None
        yield {**access, "RAY_ADDRESS": cluster.stdout.readline().strip()}
    finally:
        cluster.terminate()
        cluster.wait(30)
        end_all(cluster.pid)


def test_another_token_is_one_line(config: Path, small_cluster: dict[str, str]) -> None:
    code, lines = ended(train(config, **{**small_cluster, "RAY_AUTH_TOKEN": "x" * 40}), 120)
    assert code == 1
    assert "refuses the token; set RAY_AUTH_MODE=token and" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_too_few_cpus_are_one_line_and_an_interrupt_ends_the_wait(config: Path, small_cluster: dict[str, str]) -> None:
    code, lines = ended(train(config, "engine.workers=2", **small_cluster), 120)
    assert code == TEMPORARY_FAILURE
    assert "2 workers need 2 CPUs, but the Ray cluster has 1; add nodes, or set engine.workers" in lines[-1]
    waiting = train(config, "engine.workers=2", **small_cluster)
    time.sleep(12)
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGINT)
    code, lines = ended(waiting, 10)
    assert code == 130 and not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_a_long_temporary_folder_needs_no_mending(config: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "_".join(["scratch_of_a_user_with_a_long_name"] * 3)
    scratch.mkdir()
    code, lines = ended(train(config, f"run.folder={tmp_path / 'run'}", TMPDIR=str(scratch)), 120)
    assert (code, lines) == (0, [])


def test_what_ray_throws_is_one_line(monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path) -> None:
    from ray.train.torch import TorchTrainer

    from pipeline.config import load_config
    from pipeline.context import RunContext
    from pipeline.core.errors import LostWorkersError
    from pipeline.train.run import train_run

    def dies(_: Any) -> None:
        raise RuntimeError("the controller died\nfor some reason")

    monkeypatch.setattr(TorchTrainer, "fit", dies)
    overrides = ["engine.name=ray", f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(LostWorkersError, match="training failed on Ray") as caught:
        train_run(RunContext(load_config(config, overrides)))
    assert "\n" not in str(caught.value)
