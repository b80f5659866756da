"""Trains students under every method and ablation, with several seeds, and prints means, spreads and gains.

    python -m benchmarks.study --out runs/study                       # the short schedule: the quickstart's
    python -m benchmarks.study --out runs/study --table long          # four times as long
    python -m benchmarks.study --out runs/study --table polish-gov --data data/polish-gov

Teacher and cache are built once; finished students are appended to OUT/results.jsonl, and a restarted study continues
with the missing ones. All variants of a table share pages, views, teacher, schedule and seeds. Ends with one
JSON line. ``--try NAME:key=value,key=value`` adds a variant.
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import finish
from benchmarks.study_table import print_table, summarise

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
LIVE, GRAPHKD = "teacher.signals=live", "method.name=graphkd"

METHODS: dict[str, list[str]] = {
    "none": ["method.name=none"],
    "dsig": ["method.name=dsig"],
    "pkd": ["method.name=pkd", LIVE],
    "graphkd": [GRAPHKD],
}
INHERITING: dict[str, list[str]] = {
    "inheriting alone": [
        GRAPHKD,
        *[f"method.weights.{term}=0" for term in ("node", "edge", "logits", "boxes")],
    ],
    "dsig, inheriting": ["method.name=dsig", "method.inherit=true"],
    "pkd, inheriting": ["method.name=pkd", LIVE, "method.inherit=true"],
}
ABLATIONS: dict[str, list[str]] = {
    "graphkd, no inheriting": [GRAPHKD, "method.inherit=false"],
    "graphkd, no merging": [GRAPHKD, "method.graph.merge=false"],
    "graphkd, no categories": [GRAPHKD, "method.graph.categorizer=none"],
    "graphkd, all nodes in the graph": [GRAPHKD, "method.graph.distinct_iou=1", "method.graph.min_score=0"],
    "graphkd, cosine edges": [GRAPHKD, "method.graph.lengths=cosine"],
    "graphkd, complete graph": [GRAPHKD, "method.graph.edges=complete"],
    "graphkd, mse nodes": [GRAPHKD, "method.weights.node_metric=mse"],
    "graphkd, pearson nodes": [GRAPHKD, "method.weights.node_metric=pearson"],
    "graphkd, no logits": [GRAPHKD, "method.weights.logits=0"],
    "graphkd, nodes alone": [
        GRAPHKD,
        "method.graph.edges=none",
        "method.graph.merge=false",
        "method.graph.categorizer=none",
    ],
    "graphkd, nodes alone, twice the weight": [
        GRAPHKD,
        "method.graph.edges=none",
        "method.graph.merge=false",
        "method.graph.categorizer=none",
        "method.weights.node=6",
    ],
    # Live, so that no second cache is needed; the losses are the same from a cache.
    "graphkd, descriptors": [GRAPHKD, LIVE, "teacher.store=descriptors"],
    "graphkd, text by numbers": [GRAPHKD, "method.weights.text_floor=0"],
    "graphkd, few nodes": [
        GRAPHKD,
        LIVE,
        "teacher.cache={out}/few-nodes",  # of its own statistics; they depend on the nodes
        *("teacher.nodes." + part for part in ("nms_iou=0.5", "min_score=0.1")),
    ],
    "graphkd, student's nodes": [GRAPHKD, "method.nodes=student", LIVE],
    "dsig, student's nodes": ["method.name=dsig", "method.nodes=student", LIVE],
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the study."""

    pages: str
    steps: int
    """Student steps of 4 pages."""
    variants: dict[str, list[str]]


TABLES = {
    "short": Table(pages="synthetic", steps=160, variants=METHODS | INHERITING | ABLATIONS),
    "long": Table(pages="synthetic", steps=640, variants=METHODS | INHERITING),
    "polish-gov": Table(pages="polish-gov", steps=100, variants=METHODS | INHERITING),
}
LAYOUT = {
    "synthetic": [],
    "polish-gov": ["data.view.canvas=[320, 224]", "detector.anchor_sizes=[16, 32, 64, 128, 256]"],
}
# One view of every page for all students, as in a cache of one view, so that no method sees more than others.
ONE_VIEW = {"synthetic": "data.view.shortest_edge=[192, 192]", "polish-gov": "data.view.shortest_edge=[224, 224]"}
TEACHERS = {
    "synthetic": ["schedule.steps=1000", "schedule.lr=2.0e-3"],
    "polish-gov": ["schedule.steps=250", "data.view.shortest_edge=[200, 224]"],
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student of the study."""

    table: str
    variant: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.table, self.variant, self.seed


def train(config_file: str, overrides: tuple[str, ...], threads: int) -> dict[str, Any]:
    """Train and score one run in this process."""
    import torch

    from pipeline.config import load_config
    from pipeline.context import RunContext
    from pipeline.runs.metrics import read_metrics
    from pipeline.train.run import evaluate_run, train_run

    torch.set_num_threads(threads)
    config = load_config(CONFIGS / config_file, overrides)
    train_run(RunContext(config))
    figures = evaluate_run(RunContext(config))
    last = read_metrics(config.folder)[-1]
    scores = {name: figures[name] for name in ("ap", "ap50", "ap75", "per_class")}
    return {**scores, "seconds": last["seconds"], "terms": last["terms"]}


def train_student(run: Run) -> dict[str, Any]:
    """Train and score one student on one thread; runs in a process of its own."""
    return {**asdict(run), **train("student-graphkd.yaml", run.overrides, threads=1)}


def make_synthetic(out: Path) -> Path:
    """640 training and 192 held-out synthetic pages."""
    from pipeline.data.prepare.pack import pack
    from pipeline.synth import write_pages

    data = out / "data"
    for split, count, seed in (("train", 640, 0), ("val", 192, 1)):
        if not (data / split / "dataset.json").exists():
            pages = out / "pages" / split
            write_pages(pages, count=count, seed=seed)
            pack(pages / "annotations.json", pages / "images", data / split, samples_per_shard=64)
    return data


def shared(out: Path, data: Path, pages: str, folder: Path, start: Path | None) -> list[str]:
    """Overrides of every run on these pages."""
    engine = ["engine.name=local", "run.checkpoint_every=100000", "run.log_every=50"]
    where = [f"data.train={data / 'train'}", f"data.val={data / 'val'}", f"run.folder={folder}"]
    init = [] if start is None else [f"run.init={start}"]
    return [*where, *engine, *LAYOUT[pages], *init]


def make_teacher(out: Path, data: Path, pages: str, jobs: int) -> dict[str, Any]:
    """Train the teacher of these pages and build its cache; real pages start from the synthetic teacher."""

    from pipeline.cache.build import build_cache, local_builders
    from pipeline.config import load_config
    from pipeline.context import RunContext

    folder = teacher_folder(out, pages)
    start = None if pages == "synthetic" else teacher_folder(out, "synthetic")
    overrides = (*shared(out, data, pages, folder, start), *TEACHERS[pages])
    figures = train("teacher.yaml", overrides, threads=jobs)
    student = [*shared(out, data, pages, out / "unused", None), ONE_VIEW[pages], f"teacher.run={folder}"]
    config = load_config(CONFIGS / "student-graphkd.yaml", student)
    context = RunContext(config)
    build_cache(context, local_builders(context))
    return figures


def teacher_folder(out: Path, pages: str) -> Path:
    return out / "runs" / pages / "teacher"


def planned(out: Path, data: Path, name: str, variants: dict[str, list[str]], seeds: list[int]) -> list[Run]:
    """Runs of a table, seed by seed; students on real pages start from one trained alone on synthetic pages."""
    table = TABLES[name]
    start = None if table.pages == "synthetic" else out / "runs" / "synthetic" / "short" / "none-0"
    teacher = f"teacher.run={teacher_folder(out, table.pages)}"
    runs = []
    for seed in seeds:
        for variant, changes in variants.items():
            folder = out / "runs" / table.pages / name / f"{re.sub('[^a-z0-9]+', '-', variant)}-{seed}"
            common = shared(out, data, table.pages, folder, start)
            own = [f"schedule.steps={table.steps}", f"run.seed={seed}", *(text.format(out=out) for text in changes)]
            overrides = (*common, ONE_VIEW[table.pages], teacher, *own)
            runs.append(Run(table=name, variant=variant, seed=seed, overrides=overrides))
    return runs


def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(runs: list[Run], results: Path, jobs: int) -> None:
    """Train the students missing from ``results``, ``jobs`` at a time."""
    done = {(row["table"], row["variant"], row["seed"]): tuple(row["overrides"]) for row in finished(results)}
    for run in runs:
        if done.get(run.key, run.overrides) != run.overrides:
            raise SystemExit(f"{results} holds {run.key} with other overrides; give another name or --out")
    missing = [run for run in runs if run.key not in done]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train_student, run) for run in missing]
        for number, future in enumerate(as_completed(futures), start=1):
            row = future.result()
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            where = f"{number}/{len(missing)} {row['table']}, {row['variant']}, seed {row['seed']}"
            print(f"{where}: AP {100 * row['ap']:.1f} in {row['seconds']:.0f} s", flush=True)


def main() -> None:
    """Run one table of the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", choices=list(TABLES), default="short")
    parser.add_argument("--data", type=Path, help="folder with packed train/ and val/ of real pages")
    parser.add_argument("--variants", nargs="+", help="by default those of the table")
    parser.add_argument("--try", nargs="+", default=[], dest="tried", metavar="NAME:key=value,key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="students at a time, one thread each")
    given = parser.parse_args()
    table = TABLES[given.table]
    variants = {name: table.variants[name] for name in given.variants or table.variants}
    for text in given.tried:
        name, _, changes = text.partition(":")
        variants[name] = changes.split(",")
    data = given.data or make_synthetic(given.out)
    teacher = make_teacher(given.out, data, table.pages, given.jobs)
    results = given.out / "results.jsonl"
    run_all(planned(given.out, data, given.table, variants, given.seeds), results, given.jobs)
    rows = [row for row in finished(results) if row["table"] == given.table and row["variant"] in variants]
    summary = summarise(rows, list(variants))
    print(f"{table.pages} pages, {table.steps} steps of 4 pages; teacher AP {100 * teacher['ap']:.1f}")
    print_table(summary)
    finish({"table": given.table, "teacher_ap": teacher["ap"], "variants": summary})


if __name__ == "__main__":
    main()
