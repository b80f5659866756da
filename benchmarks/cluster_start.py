"""Time from the start of a Slurm job to its first training step, compared with ``ray start`` and ``graphkd train`` by
hand.

    python -m benchmarks.cluster_start --out runs/benchmark-start

As root, on a real Slurm of two nodes that is started on this machine (tests/support/slurm.py). Both arms train the
quickstart's student on one node from the same pages, in turns; the job's start is Slurm's, with a resolution of one
second. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml

from benchmarks.common import finish, run_command
from benchmarks.training_runs import config_file
from cluster.slurm.ray_node import STARTED
from tests.support.processes import end_all
from tests.support.slurm import SlurmHere, free_ports, missing

ADDRESS = "127.0.0.2"
STEPS = 3
PYTHON = sys.executable


def config(out: Path, name: str) -> Path:
    return config_file(out, name, STEPS, {"name": "ray", "workers": 1, "threads": 1}, log_every=1)


def first_step(folder: Path, seconds: float = 180) -> float:
    """Unix time of the first step of a run, from its metrics."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.exists() or not metrics.read_text().endswith("\n"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} had no step within {seconds} s")
        time.sleep(0.1)
    return float(json.loads(metrics.read_text().splitlines()[0])["time"])


def by_job(out: Path, slurm: SlurmHere, site: Path) -> float:
    """Seconds from the start of a job to its first step."""
    path = config(out, "job")
    words = [PYTHON, "-m", "pipeline", "submit", "slurm", str(path), "--site", str(site)]
    job = run_command(words, env=slurm.environment).split()[1]
    stepped = first_step(out / "job")
    while slurm.state(job) != "COMPLETED":
        time.sleep(0.5)
    (when,) = re.findall(r"StartTime=(\S+)", slurm.output("scontrol", "show", "job", job))
    return stepped - datetime.fromisoformat(when).timestamp()


def by_hand(out: Path) -> float:
    """Seconds from ``ray start`` to the first step of a training that is started once Ray is up."""
    path, begin = config(out, "hand"), time.time()
    port, client, agent = free_ports(3)
    words = [PYTHON, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port), "--num-cpus", "4"]
    words += ["--node-ip-address", ADDRESS, "--include-dashboard=false", "--ray-client-server-port", str(client)]
    words += ["--dashboard-agent-listen-port", str(agent), "--object-store-memory", str(256 << 20)]
    ray_log = out / "ray.log"
    # A token in ~/.ray, which any local Ray creates, is required only of clients that expect one.
    environment = {**os.environ, "RAY_ADDRESS": f"{ADDRESS}:{port}", "RAY_AUTH_MODE": "disabled"}
    with ray_log.open("wb") as log:
        ray = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while STARTED not in ray_log.read_text(errors="replace"):
            time.sleep(0.1)
        run_command([PYTHON, "-m", "pipeline", "train", str(path)], env=environment)
        return first_step(out / "hand") - begin
    finally:
        end_all(ray.pid)
        ray.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-start"))
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    reason = missing()
    if reason:
        sys.exit(reason)
    site = given.out / "site.yaml"
    content = {"name": "here", "cpus_per_node": 4, "python": PYTHON, "node_address": ADDRESS, "time_minutes": 10}
    site.write_text(yaml.safe_dump(content))
    seconds: dict[str, list[float]] = {"job": [], "hand": []}
    with tempfile.TemporaryDirectory(prefix="graphkd-slurm-") as folder:
        slurm = SlurmHere(Path(folder) / "slurm")
        Path(folder).chmod(0o755)
        slurm.start()
        try:
            for turn in range(given.pairs):
                seconds["job"].append(by_job(given.out, slurm, site))
                seconds["hand"].append(by_hand(given.out))
                print(f"turn {turn + 1}: " + ", ".join(f"{name} {own[-1]:.1f} s" for name, own in seconds.items()))
        finally:
            slurm.stop()
    more = [job - hand for job, hand in zip(seconds["job"], seconds["hand"], strict=True)]
    figures = {
        name: {"median": statistics.median(own), "low": min(own), "high": max(own)}
        for name, own in {**seconds, "job less hand": more}.items()
    }
    for name, own in figures.items():
        print(f"{name:<16} {own['median']:.1f} s ({own['low']:.1f} to {own['high']:.1f})")
    finish({"benchmark": "cluster_start", "seconds": figures})


if __name__ == "__main__":
    main()
