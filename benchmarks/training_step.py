"""A student's training step on this machine, beside that of another commit.

    python -m benchmarks.training_step --against COMMIT

Both run in processes of their own, one step of each in turn, on the same 8 pages of 256 x 192 px: the published
ResNet-18 student, and the quickstart's. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CANVAS, PAGES = [256, 192], 8
QUICKSTART = {
    "norm": "group",
    "anchor_sizes": [12, 24, 48, 96, 160],
    "aspect_ratios": [0.125, 0.4, 1.0],
    "fpn_channels": 64,
    "head_width": 256,
    "rpn_proposals_before_nms": 300,
    "rpn_proposals": 120,
    "rpn_batch": 128,
    "roi_batch": 64,
    "roi_positive_fraction": 0.4,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "published ResNet-18": {},
    "quickstart's ResNet-18": {"detector": {"backbone": "resnet18", **QUICKSTART}},
    "quickstart's MobileNetV3": {"detector": {"backbone": "mobilenetv3_small_100", **QUICKSTART}},
}


def serve(folder: Path, student: str) -> None:
    """Run a step for each line on stdin, and answer with its seconds."""
    import torch

    from benchmarks.step_cost import load_run_config, step_work
    from pipeline.data.format.dataset import PackedDataset
    from pipeline.data.loading.augmentation import EVALUATION_VIEW
    from pipeline.data.loading.loader import PageDataset, collate
    from pipeline.data.loading.order import SampleRef

    dataset = PackedDataset(folder / "data")
    config = load_run_config(folder, "alone", CANVAS, PAGES, **STUDENTS[student])
    items = PageDataset(dataset, config.data.view, 0, EVALUATION_VIEW)
    batch = collate([items[SampleRef(0, sample)] for sample in range(PAGES)])
    work = step_work(config, dataset, batch, torch.device("cpu"))
    for _ in sys.stdin:
        begin = time.perf_counter()
        work()
        print(time.perf_counter() - begin, flush=True)


class Server:
    """A process that runs steps with one version of the code."""

    def __init__(self, code: Path, folder: Path, student: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(folder), student]
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_WAIT_POLICY": "PASSIVE"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def step(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def compare(against: Path, folder: Path, student: str, pairs: int) -> dict[str, Any]:
    """Seconds of a step with the code beside this file and with that in ``against``, in turn."""
    from benchmarks.common import ratio

    servers = [Server(ROOT, folder, student), Server(against, folder, student)]
    try:
        seconds = [[server.step() for server in servers] for _ in range(pairs + 1)][1:]  # the first warms up
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
    ours, theirs = zip(*seconds, strict=True)
    return {"speed": ratio(list(theirs), list(ours)), "pages_per_s": PAGES / sorted(ours)[len(ours) // 2]}


def main() -> None:
    """Run the benchmark and print it."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.argv[3])
        return
    from benchmarks.common import finish
    from pipeline.data.prepare.pack import pack
    from pipeline.synth import write_pages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="what git names a commit by, or a folder")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--students", nargs="*", default=list(STUDENTS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, code = Path(place), Path(given.against)
        if not code.is_dir():
            code = folder / "code"
            code.mkdir()
            archive = subprocess.run(["git", "archive", given.against], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "x"], cwd=code, input=archive.stdout, check=True)
        write_pages(folder / "pages", count=PAGES, seed=0, width=CANVAS[1], height=CANVAS[0])
        pack(folder / "pages" / "annotations.json", folder / "pages" / "images", folder / "data")
        result = {}
        for student in given.students:
            found = result[student] = compare(code, folder, student, given.pairs)
            speed = found["speed"]
            print(
                f"{student:<26} {found['pages_per_s']:6.2f} pages/s, {speed['median']:.2f} "
                f"({speed['low']:.2f} to {speed['high']:.2f}) of {given.against}"
            )
        finish({"benchmark": "training_step", "against": given.against, "canvas": CANVAS, **result})


if __name__ == "__main__":
    main()
