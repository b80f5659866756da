"""Latency, memory and size of trained and exported students, side by side."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import CheckpointError, DataError, first_line
from pipeline.core.files import write_json
from pipeline.core.parallel import available_cores
from pipeline.core.run_paths import LATENCY
from pipeline.predict.bundle import BundleModel, read_bundle
from pipeline.predict.model import BUNDLE_FILE, PageModel, Runtime, open_model
from pipeline.predict.page import PageSource
from pipeline.predict.predictor import Predictor, on_canvas

WARMUP = 2
PEAK = "import sys; from pipeline.predict.bench import peak_memory; peak_memory(*sys.argv[1:])"
Times = tuple[float, float, float]
"""Seconds of preparing a page, of the network, and of what follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Something that predicts a page."""

    name: str
    kind: str
    threads: int
    run: Callable[[Image.Image], Times]
    weights: str
    """SHA-256 of the checkpoint that it is, or was exported from."""
    about: dict[str, Any]
    """Further columns: ``parameters``, ``gflops``, ``mb``, ``ap`` and ``peak_mb``, each None if unknown."""


def bench(
    models: Sequence[Path],
    pages: Sequence[Image.Image],
    *,
    threads: Sequence[int] = (),
    rounds: int = 7,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time every model on every page, one page at a time.

    Each model's folder keeps the figures of all models with its weights in ``latency.json``: a run those of its
    exports, too.

    Args:
        models: run folders, checkpoints and bundles; bundles also with OpenVINO where that is installed.
        pages: RGB, at least one.
        threads: numbers of threads of the network; default: 1, 2 and all cores.
        rounds: passes over the pages.
        progress: called with rounds done and in total.

    Returns:
        As :func:`time_pages`.

    Raises:
        DataError: without pages.
    """
    counts = sorted(set(threads) or {1, min(2, available_cores()), available_cores()})
    contenders = [each for path in models for count in counts for each in _contenders(path, count)]
    found = time_pages(contenders, pages, rounds, progress)
    for path in models:
        own = [row for row, each in zip(found, contenders, strict=True) if each.weights in _weights(path, contenders)]
        write_json(path / LATENCY, {"version": 1, "rows": own})
    return found


def _weights(path: Path, contenders: Sequence[Contender]) -> set[str]:
    return {each.weights for each in contenders if each.name == str(path)}


def time_pages(
    contenders: Sequence[Contender],
    pages: Sequence[Image.Image],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time contenders, which take turns on each page in each round.

    Returns:
        For each: ``model``, ``kind``, ``threads``, what it tells about itself, and per page in ms ``preparing_ms``,
        ``network_ms`` (with suppression), ``finishing_ms``, ``total_ms`` (medians) and ``p90_ms``.

    Raises:
        DataError: without pages.
    """
    if not pages:
        raise DataError("there are no pages to time; give --data FILE")
    seconds: list[list[Times]] = [[] for _ in contenders]
    for number in range(rounds + WARMUP):
        for page in pages:
            for contender, own in zip(contenders, seconds, strict=True):
                timed = contender.run(page)
                if number >= WARMUP:
                    own.append(timed)
        progress(max(0, number + 1 - WARMUP), rounds)
    return [
        {"model": each.name, "kind": each.kind, "threads": each.threads, **each.about, **_figures(own)}
        for each, own in zip(contenders, seconds, strict=True)
    ]


def _figures(seconds: list[Times]) -> dict[str, float]:
    names, total = ("preparing_ms", "network_ms", "finishing_ms"), [sum(times) for times in seconds]
    parts = {name: statistics.median(part) for name, part in zip(names, zip(*seconds, strict=True), strict=True)}
    found = {**parts, "total_ms": statistics.median(total), "p90_ms": float(np.quantile(total, 0.9))}
    return {name: 1000 * value for name, value in found.items()}


def _contenders(path: Path, threads: int) -> list[Contender]:
    runtimes: list[Runtime] = ["onnxruntime"]
    if (path / BUNDLE_FILE).exists() and find_spec("openvino"):
        runtimes.append("openvino")
    return [_contender(path, threads, runtime) for runtime in runtimes]


def _contender(path: Path, threads: int, runtime: Runtime) -> Contender:
    model = open_model(path, "cpu", threads, runtime)
    kind, about = _description(path, model, runtime)
    return Contender(
        name=str(path),
        kind=kind,
        threads=threads,
        weights=model.description.weights_sha256 if isinstance(model, BundleModel) else model.identity,
        run=partial(_one, Predictor(model), None if isinstance(model, BundleModel) else threads),
        about={**about, "peak_mb": _peak_mb(path, threads, runtime)},
    )


def _one(predictor: Predictor, torch_threads: int | None, image: Image.Image) -> Times:
    if torch_threads is not None:
        import torch

        torch.set_num_threads(torch_threads)
    begin = time.perf_counter()
    canvas, transform = on_canvas(image, predictor.model.view)
    ready = time.perf_counter()
    size = np.array([[transform.height, transform.width]], dtype=np.int64)
    (found,) = predictor.model.detect(canvas[None], size)
    detected = time.perf_counter()
    predictor.on_page(PageSource(file="", page=1, image=image), transform, found)
    return ready - begin, detected - ready, time.perf_counter() - detected


def _description(path: Path, model: PageModel, runtime: Runtime) -> tuple[str, dict[str, Any]]:
    if isinstance(model, BundleModel):
        name = {"onnxruntime": "ONNX", "openvino": "OpenVINO"}[runtime]
        return f"{name} {model.description.precision}", _of_bundle(path)
    from pipeline.predict.native import NativeModel

    assert isinstance(model, NativeModel)
    evaluated = path / "eval.json"
    found = json.loads(evaluated.read_text()) if evaluated.exists() else {}
    return "torch", {
        "parameters": model.parameters(),
        "gflops": model.gflops(),
        "mb": model.checkpoint.weights.stat().st_size / 1e6,
        "ap": found.get("ap"),
    }


def _of_bundle(path: Path) -> dict[str, Any]:
    description = read_bundle(path)
    try:
        ap = json.loads((path / "parity.json").read_text())["ap_exported"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / 'parity.json'} is unreadable ({error}); export the bundle again") from error
    return {
        "parameters": description.parameters,
        "gflops": description.gflops,
        "mb": (path / BUNDLE_FILE).stat().st_size / 1e6,
        "ap": ap,
    }


def _peak_mb(path: Path, threads: int, runtime: Runtime) -> float:
    """Peak memory of a process of its own that predicts a page."""
    command = [sys.executable, "-c", PEAK, str(path), str(threads), runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{path} cannot be predicted with in another process ({first_line(RuntimeError(done.stderr))})")
    return float(done.stdout.split()[-1])


def peak_memory(path: str, threads: str, runtime: Runtime) -> None:
    """Predict a blank page and write the peak memory of this process in MB to stdout."""
    model = open_model(path, "cpu", int(threads), runtime)
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
