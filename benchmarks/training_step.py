"""A student's training step on this machine, beside that of another commit.

    python -m benchmarks.training_step --against COMMIT
    python -m benchmarks.training_step --against FOLDER --device cuda --canvas 1184 832 --pages 16 --students ResNet-50

Both run in processes of their own, one step of each in turn, on the same pages: students with the published widths, and
the quickstart's. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = yaml.safe_load((ROOT / "configs" / "quickstart" / "base.yaml").read_text())["detector"]
STUDENTS: dict[str, dict[str, Any]] = {
    "ResNet-18": {},
    "ResNet-50": {"detector": {"backbone": "resnet50", "norm": "frozen"}},
    "quickstart's ResNet-18": {"detector": {"backbone": "resnet18", **QUICKSTART}},
    "quickstart's MobileNetV3": {"detector": {"backbone": "mobilenetv3_small_100", **QUICKSTART}},
}


def serve(folder: Path, changes: dict[str, Any], canvas: list[int], device: str) -> None:
    """Run a step for each line on stdin, and answer with its seconds."""
    import torch

    from benchmarks.step_cost import load_run_config, step_work
    from pipeline.data.format.dataset import PackedDataset
    from pipeline.data.loading.augmentation import EVALUATION_VIEW
    from pipeline.data.loading.loader import PageDataset, collate
    from pipeline.data.loading.order import SampleRef

    dataset = PackedDataset(folder / "data")
    config = load_run_config(folder, "alone", canvas, len(dataset), **changes)
    items = PageDataset(dataset, config.data.view, 0, EVALUATION_VIEW)
    batch = collate([items[SampleRef(0, sample)] for sample in range(len(dataset))]).to(device)
    work = step_work(config, dataset, batch, torch.device(device))
    for _ in sys.stdin:
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - begin, flush=True)


class Server:
    """A process that runs steps with one version of the code."""

    def __init__(self, code: Path, folder: Path, changes: dict[str, Any], canvas: list[int], device: str) -> None:
        given = json.dumps([changes, canvas, device])
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder), given]
        environment = {**os.environ, "PYTHONPATH": str(code)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def step(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def compare(codes: list[Path], folder: Path, changes: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Speed of a step with the first code over the second, steps of both in turn."""
    from benchmarks.common import ratio

    servers = [Server(code, folder, changes, given.canvas, given.device) for code in codes]
    try:
        seconds = [[server.step() for server in servers] for _ in range(given.pairs + 2)][2:]  # without the first two
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
    ours, theirs = zip(*seconds, strict=True)
    return {"speed": ratio(theirs, ours), "pages_per_s": given.pages / statistics.median(ours)}


def main() -> None:
    """Run the benchmark and print it."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), *json.loads(sys.argv[3]))
        return
    from benchmarks.common import finish
    from pipeline.data.prepare.pack import pack
    from pipeline.synth import write_pages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="what git names a commit by, or a folder")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--canvas", type=int, nargs=2, default=[256, 192], help="height and width, px")
    parser.add_argument("--pages", type=int, default=8, help="pages a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", type=json.loads, default={}, help="the config's section compute, as JSON")
    parser.add_argument(
        "--students", nargs="*", default=["ResNet-18", "quickstart's ResNet-18", "quickstart's MobileNetV3"]
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, code = Path(place), Path(given.against)
        if not code.is_dir():
            code = folder / "code"
            code.mkdir()
            archive = subprocess.run(["git", "archive", given.against], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "x"], cwd=code, input=archive.stdout, check=True)
        write_pages(folder / "pages", count=given.pages, seed=0, width=given.canvas[1], height=given.canvas[0])
        pack(folder / "pages" / "annotations.json", folder / "pages" / "images", folder / "data")
        result = {}
        for student in given.students:
            changes = {**STUDENTS[student], "compute": given.compute}
            found = result[student] = compare([ROOT, code], folder, changes, given)
            speed = found["speed"]
            print(
                f"{student:<26} {found['pages_per_s']:6.2f} pages/s, {speed['median']:.2f} "
                f"({speed['low']:.2f} to {speed['high']:.2f}) of {given.against}"
            )
        finish({"benchmark": "training_step", "against": given.against, "canvas": given.canvas, **result})


if __name__ == "__main__":
    main()
