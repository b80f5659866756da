"""Nodes of a job other than node 0: they join the Ray head and leave with it."""

from __future__ import annotations

import time

from cluster.errors import ClusterError
from cluster.slurm.command import POLL_S
from cluster.slurm.ray_node import RayNode, candidate_ports, free_ports
from cluster.slurm.rendezvous import DEAD_AFTER_S, ENDED, HEAD, HEARTBEAT_S, JOINED, Rendezvous
from cluster.slurm.slurm_env import SlurmEnv
from cluster.slurm.spec import JobSpec

MANY_NODES = 8
"""Beyond this number, nodes poll the shared folder less often."""


def run_worker(spec: JobSpec, task: SlurmEnv, rendezvous: Rendezvous, address: str) -> None:
    """Join the head, and return when it announces the end. Raises ClusterError if Ray or the head fails."""
    deadline = f"within {spec.site.deadline_s:g} s"
    no_head = f"the head was not up {deadline}, or {spec.run_folder} is not shared with its node"
    head = rendezvous.wait_until(lambda: rendezvous.get(HEAD), lambda: no_head)["address"]
    node = RayNode(address, spec.site, rendezvous.token(), rendezvous.folder / f"ray-{task.node}.log")
    try:
        (agent_port,) = free_ports(address, candidate_ports(task.job, task.node), 1)
        node.start_worker(head, agent_port)
        rendezvous.wait_until(node.is_up, lambda: f"Ray did not join {head} {deadline}")
        rendezvous.heartbeat(task.node)
        rendezvous.publish(f"{JOINED}-{task.node}", node=task.name)
        while rendezvous.get(ENDED) is None:
            if node.has_ended():
                raise ClusterError("Ray ended while the job was running")
            rendezvous.heartbeat(task.node)
            if rendezvous.is_dead(0, task.node, DEAD_AFTER_S):
                raise ClusterError(f"the head has not been heard of for {DEAD_AFTER_S:g} s")
            time.sleep(HEARTBEAT_S if task.nodes > MANY_NODES else POLL_S)
    finally:
        node.stop()
