"""Golden runs: losses of every method and detector, and a run resumed from a stored checkpoint.

Uses the command line and the files of a run only, so that this file can run the code of any commit:
``PYTHONPATH=CHECKOUT python tests/golden/runs.py OUT.json``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "run.yaml"
TEACHER = ["schedule.steps=60", "schedule.optimizer=adamw", "schedule.lr=0.003", "run.seed=1", "run.keep=1"]
DISTILLED = ["teacher.nodes.count=12", "teacher.statistics_pages=8"]
LIVE, MOMENTS = "teacher.signals=live", "method.graph.categorizer=moments"
METHODS = {
    "none": ["method.name=none"],
    "dsig-live": ["method.name=dsig", LIVE],
    "dsig-cached": ["method.name=dsig"],
    "dsig-student-nodes": ["method.name=dsig", LIVE, "method.nodes=student"],
    "pkd-live": ["method.name=pkd", LIVE],
    "graphkd-live": ["method.name=graphkd", LIVE, MOMENTS],
    "graphkd-cached": ["method.name=graphkd", MOMENTS],
}
ARCHITECTURES = ("faster_rcnn", "retinanet")


def main() -> None:
    """Write the losses and the hashes of the resumed run as JSON."""
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="graphkd-golden-") as folder:
        os.chdir(folder)
        unpack(Path())
        content = {"losses": losses(), "resumed": resumed()}
    out.write_text(json.dumps(content, indent=1))


def command(*arguments: str) -> None:
    """Run one graphkd command in this process."""
    from pipeline.cli.main import app

    app(list(arguments), standalone_mode=False)


def train(name: str, *overrides: str) -> list[dict[str, Any]]:
    """Train ``run.yaml`` under ``name`` in the working directory, and return the lines of its metrics."""
    command("train", str(CONFIG), f"name={name}", "data.val=null", *overrides)
    return [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]


def losses() -> dict[str, list[dict[str, float]]]:
    """Every loss term of 20 steps of each method on each detector, on the pages in ``data``."""
    result = {}
    for architecture in ARCHITECTURES:
        detector, teacher = f"detector.architecture={architecture}", f"teacher-{architecture}"
        train(teacher, detector, *TEACHER)
        taught = [detector, f"teacher.run=runs/{teacher}", *DISTILLED]
        command("cache", "build", str(CONFIG), "method.name=graphkd", *taught)
        for name, method in METHODS.items():
            case = f"{architecture}-{name}"
            result[case] = [line["terms"] for line in train(case, *taught, *method)]
    return result


def resumed() -> dict[str, Any]:
    """Resume the stored run from its checkpoint; hashes of its weights, and its losses from there on."""
    command("train", "runs/student/config.yaml")
    folder = Path("runs/student")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = max((folder / "checkpoints").glob("step-*"))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.glob("*.safetensors"))}
    return {"checkpoint": newest.name, "sha256": hashes, "losses": [line["terms"] for line in lines]}


def unpack(folder: Path) -> None:
    """Unpack the stored files into ``folder``: ``data``, ``runs/teacher`` with its cache, ``runs/student``."""
    content = b"".join(part.read_bytes() for part in sorted((HERE / "stored").glob("runs.tar.xz.*")))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")


if __name__ == "__main__":
    main()
