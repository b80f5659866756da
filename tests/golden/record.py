"""Record anew what the golden tests compare with: ``python -m tests.golden.record [expected|stored]``.

Only for a change that is meant: a new config key, a new file format. ``stored`` makes the dataset, teacher, cache and
run that later versions must still open, so it is done once for each version of those formats.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.golden import formats, runs

EXPECTED, STORED = runs.HERE / "expected", runs.HERE / "stored"
PART_BYTES = 250_000
SYNTH = ["--count", "12", "--width", "96", "--height", "128", "--seed", "5"]
STUDENT = ["name=student", "method.name=graphkd", "teacher.run=runs/teacher", *runs.DISTILLED]
STUDENT += [
    "schedule.steps=12",
    "schedule.ema=0.9",
    "run.checkpoint_every=6",
    "run.keep=1",
    "run.keep_every=6",
    "run.eval_every=6",
    "run.ledger=true",
]
KEPT_STEPS = 6


def main() -> None:
    """Record all, or the part that is named."""
    parts = sys.argv[1:] or ["stored", "expected"]
    with tempfile.TemporaryDirectory(prefix="graphkd-golden-") as folder:
        os.chdir(folder)
        if "stored" in parts:
            make_runs()
            _cut_off(Path("runs/student"))
            _store()
        if "expected" in parts:
            shutil.rmtree("runs", ignore_errors=True)
            shutil.rmtree("data", ignore_errors=True)
            write("config_schema", formats.config_schema())
            write("command_line", formats.command_line())
            write("exit_codes", formats.exit_codes())
            write("job_scripts", formats.job_scripts())
            runs.unpack(Path())
            write("identities", identities())
            write("resumed", runs.resumed()["losses"])
            write("losses", runs.losses())
            shutil.rmtree("runs")
            shutil.rmtree("data")
            write("file_keys", file_keys())


def make_runs() -> None:
    """Pack pages, train a teacher, build its cache, train a student, in the working directory."""
    runs.command("data", "synth", "--out", "pages", *SYNTH)
    packing = ["--annotations", "pages/annotations.json", "--images", "pages/images", "--out", "data"]
    runs.command("data", "pack", *packing, "--shard-size", "5", "--workers", "1")
    shutil.rmtree("pages")
    # Without momentum the optimizer has no state, which keeps the archive small.
    runs.command("train", str(runs.CONFIG), "name=teacher", "schedule.momentum=0", "run.seed=1", "run.keep=1")
    runs.command("cache", "build", str(runs.CONFIG), *STUDENT)
    runs.command("train", str(runs.CONFIG), *STUDENT)


def file_keys() -> dict[str, Any]:
    """The keys of every file that runs leave, finished and not, made in the working directory."""
    make_runs()
    runs.command("train", str(runs.CONFIG), *STUDENT, "schedule.lr=0.1", "--allow-changes")
    _interrupt_packing(Path("unfinished"))
    _interrupt_quickstart(Path("quickstart"))
    return formats.keys_below(Path()) | {f"job/{name}": keys for name, keys in formats.job_files(Path("job")).items()}


def _interrupt_packing(out: Path) -> None:
    from pipeline.data.prepare.pack import pack

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    runs.command("data", "synth", "--out", "pages", *SYNTH)
    with suppress(KeyboardInterrupt):
        pack(Path("pages/annotations.json"), Path("pages/images"), out, samples_per_shard=5, workers=1, progress=stop)
    shutil.rmtree("pages")


def _interrupt_quickstart(out: Path) -> None:
    from pipeline.quickstart import quickstart

    def stop(title: str, unit: str) -> Any:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        quickstart(out, "small", 0, stop)


def identities() -> dict[str, Any]:
    """The dataset's identity and those of the cache, by name, computed anew from the stored files."""
    from pipeline.config import load_config
    from pipeline.context import RunContext

    context = RunContext(load_config(Path("runs/student/config.yaml")))
    return {
        "dataset": context.dataset.identity,
        "cache": context.cache_identity,
        "statistics": context.statistics_identity,
    }


def write(name: str, content: Any) -> None:
    """Write one expected value."""
    (EXPECTED / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _cut_off(folder: Path) -> None:
    """Leave the run as a kill would have left it some steps after the checkpoint of step 6."""
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    shutil.rmtree(folder / "tensorboard")
    for name in ("eval.json", "predictions.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= KEPT_STEPS + 2))
    starts = (folder / "starts.jsonl").read_text().splitlines(keepends=True)
    (folder / "starts.jsonl").write_text(starts[0])


def _store() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as archive:
        for path in sorted([*Path("data").rglob("*"), *Path("runs").rglob("*")]):
            if "tensorboard" not in path.parts and path.is_file():
                archive.add(path)
    for old in STORED.glob("runs.tar.xz.*"):
        old.unlink()
    content = buffer.getvalue()
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        (STORED / f"runs.tar.xz.{number:02d}").write_bytes(content[start : start + PART_BYTES])


if __name__ == "__main__":
    main()
