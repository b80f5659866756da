"""Jobs on a real Slurm of two nodes on this machine: trained, preempted, timed out, cut off, cancelled, resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from cluster.jobs import job_state
from cluster.records import read_jobs
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.core.jsonl import read_jsonl
from pipeline.runs.attempts import read_attempts
from pipeline.runs.checkpoint import load_weights, newest_checkpoint
from pipeline.runs.ledger import read_ledger
from pipeline.train.run import train_run
from tests.support.processes import end_all, wait_for
from tests.support.runs import small_run
from tests.support.slurm import SlurmHere, missing

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 40
RAY_ADDRESS = "127.0.0.2"  # Ray takes 127.0.0.1 for the machine's outer address


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmHere]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    here = SlurmHere(tmp_path_factory.mktemp("slurm") / "slurm")
    for folder in here.folder.parents:  # munge wants its path to be reachable
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.environ["SLURM_CONF"] = here.environment["SLURM_CONF"]
    here.start()
    yield here
    here.stop()
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, dataset_folder: Path) -> Path:
    """A folder with a space in its name, and a trained teacher."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("runs") / "on a cluster"
    teacher = resolve(small_run(made, dataset_folder, "teacher", engine={"threads": 1}), "teacher")
    train_run(RunContext(teacher))
    return made


def configured(root: Path, packed: Path, name: str, steps: int = STEPS, **changes: Any) -> RunConfig:
    changes["schedule"] = {"steps": steps, "batch": 4, "reference_batch": 4}
    changes["run"] = {"ledger": True, "checkpoint_every": 10, **changes.get("run", {})}
    changes["engine"] = {"name": "ray", "threads": 1}
    teacher = {"run": str(root / "teacher"), "signals": "live", "statistics_pages": 4, "nodes": {"count": 8}}
    changes |= {"method": {"name": "graphkd"}, "teacher": teacher | changes.get("teacher", {})}
    return resolve(small_run(root, packed, name, **changes), name)


def site(root: Path, **changes: Any) -> Path:
    content = {"name": "here", "cpus_per_node": 4, "python": sys.executable, "node_address": RAY_ADDRESS}
    content |= {"time_minutes": 30, "signal_lead_s": 30, "deadline_s": 90} | changes
    path = root / f"site-{len(list(root.glob('site-*')))}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def graphkd(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def submitted(root: Path, config: RunConfig, *options: str, **site_changes: Any) -> str:
    path = root / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = graphkd("submit", "slurm", str(path), "--site", str(site(root, **site_changes)), *options, "--json")
    (job,) = json.loads(done.stdout.splitlines()[-1])
    return str(job["job"])


def logs_of(config: RunConfig) -> str:
    """All that a run's jobs wrote, for when something is not as it should be."""
    files = [
        *config.folder.glob("cluster/slurm/*log.out"),
        *config.folder.glob("cluster/*/*.log"),
        config.folder / "lives.jsonl",
    ]
    return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in files if path.exists())


def finishes(slurm: SlurmHere, config: RunConfig, job: str, state: str = "COMPLETED", seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    while slurm.state(job) not in ends:
        assert time.monotonic() < deadline, f"{slurm.state(job)} {logs_of(config)}"
        time.sleep(0.5)
    assert slurm.state(job) == state, logs_of(config)


def reaches(config: RunConfig, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while max(read_ledger(config.folder), default=-1) < step:
        assert time.monotonic() < deadline, logs_of(config)
        time.sleep(0.1)


def begun(root: Path, packed: Path, name: str, nodes: int = 2) -> tuple[RunConfig, str]:
    """A submitted run that is some steps beyond its first checkpoint, and its job."""
    config = configured(root, packed, name)
    job = submitted(root, config, "--nodes", str(nodes))
    reaches(config, 15)
    return config, job


def events(config: RunConfig) -> list[str]:
    return [line["event"] for line in read_jsonl(config.folder / "lives.jsonl")]


def ray_processes(job: str) -> list[str]:
    """Living processes of a job's Ray."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"graphkd-0-{job}" in line]


@pytest.fixture(scope="module")
def undisturbed(slurm: SlurmHere, root: Path, dataset_folder: Path) -> RunConfig:
    """A student trained on two nodes, beside another Ray of the same user, whose figures the others are held to."""
    config = configured(root, dataset_folder, "undisturbed")
    other = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port", "23456", "--block"]
    other += ["--node-ip-address", "127.0.0.3", "--temp-dir", "/tmp/another-ray", "--include-dashboard=false"]
    another = subprocess.Popen(other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        begin = time.monotonic()
        job = submitted(root, config, "--nodes", "2")
        assert time.monotonic() - begin < 10, "submitting does not wait for the job"
        reaches(config, 2)
        _check_token(config)
        finishes(slurm, config, job)
        assert another.poll() is None, "the other Ray lives on"
        assert not ray_processes(job), "nothing of the job's Ray is left"
    finally:
        end_all(another.pid)
        another.wait(30)
    return config


def _check_token(config: RunConfig) -> None:
    """With the job's token one gets in; without one, or with another, one does not, however long it is tried."""
    (head,) = config.folder.glob("cluster/*/head.json")
    token_file = head.with_name("token")
    assert token_file.stat().st_mode & 0o777 == 0o600 and head.parent.stat().st_mode & 0o777 == 0o700
    address = json.loads(head.read_text())["address"]
    code = f"import ray; ray.init(address={address!r}, _node_ip_address={RAY_ADDRESS!r}); print('got in', flush=True)"
    tries = {}
    for name, token in (("right", token_file.read_text()), ("none", None), ("wrong", "0" * 64)):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        command = [sys.executable, "-c", code]
        tries[name] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    outputs = {}
    for name, one in tries.items():
        try:
            one.wait(40)
        except subprocess.TimeoutExpired:
            one.kill()
        outputs[name] = one.communicate()[0].decode().strip()
    assert outputs == {"right": "got in", "none": "", "wrong": ""}


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(config.folder / "checkpoints")
    assert checkpoint is not None and checkpoint.step == config.schedule.steps
    return load_weights(checkpoint.weights)


def check(config: RunConfig, undisturbed: RunConfig) -> None:
    """The ledger exact, and the final weights those of the run that nobody disturbed."""
    assert read_ledger(config.folder) == read_ledger(undisturbed.folder)
    first, second = weights(config), weights(undisturbed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_nodes_train_and_evaluate_a_student(undisturbed: RunConfig) -> None:
    assert [(start.workers, start.hosts) for start in read_attempts(undisturbed.folder)] == [(2, "node1, node2")]
    assert json.loads((undisturbed.folder / "eval.json").read_text())["pages"] == 10
    assert events(undisturbed) == ["begin", "finished"]
    (record,) = read_jobs(undisturbed.folder)
    assert job_state(undisturbed.folder, record) == "FINISHED"
    assert "undisturbed" in graphkd("jobs", "list", str(undisturbed.folder.parent)).stdout
    assert f"step {STEPS}" in graphkd("jobs", "logs", str(undisturbed.folder)).stdout


def test_a_preempted_job_is_queued_again_and_loses_nothing(
    slurm: SlurmHere, root: Path, dataset_folder: Path, undisturbed: RunConfig
) -> None:
    config, job = begun(root, dataset_folder, "preempted")
    slurm.output("sbatch", "-p", "high", "-N2", "-c4", "-o", "/dev/null", "--wrap", "sleep 3")
    wait_for(lambda: "preempted" in events(config), "the end of its first start", 90)
    finishes(slurm, config, job)
    assert events(config) == ["begin", "preempted", "begin", "finished"], logs_of(config)
    starts = read_attempts(config.folder)
    assert [start.reason for start in starts] == ["SIGUSR2", "finished"] and starts[1].step == starts[0].last_step
    check(config, undisturbed)


def test_a_job_whose_node_dies_is_queued_again(
    slurm: SlurmHere, root: Path, dataset_folder: Path, undisturbed: RunConfig
) -> None:
    config, job = begun(root, dataset_folder, "node-dies")
    slurm.kill_node("node2")
    wait_for(lambda: slurm.state(job) == "PENDING", "that it is queued again", 120)
    slurm.start_node("node2")
    finishes(slurm, config, job)
    assert events(config)[-2:] == ["begin", "finished"], logs_of(config)
    check(config, undisturbed)


def test_a_job_resumes_on_the_nodes_it_gets(
    slurm: SlurmHere, root: Path, dataset_folder: Path, undisturbed: RunConfig
) -> None:
    # Ray goes on with what is left of its nodes until Slurm has noticed and queues the job again, so this takes longer.
    config = configured(root, dataset_folder, "fewer", steps=300)
    slurm.rest()  # else one node may be all that there is room for
    job = submitted(root, config, "--nodes", "1-2")
    reaches(config, 15)
    slurm.kill_node("node2")
    try:
        finishes(slurm, config, job)
    finally:
        slurm.start_node("node2")
    assert events(config)[-2:] == ["begin", "finished"], logs_of(config)
    starts = read_attempts(config.folder)
    assert (starts[0].workers, starts[0].hosts) == (2, "node1, node2"), logs_of(config)
    assert (starts[-1].workers, starts[-1].hosts) == (1, "node1") and 0 < starts[-1].step < 300, logs_of(config)
    ledger, short = read_ledger(config.folder), read_ledger(undisturbed.folder)
    assert sorted(ledger) == list(range(300)) and all(ledger[step] == short[step] for step in short)


def test_teacher_cache_and_students_wait_for_each_other(slurm: SlurmHere, root: Path, dataset_folder: Path) -> None:
    first = configured(root, dataset_folder, "chain-teacher", steps=4)
    alone = {"method": {"name": "none"}, "teacher": None}
    content = first.model_dump(mode="json") | alone
    files = {first.name: root / "chain-teacher.yaml"}
    files[first.name].write_text(yaml.safe_dump(content))
    signals = {"run": str(first.folder), "signals": "cache", "cache": str(root / "chain cache")}
    students = [configured(root, dataset_folder, f"chain-{name}", steps=4, teacher=signals) for name in "ab"]
    for student in students:
        files[student.name] = root / f"{student.name}.yaml"
        files[student.name].write_text(yaml.safe_dump(student.model_dump(mode="json")))
    words = [str(files[student.name]) for student in students]
    # nice stands for a container, which is words before the interpreter too
    where = site(root, cpus_per_node=2, container=["nice", "-n", "1"], prologue=["export GRAPHKD_TRIED=1"])
    words += ["--teacher", str(files[first.name]), "--site", str(where), "--tasks", "2", "--json"]
    jobs = json.loads(graphkd("submit", "pipeline", *words).stdout.splitlines()[-1])
    assert [slurm.state(job["job"]).split("\n")[0] for job in jobs[1:]] == ["PENDING"] * 3
    for student, job in zip(students, jobs[2:], strict=True):
        finishes(slurm, student, job["job"])
        assert weights(student)
        assert read_attempts(student.folder)[0].started > read_attempts(first.folder)[-1].started


def test_what_waits_for_a_job_that_fails_is_cancelled(slurm: SlurmHere, root: Path, dataset_folder: Path) -> None:
    failing = slurm.output("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 2; exit 1").strip()
    config = configured(root, dataset_folder, "waits")
    finishes(slurm, config, submitted(root, config, "--after", failing), "CANCELLED", 60)


def test_a_job_whose_first_task_is_killed_is_queued_again_by_another_budget(
    slurm: SlurmHere, root: Path, dataset_folder: Path, undisturbed: RunConfig
) -> None:
    config, job = begun(root, dataset_folder, "head-dies", nodes=1)
    listed = subprocess.run(
        ["pgrep", "-f", "cluster.slurm.task.*head-dies.json"], capture_output=True, text=True, check=True
    )
    for pid in listed.stdout.split():
        if "python" in Path(f"/proc/{pid}/comm").read_text():
            os.kill(int(pid), signal.SIGKILL)
    finishes(slurm, config, job)
    assert events(config) == ["begin", "failed", "begin", "finished"], logs_of(config)
    wait_for(lambda: not ray_processes(job), "the end of its Ray", 30)
    assert sorted(read_ledger(config.folder)) == list(range(STEPS))


def test_a_cancelled_job_saves_and_stays_away(
    slurm: SlurmHere, root: Path, dataset_folder: Path, undisturbed: RunConfig
) -> None:
    config, job = begun(root, dataset_folder, "cancelled")
    graphkd("jobs", "cancel", str(config.folder))
    finishes(slurm, config, job, "CANCELLED")
    wait_for(lambda: not ray_processes(job), "the end of its Ray", 30)
    newest = newest_checkpoint(config.folder / "checkpoints")
    assert newest is not None and newest.step >= 10
    assert "RUNNING" not in slurm.state(job)
    graphkd("jobs", "resume", str(config.folder))
    again = read_jobs(config.folder)[-1].job
    assert again != job
    finishes(slurm, config, again)
    check(config, undisturbed)


@pytest.mark.slow
def test_a_time_limit_queues_the_job_again(slurm: SlurmHere, root: Path, dataset_folder: Path) -> None:
    config = configured(root, dataset_folder, "timed-out", steps=200)
    job = submitted(root, config, "--nodes", "1", time_minutes=2, signal_lead_s=25)
    finishes(slurm, config, job, seconds=540)
    assert events(config).count("preempted") >= 1 and events(config)[-1] == "finished", logs_of(config)
    assert sorted(read_ledger(config.folder)) == list(range(200))
    steps = [start.step for start in read_attempts(config.folder)]
    assert len(steps) >= 2 and steps == sorted(set(steps))


def test_an_array_builds_a_cache_though_one_task_is_killed(slurm: SlurmHere, root: Path, dataset_folder: Path) -> None:
    config = configured(root, dataset_folder, "cached", teacher={"signals": "cache", "cache": str(root / "the cache")})
    job = submitted(root, config, "--cache", "--tasks", "3", cpus_per_node=2)
    wait_for(lambda: "R" in slurm.output("squeue", "-h", "-o", "%t", "-j", job), "its tasks", 60)
    time.sleep(4)
    slurm.quietly("scancel", "--signal=KILL", f"{job}_1")
    wait_for(lambda: not slurm.output("squeue", "-h", "-t", "PD,R,CG", "-j", job).strip(), "its end", 180)
    info = graphkd("cache", "verify", str(root / "cached.yaml"))
    assert info.returncode == 0, info.stderr + logs_of(config)


def test_a_healthy_site_is_ok_and_faults_are_one_line_each(slurm: SlurmHere, root: Path) -> None:
    healthy = graphkd("doctor", "--site", str(site(root)), "--folder", str(root / "doctor"))
    assert re.search(r"node1: ok; .*all-reduce [\d.]+ GB/s over 2 nodes", healthy.stdout), (
        healthy.stdout + healthy.stderr
    )
    broken = {"gpus_per_node": 0, "interface": "ib7", "shared": ["/no/such/share"], "ray_temp": "/tmp/" + "deep/" * 9}
    done = graphkd("doctor", "--site", str(site(root, **broken)), "--folder", str(root / "doctor"), check=False)
    assert done.returncode == 1
    faults = [line for line in done.stdout.splitlines() if line.startswith("node1: FAULT")]
    for fault in ("interface ib7 is not there", "/no/such/share", "give a shorter ray_temp"):
        assert any(fault in line for line in faults), done.stdout


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        (
            {"options": {"nodelist": "node9"}},
            "Slurm did not take job refused: Batch job submission failed: Invalid node name",
        ),
    ],
    ids=["partition", "node"],
)
def test_what_slurm_refuses_is_one_line(
    changes: dict[str, Any], line: str, slurm: SlurmHere, root: Path, dataset_folder: Path
) -> None:
    config = configured(root, dataset_folder, "refused")
    path = root / "refused.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = graphkd("submit", "slurm", str(path), "--site", str(site(root, **changes)), check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert line in done.stderr


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"prologue": ["source /no/such/venv/bin/activate || exit 1"]}, "/no/such/venv/bin/activate: No such file"),
        ({"shared": ["/no/such/share"]}, "node 0 (node1): shared folder /no/such/share"),
        ({"deadline_s": 0.5}, "was not up within 0.5 s"),
    ],
    ids=["venv", "shared", "deadline"],
)
def test_a_job_that_cannot_start_explains_it_in_one_line(
    changes: dict[str, Any], line: str, slurm: SlurmHere, root: Path, dataset_folder: Path, request: Any
) -> None:
    config = configured(root, dataset_folder, f"cannot-{request.node.callspec.id}")
    job = submitted(root, config, "--nodes", "2", failures=0, **changes)
    finishes(slurm, config, job, "FAILED", 90)
    assert line in logs_of(config)
    assert not ray_processes(job)


@pytest.mark.slow
def test_a_prediction_on_two_nodes_continues_after_it_is_killed(slurm: SlurmHere, root: Path) -> None:
    pages, out = root / "pages", root / "predicted"
    pages.mkdir()
    for number in range(300):
        Image.new("L", (96, 128), number % 256).save(pages / f"{number:03d}.png")
    options = "--predict", "--out", str(out), "--site", str(site(root)), "--nodes", "2", "--json"
    done = graphkd("submit", "slurm", str(root / "teacher"), str(pages), *options, "--", "--format", "jsonl")
    (submitted_job,) = json.loads(done.stdout.splitlines()[-1])
    assert submitted_job["run"] == str(out)
    wait_for(lambda: list(out.glob("parts/*.jsonl")), "the first part", 120)
    command = f"pipeline predict .*--out {re.escape(str(out))}"
    listed = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True, check=True)
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 240
    while slurm.state(submitted_job["job"]) not in ("COMPLETED", "FAILED", "CANCELLED"):
        assert time.monotonic() < deadline, [path.read_text()[-2000:] for path in out.glob("cluster/slurm/*log.out")]
        time.sleep(0.5)
    assert slurm.state(submitted_job["job"]) == "COMPLETED"
    files = [json.loads(line)["file"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert files == [str(path) for path in sorted(pages.iterdir())]
    assert len(read_jsonl(out / "lives.jsonl")) > 2, "it was started twice"
