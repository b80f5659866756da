"""Training on one GPU: half precision, memory format and compilation, and cached compared with live teachers.

    python -m benchmarks.gpu --out runs/benchmark-gpu
    python -m benchmarks.gpu --out DIR --against FOLDER_OF_ANOTHER_VERSION
    python -m benchmarks.gpu --out DIR --canvas 256 192 --pages 2 --pairs 2 --backbones resnet18 --teachers resnet50

Students with the published widths on pages of the published canvas (1184 x 832 px), from random weights. Alternating
steps on one batch in memory: median of 7, lowest and highest. busy is the share of an unprofiled step in which a kernel
runs. train is a whole training that decodes its pages. Takes about 5 minutes. Every part writes DIR/PART.json; the last
line is one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import finish, interleaved, ratio
from benchmarks.step_cost import load_run_config, step_work
from benchmarks.training_step import ROOT, compare
from pipeline.cache.build import build_cache, local_builders
from pipeline.config import RunConfig
from pipeline.config.schema import ComputeConfig
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.data.prepare.pack import pack
from pipeline.runs.metrics import read_metrics
from pipeline.synth import write_pages
from pipeline.train.precision import autocast
from pipeline.train.run import train_run

ARMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "bf16, channels last, backbone compiled": {"precision": "bf16", "channels_last": True, "compile": True},
    "bf16, channels last, step compiled": {"precision": "bf16", "channels_last": True, "compile": "step"},
}
FASTEST = {"precision": "bf16", "teacher_precision": "bf16", "channels_last": True, "compile": "step"}
BEFORE = ARMS["bf16, channels last, backbone compiled"]  # what earlier versions know
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
PROFILED = 3
# Kernels by words in their names; the first match counts.
KERNELS = {
    "RoI align": ("roi_align",),
    "suppression": ("nms", "gather_keep", "suppress"),
    "convolutions and products": ("conv", "gemm", "cudnn", "xmma", "cutlass", "nvjet", "wgrad", "dgrad", "fprop"),
    "optimiser": ("multi_tensor", "foreach"),
    "compiled, element by element": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
    "norms and activations, element by element": ("elementwise", "reduce", "pool"),
    "sorting and indexing": ("sort", "radix", "index", "gather", "scatter", "scan", "topk"),
}


class Bench:
    """Pages, configs and one batch on the GPU."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.canvas, self.pages, self.pairs = given.out, given.canvas, given.pages, given.pairs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = self.out / "pages"
        if not (self.out / "data" / "dataset.json").exists():
            write_pages(folder, count=given.pages, seed=0, width=self.canvas[1], height=self.canvas[0])
            pack(folder / "annotations.json", folder / "images", self.out / "data")
        self.dataset = PackedDataset(self.out / "data")
        items = PageDataset(self.dataset, self.config("view", "resnet18", {}).data.view, 0, EVALUATION_VIEW)
        self.batch = collate([items[SampleRef(0, sample)] for sample in range(self.pages)]).to(self.device)

    def config(self, name: str, backbone: str, compute: dict[str, Any], **changes: Any) -> RunConfig:
        detector = {"backbone": backbone, "norm": "frozen"}
        engine = {"name": "local", "device": self.device.type}
        whole = {"detector": detector, "compute": compute, "engine": engine, **changes}
        return load_run_config(self.out, name, self.canvas, self.pages, **whole)

    def work(self, config: RunConfig) -> Callable[[], None]:
        return step_work(config, self.dataset, self.batch, self.device, prefetches=True)

    def timed(self, works: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        for work in works.values():  # compiling, choosing kernels
            for _ in range(3):
                work()
        return dict(zip(works, interleaved(self.pairs, *works.values()), strict=True))

    def figures(self, seconds: list[float], work: Callable[[], None]) -> dict[str, Any]:
        """Pages per second, shares of kernels, and peak memory of a step."""
        step = statistics.median(seconds)
        figures: dict[str, Any] = {"pages_per_s": self.pages / step, "step_ms": 1000 * step}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            kernels, calls = profiled_step(work)
            figures |= {"busy": sum(kernels.values()) / step, **calls}
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            figures["kernels"] = {name: own / sum(kernels.values()) for name, own in kernels.items()}
        return figures


def profiled_step(work: Callable[[], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of kernels per step by kind, longest first; and how often the host launches one or waits."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            work()
    torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    calls = {"launches": 0.0, "waits": 0.0}
    for event in profiled.key_averages():
        calls["launches"] += event.count / PROFILED * ("LaunchKernel" in event.key)
        calls["waits"] += event.count / PROFILED * (event.key in WAITS)
        if not event.self_device_time_total or event.device_type == DeviceType.CPU:
            continue
        name = event.key.lower()
        kind = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")
        seconds[kind] = seconds.get(kind, 0.0) + event.self_device_time_total / 1e6 / PROFILED
    return dict(sorted(seconds.items(), key=lambda item: -item[1])), calls


def compute(bench: Bench, backbone: str) -> dict[str, Any]:
    """A student alone, with each way of computing."""
    works = {name: bench.work(bench.config("alone", backbone, changes)) for name, changes in ARMS.items()}
    seconds = bench.timed(works)
    return {
        name: {**bench.figures(own, works[name]), "speed_over_fp32": ratio(seconds["fp32"], own)}
        for name, own in seconds.items()
    }


def teachers(bench: Bench, backbones: list[str]) -> dict[str, Any]:
    """A ResNet-18 student alone, with a cached teacher (the same cost for all), and with each live teacher."""
    configs = {"alone": bench.config("alone", "resnet18", FASTEST)}
    for backbone in backbones:
        name = f"teacher-{backbone}"
        train_run(RunContext(bench.config(name, backbone, {})))
        nodes = {"count": 64, "min_score": 0.0, "nms_iou": 1.0}  # an untrained teacher: keep all proposals
        teacher = {"run": str(bench.out / name), "nodes": nodes, "statistics_pages": bench.pages}
        teacher |= {"cache": str(bench.out / f"cache-{backbone}"), "signals": "live"}
        live = bench.config("live", "resnet18", FASTEST, teacher=teacher, method={"name": "graphkd"})
        if "cached" not in configs:
            cached = {**teacher, "signals": "cache"}
            configs["cached"] = bench.config("cached", "resnet18", FASTEST, teacher=cached, method={"name": "graphkd"})
            build_cache(RunContext(configs["cached"]), local_builders(RunContext(configs["cached"])))
        else:
            RunContext(live).ensure_statistics()
        configs[f"live {backbone}"] = live
    works = {arm: bench.work(config) for arm, config in configs.items()}
    seconds = bench.timed(works)
    figures: dict[str, Any] = {arm: bench.figures(own, works[arm]) for arm, own in seconds.items()}
    beside = {arm: "cached" if arm.startswith("live") else "alone" for arm in configs if arm != "alone"}
    return figures | {f"{arm} over {other}": ratio(seconds[arm], seconds[other]) for arm, other in beside.items()}


def training(bench: Bench, steps: int, workers: int) -> dict[str, Any]:
    """A whole training of a ResNet-18 that reads and decodes its pages."""
    config = bench.config(
        "train",
        "resnet18",
        FASTEST,
        schedule={"steps": steps, "batch": bench.pages, "reference_batch": bench.pages, "lr": 1e-5},
        run={"folder": str(bench.out / "train"), "log_every": 5, "eval_batch": bench.pages},
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"loader_workers": workers})})
    train_run(RunContext(config))
    lines = read_metrics(config.folder)[3:]  # after compiling
    return {
        "pages_per_s": len(lines) / sum(1 / line["pages_per_s"] for line in lines),
        "data_wait": statistics.median(line["data_wait"] for line in lines),
        "loader_workers": workers,
    }


def against(bench: Bench, code: Path, backbones: list[str]) -> dict[str, Any]:
    """Students alone, beside the code of another version, which knows fewer ways of computing."""
    given = argparse.Namespace(canvas=bench.canvas, pages=bench.pages, pairs=bench.pairs, device=bench.device.type)
    return {
        backbone: compare(
            [ROOT, code], bench.out, {"detector": {"backbone": backbone, "norm": "frozen"}, "compute": BEFORE}, given
        )
        for backbone in backbones
    }


def detectron2_step(bench: Bench) -> Callable[[], None]:
    """A training step of detectron2's own Faster R-CNN with a ResNet-50 and FPN, by its own code."""
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from graphkd.detectors import DetectorConfig
    from graphkd.detectors.detectron2.model import build_pyramid, build_rcnn

    config = DetectorConfig.model_validate({"framework": "detectron2", "backbone": "resnet50"})
    size = (bench.canvas[0], bench.canvas[1])
    model = build_rcnn(config, bench.dataset.num_classes, build_pyramid(config, size)).to(bench.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    pages = [
        {
            "image": image.flip(0),
            "instances": Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes),
        }
        for image, (boxes, classes) in zip(bench.batch.images, bench.batch.targets().by_page(), strict=True)
    ]

    def work() -> None:
        with EventStorage(), autocast(ComputeConfig(precision="bf16"), bench.device):
            losses = model(pages)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return work


def peers(bench: Bench) -> dict[str, Any]:
    """Our ResNet-50 beside detectron2's own training step, both in bf16."""
    works = {"ours": bench.work(bench.config("alone", "resnet50", FASTEST)), "detectron2": detectron2_step(bench)}
    seconds = bench.timed(works)
    figures: dict[str, Any] = {name: bench.figures(own, works[name]) for name, own in seconds.items()}
    return figures | {"speed over detectron2": ratio(seconds["detectron2"], seconds["ours"])}


def shown(figures: dict[str, Any], indent: str = "  ") -> None:
    for name, value in figures.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            print(f"{indent}{name}")
            shown(value, indent + "  ")
        elif isinstance(value, dict):
            print(f"{indent}{name:<24} " + ", ".join(f"{key} {own:.3f}" for key, own in value.items()))
        else:
            print(f"{indent}{name:<24} {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--canvas", type=int, nargs=2, default=[1184, 832], help="height and width, px")
    parser.add_argument("--pages", type=int, default=16, help="pages a step")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--backbones", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--teachers", nargs="*", default=["resnet50", "resnet101", "resnet152"])
    parser.add_argument("--steps", type=int, default=60, help="of the whole training; 0 for none")
    parser.add_argument("--against", type=Path, help="folder with the code of another version")
    parser.add_argument("--loader-workers", type=int, default=12)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"student-{name}": lambda name=name: compute(bench, name) for name in given.backbones},
    }
    if given.teachers:
        parts["teachers"] = lambda: teachers(bench, given.teachers)
    if given.against:
        parts["against"] = lambda: against(bench, given.against, given.backbones)
    if find_spec("detectron2"):
        parts["detectron2"] = lambda: peers(bench)
    if given.steps:
        parts["training"] = lambda: training(bench, given.steps, given.loader_workers)
    result: dict[str, Any] = {}
    for name, part in parts.items():
        result[name] = part()
        (given.out / f"{name}.json").write_text(json.dumps(result[name]))
        print(name)
        shown(result[name])
    finish({"benchmark": "gpu", "canvas": given.canvas, "pages": given.pages, **result})


if __name__ == "__main__":
    main()
