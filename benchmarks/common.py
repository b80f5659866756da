"""Shared by the benchmarks: interleaved timing, and the JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def interleaved(pairs: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each of ``works``, run alternately ``pairs`` times after one untimed run."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(pairs + 1):
        for work, own in zip(works, seconds, strict=True):
            begin = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                own.append(time.perf_counter() - begin)
    return seconds


def run_command(command: Sequence[str], **where: Any) -> str:
    """Run a command and return its output, or exit with it; ``where`` goes to :func:`subprocess.run`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **where)
    if done.returncode:
        raise SystemExit(f"{list(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios of each pair."""
    ratios = [one / other for one, other in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def machine() -> dict[str, Any]:
    """Description of the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def finish(result: dict[str, Any]) -> None:
    """Print the machine and the figures as the last line."""
    print(json.dumps({**result, "machine": machine()}))
