"""Node 0 of a job: the Ray head, the command on the cluster, and requeueing the job."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import time
from pathlib import Path

from cluster.errors import ClusterError
from cluster.slurm.command import POLL_S, Signals, command_line
from cluster.slurm.ray_node import RayNode, candidate_ports, die_with_parent, free_ports
from cluster.slurm.rendezvous import DEAD_AFTER_S, ENDED, HEAD, HEARTBEAT_S, JOINED, Rendezvous
from cluster.slurm.restart_budget import CANCELLED, FAILED, FINISHED, PREEMPTED, REFUSED, RestartBudget
from cluster.slurm.slurm_env import SlurmEnv
from cluster.slurm.spec import JobSpec
from pipeline.core.errors import TEMPORARY_FAILURE

log = logging.getLogger("graphkd.cluster")

PERMANENT = (1, 2)
"""Exit codes of the command after which another try is useless: an error of the user, wrong usage."""
REQUEUE_GRACE_S = 60.0
"""Grace period after requeue, before Slurm kills the task."""


class Head:
    """Task of node 0."""

    def __init__(self, spec: JobSpec, task: SlurmEnv, rendezvous: Rendezvous, address: str, signals: Signals) -> None:
        self.spec, self.task, self.rendezvous = spec, task, rendezvous
        self.address, self.signals = address, signals
        self.budget = RestartBudget(spec.run_folder, task, spec.site)

    def run(self) -> int:
        """Start the cluster, run the command on it, then stop both; requeue the job if it should continue.

        Raises:
            ClusterError: if the job's restart budget is exhausted.
        """
        self.rendezvous.open()
        self.budget.record_start()
        exhausted = self.budget.exhausted()
        if exhausted:
            self.budget.record_end(REFUSED, exhausted)
            raise ClusterError(
                f"job {self.task.job} is not started again: {exhausted}; look at its log, then submit again"
            )
        temporary = self.spec.site.ray_folder(self.task.job)
        node = RayNode(self.address, self.spec.site, self.rendezvous.token(), self.rendezvous.folder / "ray-0.log")
        try:
            code, reason = self._run_command(node, temporary)
        except ClusterError as error:
            code, reason = TEMPORARY_FAILURE, str(error)
        finally:
            self.rendezvous.publish(ENDED)
            node.stop()
            shutil.rmtree(temporary, ignore_errors=True)
        return self._finish(code, reason)

    def _run_command(self, node: RayNode, temporary: Path) -> tuple[int, str]:
        environment = self._start_cluster(node, temporary)
        command = subprocess.Popen(
            command_line(self.spec, self.task),
            env=environment,
            cwd=self.spec.directory,
            preexec_fn=die_with_parent,
        )
        next_heartbeat = 0.0
        while command.poll() is None:
            self.signals.forward(command)
            failure = "Ray's head ended" if node.has_ended() else None
            if time.monotonic() > next_heartbeat:
                next_heartbeat = time.monotonic() + HEARTBEAT_S
                failure = failure or self.rendezvous.failure() or self._dead_nodes()
            if failure:
                command.kill()
                command.wait()
                return TEMPORARY_FAILURE, failure
            time.sleep(POLL_S)
        return command.returncode, f"exit code {command.returncode}"

    def _start_cluster(self, node: RayNode, temporary: Path) -> dict[str, str]:
        """Start the head and wait for all nodes; return the environment of the command."""
        port, client_port, agent_port = free_ports(self.address, candidate_ports(self.task.job), 3)
        node.start_head(port, client_port, agent_port, temporary)
        deadline = f"within {self.spec.site.deadline_s:g} s"
        self.rendezvous.wait_until(node.is_up, lambda: f"node 0 ({self.task.name}): Ray's head was not up {deadline}")
        self.rendezvous.heartbeat(0)
        head = f"{self.address}:{port}"
        self.rendezvous.publish(HEAD, address=head, node=self.task.name)
        others = set(range(1, self.task.nodes))
        self.rendezvous.wait_until(
            lambda: True if self.rendezvous.published_nodes(JOINED) >= others else None,
            lambda: f"nodes {sorted(others - self.rendezvous.published_nodes(JOINED))} did not join {head} {deadline}",
        )
        log.info("a Ray cluster of %d nodes is up at %s", self.task.nodes, head)
        return {**node.environment(), "RAY_ADDRESS": head}

    def _dead_nodes(self) -> str | None:
        """Error about nodes without a recent heartbeat, or None."""
        self.rendezvous.heartbeat(0)
        dead = [node for node in range(1, self.task.nodes) if self.rendezvous.is_dead(node, 0, DEAD_AFTER_S)]
        return f"nodes {dead} have not been heard of for {DEAD_AFTER_S:g} s" if dead else None

    def _finish(self, code: int, reason: str) -> int:
        """Record the end of this start, and requeue the job unless it is finished, cancelled or refused."""
        event = self._event(code)
        self.budget.record_end(event, reason if code else "")
        if event in (FINISHED, CANCELLED, REFUSED):
            return code
        if event == FAILED:
            log.error("%s", reason)
        self.budget.requeue(reason)
        time.sleep(REQUEUE_GRACE_S)  # a task that exits by itself would end the job, not only this start of it
        return code

    def _event(self, code: int) -> str:
        if code == 0:
            return FINISHED
        if signal.SIGUSR2 in self.signals:
            return PREEMPTED
        if signal.SIGTERM in self.signals and not self.rendezvous.failure():
            return CANCELLED
        return REFUSED if code in PERMANENT else FAILED
