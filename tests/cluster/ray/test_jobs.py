"""``graphkd submit ray`` on a real Ray on loopback: trained, stopped and submitted again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import RunConfig, resolve
from pipeline.runs.attempts import read_attempts
from pipeline.runs.checkpoint import newest_checkpoint
from pipeline.runs.ledger import read_ledger
from tests.support.processes import end_all, wait_for
from tests.support.runs import small_run
from tests.support.slurm import free_ports

pytestmark = [pytest.mark.kill, pytest.mark.ray]


# Only for other processes: one that has read a token keeps it, and this one starts Rays without.
WITH_TOKEN = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}


def start_head(ports: list[int]) -> subprocess.Popen[bytes]:
    """A cluster of one node, whose dashboard is at the second of ``ports``."""
    port, dashboard, client, agent = ports
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
    command += ["--node-ip-address", "127.0.0.2", "--dashboard-host", "127.0.0.2", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
    command += ["--num-cpus", "4", "--object-store-memory", str(80 << 20)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs run the cluster's python
    head = subprocess.Popen(
        command,
        env={**WITH_TOKEN, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: answers(f"http://127.0.0.2:{dashboard}"), "the dashboard", 90)
    return head


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    ports = free_ports(4)
    head = start_head(ports)
    yield f"http://127.0.0.2:{ports[1]}"
    end_all(head.pid)
    head.wait(30)


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


def graphkd(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "pipeline", *words], {**WITH_TOKEN, **changes}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def submit(address: str, path: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return graphkd("submit", "ray", str(path), "--address", address, *options, **changes)


def state(config: RunConfig) -> str:
    """What became of the run's newest job."""
    listed = graphkd("jobs", "list", str(config.folder), "--json").stdout
    return str(json.loads(listed.splitlines()[-1])["state"])


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


def test_a_stopped_job_saves_and_resumes_when_resubmitted(cluster: str, dataset_folder: Path, tmp_path: Path) -> None:
    config, path = configured(tmp_path, dataset_folder, "stopped", 200)
    assert submit(cluster, path, "--no-wait").returncode == 0
    wait_for(lambda: len(read_ledger(config.folder)) > 12, "the twelfth step", 120)
    assert graphkd("jobs", "cancel", str(config.folder)).returncode == 0
    wait_for(lambda: state(config) == "STOPPED", "its end", 60)
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.step == max(read_ledger(config.folder)) + 1, "it saved when it was stopped"
    assert graphkd("jobs", "resume", str(config.folder)).returncode == 0
    wait_for(lambda: max(read_ledger(config.folder)) == 199, "its last step", 180)
    time.sleep(1)
    assert sorted(read_ledger(config.folder)) == list(range(200))


def test_nobody_submits_without_the_token(cluster: str, dataset_folder: Path, tmp_path: Path) -> None:
    _, path = configured(tmp_path, dataset_folder, "stranger", 4)
    done = submit(cluster, path, RAY_AUTH_TOKEN="6" * 64)
    assert done.returncode == 1 and "asks for its token" in done.stderr.splitlines()[-1]


def test_no_cluster_is_one_line(dataset_folder: Path, tmp_path: Path) -> None:
    _, path = configured(tmp_path, dataset_folder, "alone", 4)
    done = submit("http://127.0.0.2:9", path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: no Ray cluster answers at http://127.0.0.2:9")


@pytest.mark.slow
def test_plain_ray_job_submit_does_the_same(cluster: str, dataset_folder: Path, tmp_path: Path) -> None:
    config, path = configured(tmp_path, dataset_folder, "plain", 4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster]
    command += ["--", "graphkd", "train", str(path)]
    done = subprocess.run(command, env=WITH_TOKEN, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.step == 4


@pytest.mark.slow
def test_a_run_resumes_when_resubmitted_after_its_driver_and_head_were_killed(
    dataset_folder: Path, tmp_path: Path
) -> None:
    config, path = configured(tmp_path, dataset_folder, "lost", 120)
    resume = ["jobs", "resume", str(config.folder)]
    ports = free_ports(4)
    head = start_head(ports)
    try:
        assert submit(f"http://127.0.0.2:{ports[1]}", path, "--no-wait").returncode == 0
        wait_for(lambda: len(read_ledger(config.folder)) > 12, "the twelfth step", 120)
        drivers = [pid for pid, words in processes_of_user().items() if "-m pipeline train" in words]
        assert len(drivers) == 1
        os.kill(drivers[0], signal.SIGKILL)
        wait_for(lambda: state(config) == "FAILED", "its end", 60)
        assert graphkd(*resume).returncode == 0
        seen = len(read_ledger(config.folder))
        wait_for(lambda: len(read_ledger(config.folder)) > seen + 12, "twelve more steps", 120)
        end_all(head.pid)
        head.wait(30)
        head = start_head(ports)
        assert graphkd(*resume).returncode == 0
        wait_for(lambda: max(read_ledger(config.folder)) == 119, "its last step", 180)
        wait_for(lambda: state(config) == "SUCCEEDED", "its end", 60)
    finally:
        end_all(head.pid)
        head.wait(30)
    assert sorted(read_ledger(config.folder)) == list(range(120))
    steps = [start.step for start in read_attempts(config.folder)]
    assert len(steps) == 3 and steps[0] == 0 < steps[1] < steps[2]


def processes_of_user() -> dict[int, str]:
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return {int(pid): words for pid, _, words in (line.strip().partition(" ") for line in listed.splitlines())}
