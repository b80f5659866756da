"""Training beside another busy process, and on an idle machine, by how torch's idle threads wait.

    python -m benchmarks.busy_neighbour --data DATASET [--rounds 7]

Seconds of the same steps of a small student on all cores: as torch waits by itself, with sleeping threads
(OMP_WAIT_POLICY), and as ``graphkd`` chooses; alone and beside a process that computes on one core. Interleaved rounds;
ends with one JSON line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import finish, ratio
from pipeline.core.wait_policy import VARIABLES

CHILD = """
import json, sys, time
from pathlib import Path
from pipeline.core.wait_policy import set_wait_policy
set_wait_policy()
from pipeline.config import load_config
from pipeline.context import RunContext
from pipeline.train.run import train_run

context = RunContext(load_config(Path(sys.argv[1]), sys.argv[2:]))
train_run(context)
lines = [json.loads(line) for line in (context.config.folder / "metrics.jsonl").read_text().splitlines()]
print(lines[-1]["time"] - lines[0]["time"])
"""
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "student.yaml"
POLICIES: dict[str, dict[str, str]] = {
    "torch's own": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default; being set, it keeps graphkd from choosing
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "chosen": {},
}


def seconds(data: Path, policy: dict[str, str], steps: int) -> float:
    """Seconds between the first and the last logged step of a training."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"data.train={data}",
            "data.val=null",
            f"run.folder={folder}/run",
            f"schedule.steps={steps}",
            "engine={name: local, workers: 1, threads: 2}",
            "run.log_every=5",
        ]
        command = [sys.executable, "-c", CHILD, str(CONFIG), *overrides]
        inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        done = subprocess.run(command, env={**inherited, **policy}, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="packed dataset, such as the quickstart's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15)
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for place in ("alone", "beside another"):
            other = None if place == "alone" else subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for name, policy in POLICIES.items():
                found.setdefault(f"{name}, {place}", []).append(seconds(given.data, policy, given.steps))
            if other is not None:
                other.kill()
                other.wait()
    for name, own in found.items():
        print(f"{name:<28} {statistics.median(own):7.2f} s ({min(own):.2f} to {max(own):.2f})")
    idle = found["torch's own, alone"]
    ratios = {f"{name} over torch's own, alone": ratio(own, idle) for name, own in found.items() if own is not idle}
    for name, value in ratios.items():
        print(f"{name:<52} {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})")
    finish({"seconds": found, "ratios": ratios})


if __name__ == "__main__":
    main()
