"""Pages per second of the loader, webdataset, mosaicml-streaming, litdata and a bare loop, in interleaved rounds.

    python -m benchmarks.streaming --out runs/streaming
    python -m benchmarks.streaming --out runs/streaming --mosaicml PYTHON --litdata PYTHON

The last two are interpreters of environments in which that library is installed beside torch, Pillow and pydantic:

    python3 -m venv /tmp/mosaicml && /tmp/mosaicml/bin/pip install mosaicml-streaming pillow pydantic

Every measurement is a process of its own that reads one epoch from the page cache. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from PIL import Image

from benchmarks.common import finish, ratio, run_command

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 800, 1100
WORKERS = (1, 2)


def make_pages(out: Path, count: int) -> None:
    """Draw ``count`` pages of 800 x 1100 px as JPEG and pack them in shards of 64."""
    from pipeline.data.prepare.pack import pack
    from pipeline.synth import write_pages

    if (out / "packed" / "dataset.json").exists():
        return
    pages = out / "pages"
    annotations = write_pages(pages, count=count, seed=0, width=WIDTH, height=HEIGHT)
    content = json.loads(annotations.read_text())
    for image in content["images"]:
        path = pages / "images" / image["file_name"]
        image["file_name"] = path.with_suffix(".jpg").name
        if path.suffix != ".jpg":
            Image.open(path).convert("RGB").save(path.with_suffix(".jpg"), quality=90)
            path.unlink()
    annotations.write_text(json.dumps(content))
    pack(annotations, pages / "images", out / "packed", samples_per_shard=64)


def reader(python: str, *arguments: str) -> str:
    """Run ``benchmarks.readers`` under an interpreter and give the last line it prints."""
    command = [python, "-W", "ignore", "-m", "benchmarks.readers", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return (run_command(command, cwd=ROOT, env=environment).strip().splitlines() or [""])[-1]


def measure(out: Path, pythons: dict[str, str], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Pages a second of every reader at every number of workers, one per round."""
    rates: dict[tuple[str, int], list[float]] = {(name, count): [] for count in WORKERS for name in pythons}
    for turn in range(rounds):
        for (name, count), own in rates.items():
            line = json.loads(reader(pythons[name], name, str(out.resolve()), "--workers", str(count)))
            own.append(line["pages_per_s"])
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return rates


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mosaicml", help="interpreter that has mosaicml-streaming")
    parser.add_argument("--litdata", help="interpreter that has litdata")
    given = parser.parse_args()
    make_pages(given.out, given.pages)
    pythons = {"ours": sys.executable, "limit": sys.executable, "webdataset": sys.executable}
    for name, folder in (("mosaicml", "mds"), ("litdata", "litdata")):
        python = getattr(given, name)
        if python:
            pythons[name] = python
            if not (given.out / folder).exists():
                reader(python, f"write-{name}", str(given.out.resolve()))
    rates = measure(given.out, pythons, given.rounds)
    print("| workers | reader | pages/s (median) | ours over it: median (smallest to largest) |\n|---|---|---|---|")
    result = []
    for (name, count), own in rates.items():
        over = ratio(rates["ours", count], own)
        print(f"| {count} | {name} | {statistics.median(own):.1f} | ", end="")
        print("|" if name == "ours" else f"{over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f}) |")
        result.append({"reader": name, "workers": count, "pages_per_s": own, "ours_over_it": over})
    finish({"rounds": given.rounds, "readers": result})


if __name__ == "__main__":
    main()
