"""Trains student pairs under every method and ablation, with several seeds, and prints means, spreads and gains.

    python benchmarks/study.py --out runs/study                      # synthetic pages, quickstart's schedule
    python benchmarks/study.py --out runs/study --schedule long --variants none dsig pkd graphkd
    python benchmarks/study.py --out runs/study --pages polish-gov --data data/polish-gov

Finished runs are appended to OUT/results.jsonl; started again, the study goes on with those that are missing. All
variants of one table share pages, views, teacher, schedule and seeds. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

VARIANTS: dict[str, list[str]] = {
    "none": ["method.name=none"],
    "dsig": ["method.name=dsig"],
    "dsig, student's nodes": ["method.name=dsig", "method.nodes=student", "teacher.signals=live"],
    "pkd": ["method.name=pkd", "teacher.signals=live"],
    "graphkd": ["method.name=graphkd"],
    "graphkd, student's nodes": ["method.name=graphkd", "method.nodes=student", "teacher.signals=live"],
    "no merging": ["method.name=graphkd", "method.graph.merge=false"],
    "no categories": ["method.name=graphkd", "method.graph.categorizer=none"],
    "moments": ["method.name=graphkd", "method.graph.categorizer=moments"],
    "cosine": ["method.name=graphkd", "method.graph.lengths=cosine"],
    "complete graph": ["method.name=graphkd", "method.graph.edges=complete"],
    "no edges": ["method.name=graphkd", "method.graph.edges=none"],
    "mse nodes": ["method.name=graphkd", "method.weights.node_metric=mse"],
    "pearson nodes": ["method.name=graphkd", "method.weights.node_metric=pearson"],
    "no logits": ["method.name=graphkd", "method.weights.logits=0"],
    "no boxes": ["method.name=graphkd", "method.weights.boxes=0"],
    "nodes alone": [
        "method.name=graphkd",
        "method.graph.edges=none",
        "method.graph.merge=false",
        "method.graph.categorizer=none",
    ],
    "no inheriting": ["method.name=graphkd", "method.inherit=false"],
    "dsig, inheriting": ["method.name=dsig", "method.inherit=true"],
    "pkd, inheriting": ["method.name=pkd", "teacher.signals=live", "method.inherit=true"],
    "inheriting alone": [
        "method.name=graphkd",
        "method.inherit=true",
        *[f"method.weights.{term}=0" for term in ("node", "edge", "logits", "boxes")],
    ],
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student of the study."""

    pages: str
    schedule: str
    variant: str
    seed: int
    folder: str
    config: str
    overrides: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.pages, self.schedule, self.variant, self.seed


def train_student(run: Run) -> dict[str, Any]:
    """Train and score one student on one thread; runs in a process of its own."""
    import torch

    from pipeline.config import load_config
    from pipeline.runs.metrics import read_metrics
    from pipeline.train.run import evaluate_run, train_run

    torch.set_num_threads(1)
    config = load_config(Path(run.config), run.overrides)
    train_run(config)
    figures = evaluate_run(config)
    last = read_metrics(config.folder)[-1]
    return {
        **asdict(run),
        "ap": figures["ap"],
        "ap50": figures["ap50"],
        "ap75": figures["ap75"],
        "seconds": last["seconds"],
        "terms": last["terms"],
    }


def study_overrides(out: Path, data: Path, pages: str, folder: Path, seed: int) -> list[str]:
    """What every run of one table shares: pages in one view, teacher, engine."""
    return [
        f"data.train={data / 'train'}",
        f"data.val={data / 'val'}",
        "engine.name=local",
        "engine.threads=1",
        "run.checkpoint_every=100000",
        f"run.folder={folder}",
        f"run.seed={seed}",
    ]


def make_synthetic(out: Path) -> Path:
    """640 training and 192 held-out synthetic pages."""
    from pipeline.data.pack import pack
    from pipeline.synth import write_pages

    data = out / "data" / "synthetic"
    for split, count, seed in (("train", 640, 0), ("val", 192, 1)):
        if not (data / split / "dataset.json").exists():
            pages = out / "pages" / split
            write_pages(pages, count=count, seed=seed)
            pack(pages / "annotations.json", pages / "images", data / split, samples_per_shard=64)
    return data


def planned(
    out: Path, data: Path, pages: str, schedule: str, variants: dict[str, list[str]], seeds: list[int], steps: int
) -> list[Run]:
    runs = []
    for seed in seeds:
        for name, changes in variants.items():
            folder = (
                out
                / "runs"
                / pages
                / schedule
                / f"{name.replace(' ', '-').replace(',', '').replace(chr(39), '')}-{seed}"
            )
            shared = study_overrides(out, data, pages, folder, seed)
            teacher = [f"teacher.run={out / 'teachers' / pages}", f"teacher.cache={out / 'caches' / pages}"]
            view = ["data.view.shortest_edge=[192, 192]"]  # one view for all: what a cache of one view holds
            overrides = (*shared, *teacher, *view, f"schedule.steps={steps}", *changes)
            config = CONFIGS / "quickstart" / "student-graphkd.yaml"
            runs.append(
                Run(
                    pages=pages,
                    schedule=schedule,
                    variant=name,
                    seed=seed,
                    folder=str(folder),
                    config=str(config),
                    overrides=overrides,
                )
            )
    return runs


def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(runs: list[Run], results: Path, jobs: int) -> None:
    done = {(row["pages"], row["schedule"], row["variant"], row["seed"]) for row in finished(results)}
    missing = [run for run in runs if run.key not in done]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(train_student, run) for run in missing]
        for number, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{number}/{len(missing)} {row['schedule']} {row['variant']} seed {row['seed']}: "
                f"AP {100 * row['ap']:.1f} in {row['seconds']:.0f} s",
                flush=True,
            )


def table(rows: list[dict[str, Any]], variants: list[str]) -> list[dict[str, Any]]:
    """Mean, spread over seeds (sample standard deviation) and gain over none, seed by seed, in AP points."""
    by_variant = {name: {row["seed"]: 100 * row["ap"] for row in rows if row["variant"] == name} for name in variants}
    alone = by_variant.get("none", {})
    summary = []
    for name, scores in by_variant.items():
        if not scores:
            continue
        gains = [score - alone[seed] for seed, score in scores.items() if seed in alone]
        summary.append(
            {
                "variant": name,
                "runs": len(scores),
                "ap": statistics.mean(scores.values()),
                "spread": statistics.stdev(scores.values()) if len(scores) > 1 else 0.0,
                "gain": statistics.mean(gains) if gains else None,
                "gain_spread": statistics.stdev(gains) if len(gains) > 1 else 0.0,
            }
        )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", default="synthetic")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--schedule", default="short")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--change", nargs="+", default=[], help="NAME:override,override of further variants.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    variants = {name: VARIANTS[name] for name in given.variants}
    variants |= {text.split(":")[0]: text.split(":")[1].split("|") for text in given.change}
    data = given.data or make_synthetic(given.out)
    runs = planned(given.out, data, given.pages, given.schedule, variants, given.seeds, given.steps)
    run_all(runs, given.out / "results.jsonl", given.jobs)
    rows = [row for row in finished(given.out / "results.jsonl") if row["schedule"] == given.schedule]
    for line in table(rows, list(variants)):
        print(line)


if __name__ == "__main__":
    main()
