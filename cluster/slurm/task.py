"""One task of a job: ``python -m cluster.slurm.task SPEC.json``, started by srun once on every node.

Node 0 starts Ray's head, waits for the others, runs the command and tells all when it has ended; the others join the
head and leave with it. Every wait has a deadline, and a node that cannot go on says why to all. A signal before the
time limit or at preemption (SIGUSR2) is passed on to the command, which saves and leaves; then the job is queued again.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cluster.slurm.ray_node import RayNode, die_with_parent, free_ports, ports_of
from cluster.slurm.rendezvous import ClusterError, Rendezvous
from cluster.slurm.restart_budget import CANCELLED, FAILED, FINISHED, PREEMPTED, REFUSED, RestartBudget, requeue
from cluster.slurm.slurm_env import SlurmEnv, address_of, read_slurm_env
from cluster.slurm.spec import JobSpec
from graphkd.errors import UserError
from pipeline.core.errors import TEMPORARY_FAILURE

log = logging.getLogger("graphkd.cluster")

POLL_S = 0.5
ENDED, HEAD, JOINED = "ended", "head", "joined"
USAGE = (1, 2)
"""Exit codes of the command for what another try would not mend: a user's error, wrong usage."""
HEARTBEAT_S = 5.0
LOST_S = 60.0
"""After which a node that has not been heard of is taken for dead."""
MANY = 8
"""Nodes beyond which each looks at the shared folder less often."""
LEFT = 60.0
"""Seconds that a task waits to be ended after its job was queued again."""


def main() -> None:
    """Run the task; exit codes are the command's own, or 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        code = run(JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), read_slurm_env())
    except UserError as error:
        log.error("%s", error)
        code = 1
    sys.exit(code)


def run(spec: JobSpec, place: SlurmEnv) -> int:
    """Be this node of the job; gives the exit code of the task."""
    with received() as signals:
        if not spec.ray:
            return _alone(spec, place, signals)
        meeting = Rendezvous(spec.run_folder / "cluster", place.job, place.restart, time.time() + spec.site.deadline_s)
        address = spec.site.node_address or address_of(place.name)
        try:
            _require_shared(spec, place)
            if place.is_head:
                return _Head(spec, place, meeting, address, signals).run()
            return _worker(spec, place, meeting, address)
        except UserError as error:
            line = f"node {place.node} ({place.name}): {error}"
            if meeting.folder.is_dir() and meeting.failure() is None:
                meeting.fail(place.node, line)
            raise ClusterError(line if not str(error).startswith("node ") else str(error)) from error


def _require_shared(spec: JobSpec, place: SlurmEnv) -> None:
    """Raise ClusterError where this node does not see a folder that all are to share."""
    for folder in spec.site.shared:
        if not folder.is_dir():
            raise ClusterError(f"shared folder {folder} is not there; mend shared in the site file, or the mount")
    if not spec.run_folder.is_dir():
        raise ClusterError(f"run folder {spec.run_folder} is not there; give one on a file system that all nodes share")


@contextmanager
def received() -> Iterator[list[int]]:
    """Yield the list that signals of schedulers are put into, in place of what they would do."""
    signals: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        signals.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class _Head:
    """Node 0."""

    def __init__(self, spec: JobSpec, place: SlurmEnv, meeting: Rendezvous, address: str, signals: list[int]) -> None:
        self.spec, self.place, self.meeting, self.address, self.signals = spec, place, meeting, address, signals
        self.budget = RestartBudget(spec.run_folder, place)

    def run(self) -> int:
        """Start the cluster and the command on it; afterwards end all, and queue the job again where it should."""
        self.meeting.open()
        self.budget.record_start()
        exhausted = self.budget.exhausted_budget(self.spec.site)
        if exhausted:
            self.budget.record_end(REFUSED, exhausted)
            raise ClusterError(
                f"job {self.place.job} is not started again: {exhausted}; look at its log, then submit again"
            )
        temporary = self.spec.site.ray_folder(self.place.job)
        node = RayNode(self.address, self.spec.site, self.meeting.token(), self.meeting.folder / "ray-0.log")
        try:
            code, why = self._command_on(node, temporary)
        except ClusterError as error:
            code, why = TEMPORARY_FAILURE, str(error)
        finally:
            self.meeting.publish(ENDED)
            node.end()
            shutil.rmtree(temporary, ignore_errors=True)
        return self._ended(code, why)

    def _command_on(self, node: RayNode, temporary: Path) -> tuple[int, str]:
        port, client_port, agent_port = free_ports(self.address, ports_of(self.place.job), 3)
        node.start_head(port, client_port, agent_port, temporary)
        deadline = f"within {self.spec.site.deadline_s:g} s"
        self.meeting.wait_until(node.is_up, lambda: f"node 0 ({self.place.name}): Ray's head was not up {deadline}")
        self.meeting.heartbeat(0)
        head = f"{self.address}:{port}"
        self.meeting.publish(HEAD, address=head, node=self.place.name)
        others = set(range(1, self.place.nodes))
        self.meeting.wait_until(
            lambda: True if self.meeting.published_nodes(JOINED) >= others else None,
            lambda: f"nodes {sorted(others - self.meeting.published_nodes(JOINED))} did not join {head} {deadline}",
        )
        log.info("a Ray cluster of %d nodes is up at %s", self.place.nodes, head)
        return self._supervised(node, {**node.environment(), "RAY_ADDRESS": head})

    def _supervised(self, node: RayNode, environment: dict[str, str]) -> tuple[int, str]:
        words, where = _command(self.spec, self.place), self.spec.directory
        command = subprocess.Popen(words, env=environment, cwd=where, preexec_fn=die_with_parent)
        passed, beat = 0, 0.0
        while command.poll() is None:
            passed = _pass_on(self.signals, passed, command)
            failed = "Ray's head ended" if node.has_ended() else None
            if time.monotonic() - beat > HEARTBEAT_S:
                beat = time.monotonic()
                failed = failed or self.meeting.failure() or self._lost()
            if failed:
                command.kill()
                command.wait()
                return TEMPORARY_FAILURE, failed
            time.sleep(POLL_S)
        return command.returncode, f"exit code {command.returncode}"

    def _lost(self) -> str | None:
        """The line about nodes that died without a word."""
        self.meeting.heartbeat(0)
        lost = [node for node in range(1, self.place.nodes) if self.meeting.is_dead(node, 0, LOST_S)]
        return f"nodes {lost} have not been heard of for {LOST_S:g} s" if lost else None

    def _ended(self, code: int, why: str) -> int:
        if code == 0:
            self.budget.record_end(FINISHED)
            return 0
        if signal.SIGUSR2 in self.signals:
            self.budget.record_end(PREEMPTED, why)
        elif signal.SIGTERM in self.signals and not self.meeting.failure():
            self.budget.record_end(CANCELLED, why)
            return code
        elif code in USAGE:
            self.budget.record_end(REFUSED, why)
            return code
        else:
            self.budget.record_end(FAILED, why)
            log.error("%s", why)
        requeue_within_budget(self.budget, self.spec, self.place, why)
        time.sleep(LEFT)  # until it is ended; whoever leaves by himself would end the job, not this start of it
        return code


def requeue_within_budget(budget: RestartBudget, spec: JobSpec, place: SlurmEnv, why: str) -> None:
    """Queue the job again; raises ClusterError where that was done often enough."""
    exhausted = budget.exhausted_budget(spec.site)
    if exhausted:
        raise ClusterError(f"job {place.job} is not queued again: {exhausted}; {why}")
    log.info("job %s is queued again: %s", place.job, why)
    requeue(place.job)


def _worker(spec: JobSpec, place: SlurmEnv, meeting: Rendezvous, address: str) -> int:
    """A node that joins the head and leaves with it."""
    late = f"the head was not up within {spec.site.deadline_s:g} s, or {spec.run_folder} is not shared with its node"
    head = meeting.wait_until(lambda: meeting.get(HEAD), lambda: late)
    node = RayNode(address, spec.site, meeting.token(), meeting.folder / f"ray-{place.node}.log")
    try:
        (agent_port,) = free_ports(address, ports_of(place.job, place.node), 1)
        node.start_worker(head["address"], agent_port)
        meeting.wait_until(node.is_up, lambda: f"Ray did not join {head['address']} within {spec.site.deadline_s:g} s")
        meeting.heartbeat(place.node)
        meeting.publish(f"{JOINED}-{place.node}", node=place.name)
        while meeting.get(ENDED) is None:
            if node.has_ended():
                raise ClusterError("Ray ended while the job was running")
            meeting.heartbeat(place.node)
            if meeting.is_dead(0, place.node, LOST_S):
                raise ClusterError(f"the head has not been heard of for {LOST_S:g} s")
            time.sleep(HEARTBEAT_S if place.nodes > MANY else POLL_S)
    finally:
        node.end()
    return 0


def _alone(spec: JobSpec, place: SlurmEnv, signals: list[int]) -> int:
    """A task without a cluster, such as one of an array that builds a cache."""
    command = subprocess.Popen(_command(spec, place), cwd=spec.directory)
    passed = 0
    while command.poll() is None:
        passed = _pass_on(signals, passed, command)
        time.sleep(POLL_S)
    return command.returncode


def _pass_on(signals: list[int], passed: int, command: subprocess.Popen[bytes]) -> int:
    """Send the signals after the first ``passed`` to ``command``; gives how many it has had."""
    for number in signals[passed:]:
        command.send_signal(number)
    return len(signals)


def _command(spec: JobSpec, place: SlurmEnv) -> list[str]:
    words = [sys.executable, "-m", "pipeline", *spec.command]
    if spec.ray and spec.trains:
        words += ["engine.name=ray", f"engine.workers={place.nodes * spec.site.workers}"]
    return words


if __name__ == "__main__":
    main()
