"""Looking at a site from inside a job: ``python -m cluster.doctor.preflight SPEC.json`` on every node.

Every node publishes what it found in the job's folder; :mod:`cluster.doctor.examine` gathers that.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from cluster.site import Site
from cluster.slurm.ray_node import free_ports, ports_of
from cluster.slurm.rendezvous import ClusterError, Rendezvous
from cluster.slurm.slurm_env import SlurmEnv, address_of, read_slurm_env
from cluster.slurm.spec import JobSpec
from graphkd.errors import UserError

LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path on Linux."""
RAYS_PART = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
LEAST_SHM_GB = 1.0
MEETING_S = 60.0
REDUCED_BYTES = 32 << 20
ROUNDS = 5
RESULT = "checkup"


def main() -> None:
    """Check this node and publish the result."""
    spec, place = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), read_slurm_env()
    meeting = Rendezvous(spec.run_folder / "cluster", place.job, place.restart, time.time() + MEETING_S)
    faults, facts = check(spec, place, meeting)
    meeting.publish(f"{RESULT}-{place.node}", node=place.name, faults=faults, facts=facts)


def check(spec: JobSpec, place: SlurmEnv, meeting: Rendezvous) -> tuple[list[str], dict[str, str]]:
    """Faults of this node, one line each, and facts worth knowing."""
    facts = {"python": platform.python_version()}
    site = spec.site
    steps: list[Callable[[], object]] = [
        lambda: _shared_folders(site),
        lambda: _memory_for_sharing(facts),
        lambda: _socket_path(site, place),
        lambda: _interface(site),
        lambda: _gpus(site, facts),
        lambda: _libraries(facts),
        lambda: _meet(place, meeting),
        lambda: _reduce(site, place, meeting, facts),
    ]
    faults = []
    for step in steps:
        try:
            step()
        except UserError as error:  # noqa: PERF203 - a few steps
            faults.append(str(error))
        except Exception as error:  # a doctor reports what it did not think of, too
            faults.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")
    return faults, facts


def _shared_folders(site: Site) -> None:
    missing = [str(folder) for folder in site.shared if not folder.is_dir()]
    if missing:
        raise ClusterError(
            f"shared folders {', '.join(missing)} are not there; mend shared in the site file, or the mount"
        )


def _memory_for_sharing(facts: dict[str, str]) -> None:
    free = shutil.disk_usage("/dev/shm").free / 1e9
    facts["/dev/shm"] = f"{free:.1f} GB free"
    if free < LEAST_SHM_GB:
        raise ClusterError(f"/dev/shm has {free:.2f} GB free, loaders and Ray need {LEAST_SHM_GB:g}; enlarge it")


def _socket_path(site: Site, place: SlurmEnv) -> None:
    path = f"{site.ray_folder(place.job)}{RAYS_PART}"
    if len(path.encode()) > LONGEST_SOCKET:
        raise ClusterError(
            f"paths of Ray's sockets below {site.ray_temp} would have {len(path.encode())} bytes, and Linux takes "
            f"{LONGEST_SOCKET}; give a shorter ray_temp"
        )


def _interface(site: Site) -> None:
    known = [name for _, name in socket.if_nameindex()]
    if site.interface and site.interface not in known:
        raise ClusterError(f"interface {site.interface} is not there; it has {', '.join(known)}")


def _gpus(site: Site, facts: dict[str, str]) -> None:
    import torch

    seen = torch.cuda.device_count()
    facts["GPUs"] = str(seen)
    if seen != site.gpus_per_node:
        raise ClusterError(
            f"torch sees {seen} GPUs, the site says {site.gpus_per_node}; look at the driver and at gres"
        )


def _libraries(facts: dict[str, str]) -> None:
    import ray
    import torch

    facts["torch"], facts["ray"] = torch.__version__, ray.__version__


def _meet(place: SlurmEnv, meeting: Rendezvous) -> None:
    """All nodes see each other's files in the run folder."""
    meeting.publish(f"here-{place.node}", node=place.name)
    everybody = set(range(place.nodes))
    meeting.wait_until(
        lambda: True if meeting.published_nodes("here") >= everybody else None,
        lambda: (
            f"files of nodes {sorted(everybody - meeting.published_nodes('here'))} do not appear in {meeting.folder}; "
            "give a run folder on a file system that all nodes share"
        ),
    )


def _reduce(site: Site, place: SlurmEnv, meeting: Rendezvous, facts: dict[str, str]) -> None:
    """Ports that can be reached, and how fast all nodes add up 32 MiB."""
    import torch
    import torch.distributed as dist

    address = site.node_address or address_of(place.name)
    if place.is_head:
        (port,) = free_ports(address, ports_of(place.job), 1)
        meeting.publish("store", address=address, port=port)
    store = meeting.wait_until(lambda: meeting.get("store"), lambda: "node 0 did not publish its port")
    os.environ |= site.network
    on_gpu = bool(site.gpus_per_node) and torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{store['address']}:{store['port']}",
        rank=place.node,
        world_size=place.nodes,
        timeout=timedelta(seconds=MEETING_S),
    )
    values = torch.ones(REDUCED_BYTES // 4, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(values)
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    if on_gpu:
        torch.cuda.synchronize()
    rate = ROUNDS * REDUCED_BYTES / (time.perf_counter() - begin) / 1e9
    facts["all-reduce"] = f"{rate:.2f} GB/s over {place.nodes} nodes"
    dist.destroy_process_group()


def results(meeting: Rendezvous, nodes: int) -> dict[int, dict[str, object]]:
    """What nodes have published so far."""
    said = {node: meeting.get(f"{RESULT}-{node}") for node in range(nodes)}
    return {node: result for node, result in said.items() if result is not None}


if __name__ == "__main__":
    main()
