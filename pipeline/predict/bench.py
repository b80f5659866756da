"""Latency, memory and size of trained and exported students, side by side."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import DataError, first_line
from pipeline.predict.model import BUNDLE_FILE, PageModel, open_model
from pipeline.predict.predictor import on_canvas

WARMUP = 2
PEAK = "import sys; from pipeline.predict.bench import peak_memory; peak_memory(*sys.argv[1:])"


def bench(
    models: Sequence[Path],
    pages: Sequence[Image.Image],
    *,
    threads: int | None = None,
    rounds: int = 7,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time every model on every page, one after the other in each round.

    Args:
        models: run folders, checkpoints and bundles.
        pages: RGB, at least one.
        threads: of the network; None for all cores.
        rounds: passes over the pages.
        progress: called with rounds done and in total.

    Returns:
        For each model: ``model``, ``kind``, ``parameters``, ``mb``, ``ap`` (of its parity or evaluation, or None),
        ``preparing_ms``, ``network_ms``, ``p90_ms`` and ``total_ms`` per page (medians at batch 1), and ``peak_mb``.
    """
    if not pages:
        raise DataError("there are no pages to time; give --pages FILE")
    _set_threads(threads)
    opened = [open_model(path, "cpu", threads) for path in models]
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(rounds + WARMUP):
        for page in pages:
            for model, own in zip(opened, seconds, strict=True):
                timed = _one(model, page)
                if number >= WARMUP:
                    own.append(timed)
        progress(min(number + 1, rounds), rounds)
    return [
        {**_description(path, model), **_figures(own), "peak_mb": _peak_mb(path, threads), "threads": threads or "all"}
        for path, model, own in zip(models, opened, seconds, strict=True)
    ]


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _one(model: PageModel, page: Image.Image) -> tuple[float, float]:
    begin = time.perf_counter()
    canvas, transform = on_canvas(page, model.view)
    ready = time.perf_counter()
    model.detect(canvas[None], np.array([[transform.height, transform.width]], dtype=np.int64))
    return ready - begin, time.perf_counter() - ready


def _figures(seconds: list[tuple[float, float]]) -> dict[str, float]:
    preparing, network = zip(*seconds, strict=True)
    total = [sum(pair) for pair in seconds]
    return {
        "preparing_ms": 1000 * statistics.median(preparing),
        "network_ms": 1000 * statistics.median(network),
        "total_ms": 1000 * statistics.median(total),
        "p90_ms": 1000 * float(np.quantile(total, 0.9)),
    }


def _description(path: Path, model: PageModel) -> dict[str, Any]:
    if (path / BUNDLE_FILE).exists():
        parity = json.loads((path / "parity.json").read_text())
        size = (path / BUNDLE_FILE).stat().st_size
        kind = f"ONNX {parity['precision']}"
        return {"model": str(path), "kind": kind, "parameters": None, "mb": size / 1e6, "ap": parity["ap_exported"]}
    from pipeline.predict.native import NativeModel

    assert isinstance(model, NativeModel)
    evaluated = path / "eval.json"
    found = json.loads(evaluated.read_text()) if evaluated.exists() else {}
    return {
        "model": str(path),
        "kind": "torch",
        "parameters": sum(value.numel() for value in model.detector.parameters()),
        "mb": model.checkpoint.weights.stat().st_size / 1e6,
        "ap": found.get("ap"),
    }


def _peak_mb(path: Path, threads: int | None) -> float:
    """Peak memory of a process of its own that predicts a page."""
    command = [sys.executable, "-c", PEAK, str(path), str(threads or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{path} cannot be predicted with in another process ({first_line(RuntimeError(done.stderr))})")
    return float(done.stdout.split()[-1])


def peak_memory(path: str, threads: str) -> None:
    """Predict a blank page and write the peak memory of this process in MB to stdout."""
    model = open_model(path, "cpu", int(threads) or None)
    canvas = np.full((1, 3, *model.view.canvas), 255, dtype=np.uint8)
    model.detect(canvas, np.array([model.view.canvas], dtype=np.int64))
    sys.stdout.write(f"{_peak_of_this_process() / 1e6}\n")


def _peak_of_this_process() -> int:
    """Bytes. Not by getrusage where it can be helped, whose peak may be that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
