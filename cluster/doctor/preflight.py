"""Checks of a site from inside a job: ``python -m cluster.doctor.preflight SPEC.json`` on every node.

Each node publishes its results in the job's folder, from which :mod:`cluster.doctor.examine` collects them.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from cluster.errors import ClusterError
from cluster.site import Site
from cluster.slurm.ray_node import candidate_ports, free_ports
from cluster.slurm.rendezvous import Rendezvous
from cluster.slurm.slurm_env import SlurmEnv, ipv4_address, read_slurm_env
from cluster.slurm.spec import JobSpec
from cluster.slurm.task import read_spec
from graphkd.errors import UserError
from pipeline.core.run_paths import CLUSTER

MAX_SOCKET_PATH_BYTES = 107
"""Limit of a Unix socket's path on Linux."""
RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
MIN_SHM_GB = 1.0
TIMEOUT_S = 60.0
ALL_REDUCE_BYTES = 32 << 20
ROUNDS = 5
RESULT = "checkup"


def main() -> None:
    """Check this node and publish the results."""
    spec, task = read_spec(), read_slurm_env()
    rendezvous = Rendezvous(spec.run_folder / CLUSTER, task.job, task.restart, time.time() + TIMEOUT_S)
    faults, info = check(spec, task, rendezvous)
    rendezvous.publish(f"{RESULT}-{task.node}", node=task.name, faults=faults, info=info)


def check(spec: JobSpec, task: SlurmEnv, rendezvous: Rendezvous) -> tuple[list[str], dict[str, str]]:
    """Return the faults of this node, one line each, and some info about it."""
    info = {"python": platform.python_version()}
    site = spec.site
    steps: list[Callable[[], object]] = [
        lambda: _shared_folders(site),
        lambda: _shared_memory(info),
        lambda: _socket_path(site, task),
        lambda: _interface(site),
        lambda: _gpus(site, info),
        lambda: _libraries(info),
        lambda: _exchange_files(task, rendezvous),
        lambda: _all_reduce(site, task, rendezvous, info),
    ]
    faults = []
    for step in steps:
        try:
            step()
        except UserError as error:  # noqa: PERF203 - a few steps
            faults.append(str(error))
        except Exception as error:  # unforeseen faults are reported, too
            faults.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")
    return faults, info


def _shared_folders(site: Site) -> None:
    missing = [str(folder) for folder in site.shared if not folder.is_dir()]
    if missing:
        raise ClusterError(
            f"shared folders {', '.join(missing)} are not there; correct shared in the site file, or the mount"
        )


def _shared_memory(info: dict[str, str]) -> None:
    free = shutil.disk_usage("/dev/shm").free / 1e9
    info["/dev/shm"] = f"{free:.1f} GB free"
    if free < MIN_SHM_GB:
        raise ClusterError(f"/dev/shm has {free:.2f} GB free, loaders and Ray need {MIN_SHM_GB:g}; enlarge it")


def _socket_path(site: Site, task: SlurmEnv) -> None:
    path = f"{site.ray_folder(task.job)}{RAY_SOCKET}"
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise ClusterError(
            f"paths of Ray's sockets below {site.ray_temp} would have {len(path.encode())} bytes, and Linux takes "
            f"{MAX_SOCKET_PATH_BYTES}; give a shorter ray_temp"
        )


def _interface(site: Site) -> None:
    known = [name for _, name in socket.if_nameindex()]
    if site.interface and site.interface not in known:
        raise ClusterError(f"interface {site.interface} is not there; it has {', '.join(known)}")


def _gpus(site: Site, info: dict[str, str]) -> None:
    import torch

    seen = torch.cuda.device_count()
    info["GPUs"] = str(seen)
    if seen != site.gpus_per_node:
        raise ClusterError(
            f"torch sees {seen} GPUs, the site says {site.gpus_per_node}; look at the driver and at gres"
        )


def _libraries(info: dict[str, str]) -> None:
    import ray
    import torch

    info["torch"], info["ray"] = torch.__version__, ray.__version__


def _exchange_files(task: SlurmEnv, rendezvous: Rendezvous) -> None:
    """Wait until every node sees the files of all others in the run folder."""
    rendezvous.publish(f"here-{task.node}", node=task.name)

    def missing() -> list[int]:
        return sorted(set(range(task.nodes)) - rendezvous.published_nodes("here"))

    rendezvous.wait_until(
        lambda: None if missing() else True,
        lambda: (
            f"files of nodes {missing()} do not appear in {rendezvous.folder}; "
            "give a run folder on a file system that all nodes share"
        ),
    )


def _all_reduce(site: Site, task: SlurmEnv, rendezvous: Rendezvous, info: dict[str, str]) -> None:
    """Connect all nodes and time an all-reduce of 32 MiB."""
    import torch
    import torch.distributed as dist

    address = site.node_address or ipv4_address(task.name)
    if task.is_head:
        (port,) = free_ports(address, candidate_ports(task.job), 1)
        rendezvous.publish("store", address=address, port=port)
    store = rendezvous.wait_until(lambda: rendezvous.get("store"), lambda: "node 0 did not publish its port")
    os.environ |= site.network
    on_gpu = bool(site.gpus_per_node) and torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{store['address']}:{store['port']}",
        rank=task.node,
        world_size=task.nodes,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    values = torch.ones(ALL_REDUCE_BYTES // 4, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(values)
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    if on_gpu:
        torch.cuda.synchronize()
    rate = ROUNDS * ALL_REDUCE_BYTES / (time.perf_counter() - begin) / 1e9
    info["all-reduce"] = f"{rate:.2f} GB/s over {task.nodes} nodes"
    dist.destroy_process_group()


def read_reports(rendezvous: Rendezvous, nodes: int) -> dict[int, dict[str, object]]:
    """Results that nodes have published so far."""
    published = {node: rendezvous.get(f"{RESULT}-{node}") for node in range(nodes)}
    return {node: result for node, result in published.items() if result is not None}


if __name__ == "__main__":
    main()
