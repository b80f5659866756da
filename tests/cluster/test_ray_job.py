"""``graphkd submit ray`` on a real Ray on loopback: trained, stopped and submitted again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.jobs import jobs_of, state_of
from pipeline.config import RunConfig, resolve
from pipeline.runs.checkpoint import newest_checkpoint
from pipeline.runs.ledger import read_ledger
from tests.cluster.slurm_here import _free_ports
from tests.common import small_run
from tests.killing import end_all, wait_for

pytestmark = [pytest.mark.kill, pytest.mark.ray]


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, dashboard, client, agent = _free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
    command += ["--node-ip-address", "127.0.0.2", "--dashboard-host", "127.0.0.2", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
    command += ["--num-cpus", "4", "--object-store-memory", str(80 << 20)]
    os.environ |= TOKEN
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs run the cluster's python
    head = subprocess.Popen(
        command,
        env={**os.environ, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.2:{dashboard}"
    try:
        wait_for(lambda: answers(address), "the dashboard", 90)
        yield address
    finally:
        end_all(head.pid)
        head.wait(30)
        for name in TOKEN:
            del os.environ[name]


def answers(address: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        return urllib.request.urlopen(f"{address}/api/version", timeout=2).status == 200
    except urllib.error.HTTPError as error:
        return error.code == 401  # it asks for the token, which Ray keeps in this user's home
    except OSError:
        return False


def configured(folder: Path, packed: Path, name: str, steps: int) -> tuple[RunConfig, Path]:
    content = small_run(folder, packed, name, schedule={"steps": steps}, run={"ledger": True, "checkpoint_every": 10})
    content["engine"] = {"name": "ray", "workers": 2, "threads": 1, "device": "cpu", "max_failures": 0}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return resolve(content, name), path


def submit(address: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "submit", "ray", str(path), "--address", address, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_a_job_trains_shows_its_log_and_ends_with_its_result(
    cluster: str, dataset_folder: Path, tmp_path: Path
) -> None:
    config, path = configured(tmp_path, dataset_folder, "submitted", 4)
    done = submit(cluster, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training submitted: 4/4 steps" in done.stdout and "succeeded" in done.stdout
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.step == 4


def test_a_job_that_fails_is_a_failure_here_too(cluster: str, dataset_folder: Path, tmp_path: Path) -> None:
    _, path = configured(tmp_path, dataset_folder, "wrong", 4)
    path.write_text(path.read_text().replace("resnet18", "resnet1800"))
    done = submit(cluster, path)
    assert done.returncode == 1 and "detector.backbone 'resnet1800' cannot be built" in done.stdout, done.stdout


def test_a_stopped_job_saves_and_goes_on_when_it_is_submitted_again(
    cluster: str, dataset_folder: Path, tmp_path: Path
) -> None:
    config, path = configured(tmp_path, dataset_folder, "stopped", 200)
    assert submit(cluster, path, "--no-wait").returncode == 0
    wait_for(lambda: len(read_ledger(config.folder)) > 12, "the twelfth step", 120)
    command = [sys.executable, "-m", "pipeline", "jobs"]
    subprocess.run([*command, "cancel", str(config.folder)], check=True, capture_output=True)
    (record,) = jobs_of(config.folder)
    wait_for(lambda: state_of(config.folder, record) == "STOPPED", "its end", 60)
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.step == max(read_ledger(config.folder)) + 1, "it saved when it was stopped"
    subprocess.run([*command, "resume", str(config.folder)], check=True, capture_output=True)
    wait_for(lambda: max(read_ledger(config.folder)) == 199, "its last step", 180)
    time.sleep(1)
    assert sorted(read_ledger(config.folder)) == list(range(200))


def test_nobody_submits_without_the_token(
    cluster: str, dataset_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = configured(tmp_path, dataset_folder, "stranger", 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "6" * 64)
    done = submit(cluster, path)
    assert done.returncode == 1 and "asks for its token" in done.stderr.splitlines()[-1]


def test_no_cluster_is_one_line(dataset_folder: Path, tmp_path: Path) -> None:
    _, path = configured(tmp_path, dataset_folder, "alone", 4)
    done = submit("http://127.0.0.2:9", path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: no Ray cluster answers at http://127.0.0.2:9")
