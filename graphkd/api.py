"""Running the pipeline from Python. The only module of this package that imports ``pipeline``, inside its functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.predict.predictor import Predictor


def train(config: str | Path, *overrides: str) -> Path:
    """Train a config to its end, or resume it, and return its run folder.

    Args:
        config: YAML file.
        overrides: such as ``"schedule.steps=1000"``.

    Raises:
        UserError: if something is wrong that the user can correct, as one line.
    """
    from pipeline.config import load_config
    from pipeline.context import RunContext
    from pipeline.train.run import train_run

    context = RunContext(load_config(Path(config), overrides))
    train_run(context)
    return context.config.folder


def evaluate(config: str | Path, *overrides: str) -> dict[str, Any]:
    """Evaluate a trained run on ``data.val`` and return COCO metrics as fractions, such as ``ap`` and ``per_class``.

    Arguments as :func:`train`.

    Raises:
        UserError: if there is no checkpoint or no ``data.val``.
    """
    from pipeline.config import load_config
    from pipeline.context import RunContext
    from pipeline.train.run import evaluate_run

    context = RunContext(load_config(Path(config), overrides))
    return evaluate_run(context)


def load(
    model: str | Path,
    threshold: float = 0.3,
    thresholds: Mapping[str, float] | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Predictor:
    """Open a run, a checkpoint or an exported bundle for prediction. A bundle needs neither torch nor Ray.

        model = graphkd.load("BUNDLE")
        for page in model.predict("file.pdf", "scans/", image):
            page.boxes, page.labels, page.scores
            page.draw("page.png")

    Args:
        model: folder.
        threshold: score below which regions are dropped, 0 to 1.
        thresholds: of single classes by name.
        device: auto, cpu or cuda; bundles run on the CPU.
        threads: of a bundle; None for all cores.

    Raises:
        UserError: if the folder is none of these, or damaged.
    """
    from pipeline.predict.model import open_model
    from pipeline.predict.predictor import Predictor

    return Predictor(open_model(model, device, threads), threshold, thresholds)
