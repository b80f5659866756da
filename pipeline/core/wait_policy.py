"""How torch's idle threads wait: spinning is faster on an idle machine, sleeping beside other processes.

Measured with a small student on two cores (``benchmarks/busy_neighbour.py``): sleeping costs 40 % on an idle machine,
and spinning threads beside one busy process take 3.3 times as long.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
STAT = Path("/proc/stat")
WATCHED_S = 0.06
BUSY_CORES = 0.4  # of other processes, above which idle threads sleep
IDLE_FIELDS = (3, 4)  # idle and waiting for disks, of a line of STAT


def set_wait_policy() -> None:
    """Let torch's idle threads sleep if other processes use the cores of this one. Call before torch is imported.

    Does nothing where OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, or the system does not tell.
    """
    if not any(name in os.environ for name in VARIABLES) and busy_cores() > BUSY_CORES:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def busy_cores() -> float:
    """Cores that others use now, of those that this process may use; 0 if unknown."""
    try:
        before = _ticks()
        time.sleep(WATCHED_S)
        after = _ticks()
    except (OSError, ValueError):
        return 0.0
    return sum(
        (after[core][0] - busy) / max(1, after[core][1] - total)
        for core, (busy, total) in before.items()
        if core in after
    )


def _ticks() -> dict[int, tuple[int, int]]:
    """Busy and total ticks of each core that this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    found = {}
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in allowed:
            values = [int(field) for field in fields]
            found[int(name[3:])] = sum(values) - sum(values[field] for field in IDLE_FIELDS), sum(values)
    return found
