"""Everything around the training step: engines, workers, waiting for data, checkpoints, and recovery from a kill.

    python -m benchmarks.training_runs engines      # Ray's workers beside torchrun's; two workers beside one
    python -m benchmarks.training_runs checkpoints  # what saving costs
    python -m benchmarks.training_runs recovery     # from SIGKILL of a Ray worker to its next step

All train the quickstart's student alone on its pages, drawn below --out. Speeds are those between log lines, without
starting and compiling. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import finish, ratio, run_command

PAGES = 96
LOG_EVERY = 10
CADENCE = 1000  # run.checkpoint_every by default


def make_pages(out: Path) -> Path:
    from pipeline.data.prepare.pack import pack
    from pipeline.synth import write_pages

    packed = out / "data"
    if not (packed / "dataset.json").exists():
        pack(write_pages(out / "pages", count=PAGES, seed=0), out / "pages" / "images", packed, samples_per_shard=16)
    return packed


def config_file(out: Path, name: str, steps: int, engine: dict[str, Any], **run: Any) -> Path:
    """The quickstart's student, in its own folder."""
    from pipeline.config import load_config
    from pipeline.quickstart import CONFIGS

    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config(
        CONFIGS / "student.yaml",
        [f"data.train={make_pages(out)}", "data.val=null", f"schedule.steps={steps}", f"run.folder={folder}"],
    )
    content = config.model_dump(mode="json")
    content["engine"] |= engine
    content["run"] |= {"log_every": LOG_EVERY, "checkpoint_every": 10**6, **run}
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(path: Path, ranks: int = 1, threads: int = 1) -> None:
    """Train in processes of their own: ``ranks`` of torchrun's, or the one that drives Ray."""
    launch = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29511"] if ranks > 1 else []
    )
    script = path.with_name("train.py")
    script.write_text("from pipeline.cli.main import main\nmain()\n")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, *launch, str(script), "train", str(path)]
    run_command(command, env=environment)


def logged(out: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a run after the first, which includes one-time costs."""
    from pipeline.runs.metrics import read_metrics

    return read_metrics(out / name)[1:]


def speed(lines: list[dict[str, Any]]) -> float:
    """Pages a second over all of ``lines``."""
    return len(lines) / sum(1 / line["pages_per_s"] for line in lines)


def engines(out: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Ray with two workers, torchrun with two, and one process with two threads, in turns."""
    arms: dict[str, tuple[dict[str, Any], int, int]] = {
        "ray": ({"name": "ray", "workers": 2, "threads": 1}, 1, 1),
        "torchrun": ({"name": "local", "threads": 1}, 2, 1),
        "one": ({"name": "local", "threads": 2}, 1, 2),
    }
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    waits: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(pairs):
        for name, (engine, ranks, threads) in arms.items():
            train(config_file(out, name, steps, engine), ranks, threads)
            lines = logged(out, name)
            speeds[name].append(speed(lines))
            waits[name].append(statistics.median(line["data_wait"] for line in lines))
        print(
            f"turn {turn + 1}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in speeds.items()) + " pages/s"
        )
    return {
        "pages_per_s": {name: statistics.median(values) for name, values in speeds.items()},
        "ray_over_torchrun": ratio(speeds["ray"], speeds["torchrun"]),
        "two_workers_over_one": ratio(speeds["torchrun"], speeds["one"]),
        "data_wait": {name: {"median": statistics.median(own), "high": max(own)} for name, own in waits.items()},
    }


def checkpoints(out: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Time of training with a checkpoint every ten steps beside training without, spread over the usual cadence."""
    shares, held_up = [], []
    for turn in range(pairs):
        seconds = {}
        for name, every in (("without", 10**6), ("with", LOG_EVERY)):
            train(config_file(out, name, steps, {"name": "local", "threads": 2}, checkpoint_every=every), 1, 2)
            lines = logged(out, name)
            seconds[name] = (lines[-1]["time"] - lines[0]["time"]) / (LOG_EVERY * (len(lines) - 1))  # a step
        cost = LOG_EVERY * (seconds["with"] - seconds["without"])
        held_up.append(cost)
        shares.append(cost / (CADENCE * seconds["without"]))
        print(f"turn {turn + 1}: a step {seconds['without']:.3f} s, a checkpoint {cost:.3f} s, share {shares[-1]:.5f}")
    return {
        "seconds_a_checkpoint": {"median": statistics.median(held_up), "low": min(held_up), "high": max(held_up)},
        "share_of_training": {"median": statistics.median(shares), "low": min(shares), "high": max(shares)},
    }


def marking_worker(given: dict[str, Any]) -> None:
    """A Ray training worker that records when it starts, and is killed in a step the first time."""
    import torch

    from pipeline.train.engines import ray as ray_engine

    marks = Path(given["marks"])
    with marks.open("a") as file:
        file.write(f"begins {time.time()}\n")
    step, first, calls = torch.optim.AdamW.step, not (marks.parent / "killed").exists(), 0

    def marked(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if first and calls == 12:
            (marks.parent / "killed").touch()
            with marks.open("a") as file:
                file.write(f"killed {time.time()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        done = step(*arguments, **named)
        if not first and calls == 1:
            with marks.open("a") as file:
                file.write(f"stepped {time.time()}\n")
        return done

    torch.optim.AdamW.step = marked  # type: ignore[method-assign]
    ray_engine._worker({name: value for name, value in given.items() if name != "marks"})


def recovery(out: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds from the kill to Ray's next worker, to the loaded checkpoint, and to the first step."""
    parts: dict[str, list[float]] = {
        "ray starts another": [],
        "checkpoint is loaded": [],
        "first step": [],
        "in all": [],
    }
    for turn in range(pairs):
        path = config_file(
            out, "killed", steps, {"name": "ray", "workers": 1, "threads": 2}, checkpoint_every=LOG_EVERY
        )
        marks = out / "marks"
        shutil.rmtree(marks, ignore_errors=True)
        marks.mkdir()
        code = (
            "import sys; from ray.train.torch import TorchTrainer\n"
            "from benchmarks.training_runs import marking_worker\n"
            "make = TorchTrainer.__init__\n"
            "TorchTrainer.__init__ = lambda self, worker, *, train_loop_config, **rest: make(self, marking_worker, "
            f"train_loop_config={{**train_loop_config, 'marks': {str(marks / 'times')!r}}}, **rest)\n"
            f"sys.argv = ['graphkd', 'train', {str(path)!r}]; from pipeline.cli.main import main; main()"
        )
        run_command([sys.executable, "-c", code])
        times = [line.split() for line in (marks / "times").read_text().splitlines()]
        last = dict((what, float(when)) for what, when in times)
        killed, begins, stepped = last["killed"], last["begins"], last["stepped"]
        starts = [json.loads(line) for line in (out / "killed" / "starts.jsonl").read_text().splitlines()]
        loaded = [line["time"] for line in starts if line["event"] == "start"][-1]
        own = (begins - killed, loaded - begins, stepped - loaded, stepped - killed)
        for values, value in zip(parts.values(), own, strict=True):
            values.append(value)
        print(f"turn {turn + 1}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in parts.items()))
    return {name: {"median": statistics.median(own), "low": min(own), "high": max(own)} for name, own in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engines", "checkpoints", "recovery"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-training"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    work = {"engines": engines, "checkpoints": checkpoints, "recovery": recovery}[given.what]
    finish({given.what: work(given.out.resolve(), given.pairs, given.steps)})


if __name__ == "__main__":
    main()
