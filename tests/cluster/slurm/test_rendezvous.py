"""How tasks of a job find each other, without a Slurm: whole files, deadlines, failures, lost nodes, budgets, ports."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.site import Site
from cluster.slurm.ray_node import candidate_ports, free_ports
from cluster.slurm.rendezvous import Rendezvous
from cluster.slurm.restart_budget import RestartBudget
from cluster.slurm.slurm_env import SlurmEnv, read_slurm_env
from graphkd.errors import ConfigError, UserError


def rendezvous(folder: Path, job: str = "7", restart: int = 0, seconds: float = 5) -> Rendezvous:
    made = Rendezvous(folder, job, restart, time.time() + seconds)
    made.open()
    return made


def task(restart: int = 0, job: str = "7") -> SlurmEnv:
    return SlurmEnv(job=job, restart=restart, node=0, nodes=2, name="node1")


def test_published_content_reaches_other_tasks(tmp_path: Path) -> None:
    first, second = rendezvous(tmp_path), rendezvous(tmp_path)
    threading.Timer(0.3, lambda: first.publish("head", address="a:1")).start()
    assert second.wait_until(lambda: second.get("head"), lambda: "late") == {"address": "a:1"}
    assert (tmp_path / "7-0").stat().st_mode & 0o777 == 0o700


def test_publishing_makes_the_folder_for_its_user_only(tmp_path: Path) -> None:
    made = Rendezvous(tmp_path, "9", 0, time.time() + 5)
    assert made.get("result") is None
    made.publish("result", node="a")
    assert made.folder.stat().st_mode & 0o777 == 0o700 and made.get("result") == {"node": "a"}


def test_a_start_reads_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    rendezvous(tmp_path).publish("head", address="stale:1")
    assert rendezvous(tmp_path, restart=1).get("head") is None and rendezvous(tmp_path, job="8").get("head") is None


def test_a_wait_ends_at_its_deadline_or_when_a_node_fails(tmp_path: Path) -> None:
    late = rendezvous(tmp_path, seconds=0.3)
    with pytest.raises(ClusterError, match="node 3 did not come"):
        late.wait_until(lambda: None, lambda: "node 3 did not come")
    other = rendezvous(tmp_path, restart=1, seconds=60)
    threading.Timer(0.3, lambda: other.fail(2, "node 2 (node-b): no disk")).start()
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=r"node 2 \(node-b\): no disk"):
        other.wait_until(lambda: None, lambda: "late")
    assert time.monotonic() - begin < 5


def test_a_node_is_lost_when_others_were_heard_of_much_later(tmp_path: Path) -> None:
    here = rendezvous(tmp_path)
    assert not here.is_dead(1, 0, 60), "it has not joined yet"
    here.heartbeat(0)
    here.heartbeat(1)
    assert not here.is_dead(1, 0, 60)
    past = time.time() - 100
    os.utime(here.folder / "alive-1", (past, past))
    assert here.is_dead(1, 0, 60) and not here.is_dead(0, 1, 60)


def test_the_token_is_one_secret_that_only_its_user_reads(tmp_path: Path) -> None:
    path = rendezvous(tmp_path).token()
    assert path.stat().st_mode & 0o777 == 0o600 and len(path.read_text()) == 64
    assert rendezvous(tmp_path).token().read_text() == path.read_text()


def test_budgets_of_preemption_and_failure_are_apart(tmp_path: Path) -> None:
    site = Site(name="x", preemptions=2, failures=1)
    for restart, event in enumerate(("preempted", "failed", "preempted")):
        budget = RestartBudget(tmp_path, task(restart), site)
        budget.record_start()
        assert budget.has_no_end()
        budget.record_end(event)
        assert not budget.has_no_end() and budget.exhausted() is None
    without_end = RestartBudget(tmp_path, task(3), site)
    without_end.record_start()  # and never ends: the node failed
    last = RestartBudget(tmp_path, task(4), site)
    last.record_start()
    assert last.counts() == {"preempted": 2, "failed": 2}
    assert last.exhausted() == "it ended as failed 2 times, and the site allows 1"
    assert RestartBudget(tmp_path, task(0, job="8"), site).counts() == {"preempted": 0, "failed": 0}


def test_a_job_that_slurm_starts_again_after_sigterm_was_preempted(tmp_path: Path) -> None:
    budget = RestartBudget(tmp_path, task(), Site(name="x"))
    budget.record_start()
    budget.record_end("cancelled")
    assert budget.counts() == {"preempted": 0, "failed": 0}
    assert RestartBudget(tmp_path, task(1), Site(name="x")).counts() == {"preempted": 1, "failed": 0}


def test_ports_come_from_the_job_and_a_taken_one_is_skipped() -> None:
    candidates = candidate_ports("4711")
    assert candidates == candidate_ports("4711") != candidate_ports("4712") and len(set(candidates)) == len(candidates)
    assert all(20_000 <= port < 32_000 for job in ("1", "67043327", "12_3") for port in candidate_ports(job))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", candidates[0]))
        taken.listen()
        assert free_ports("127.0.0.1", candidates, 2) == candidates[1:3]
        with pytest.raises(ClusterError, match="all taken"):
            free_ports("127.0.0.1", candidates[:1], 1)


def test_outside_of_a_job_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match="runs inside a Slurm job"):
        read_slurm_env()


def test_five_hundred_nodes_meet_in_seconds(tmp_path: Path) -> None:
    """Threads stand for nodes; each waits for the head, joins, and the head sees all of them."""
    nodes, head = 512, rendezvous(tmp_path, seconds=60)

    def joins(node: int) -> None:
        own = Rendezvous(tmp_path, "7", 0, time.time() + 60)
        own.wait_until(lambda: own.get("head"), lambda: "late")
        own.publish(f"joined-{node}", node=str(node))

    threads = [threading.Thread(target=joins, args=(node,)) for node in range(1, nodes)]
    for thread in threads:
        thread.start()
    head.publish("head", address="a:1")
    others = set(range(1, nodes))
    head.wait_until(lambda: True if head.published_nodes("joined") >= others else None, lambda: "late")
    for thread in threads:
        thread.join()
    assert json.loads((head.folder / "joined-511.json").read_text()) == {"node": "511"}


def other_owner(path: Path) -> None:
    os.chown(path, 65534, 65534, follow_symlinks=False)


def linked(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def readable(path: Path) -> None:
    path.chmod(0o755 if path.is_dir() else 0o644)


TAMPERED = [linked, readable, pytest.param(other_owner, marks=pytest.mark.skipif(os.getuid() != 0, reason="as root"))]


@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_token_that_others_made_or_can_read_is_refused(tamper: Callable[[Path], None], tmp_path: Path) -> None:
    made = rendezvous(tmp_path)
    path = made.token()
    assert path.read_text() and made.token() == path
    tamper(path)
    with pytest.raises(ClusterError, match="token must be this user's alone and no link"):
        made.token()


@pytest.mark.parametrize("tamper", TAMPERED)
def test_a_folder_that_others_made_or_can_read_is_refused(tamper: Callable[[Path], None], tmp_path: Path) -> None:
    made = rendezvous(tmp_path)
    made.publish("head", address="a:1")
    tamper(made.folder)
    for use in (made.open, made.token, lambda: made.get("head")):
        with pytest.raises(ClusterError, match="7-0 must be this user's alone and no link"):
            use()


@pytest.mark.skipif(os.getuid() != 0, reason="as root")
def test_jobs_of_another_users_run_folder_are_refused_unless_told(tmp_path: Path) -> None:
    from cluster.records import check_owner

    check_owner(tmp_path)
    (tmp_path / "jobs.jsonl").write_text("")
    other_owner(tmp_path / "jobs.jsonl")
    with pytest.raises(UserError, match=r"jobs\.jsonl belongs to user 65534.*--any-owner"):
        check_owner(tmp_path)
