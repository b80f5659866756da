"""Running the pipeline from Python. The only module of this package that imports ``pipeline``, inside its functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
