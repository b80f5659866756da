"""Files of a run that the report shows."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import DataError
from pipeline.core.run_paths import CONFIG, EVALUATION, LATENCY, PREDICTIONS
from pipeline.runs.attempts import RunAttempt, read_attempts
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.metrics import read_metrics


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run. Files that do not exist yet leave their field empty."""

    label: str
    """Name in charts and tables."""
    folder: Path
    config: dict[str, Any]
    """Resolved config as plain values."""
    metrics: list[dict[str, Any]]
    """Logged steps."""
    evaluation: dict[str, Any] | None
    """Content of ``eval.json``: AP and AR as fractions, -1 if not defined."""
    evaluations: list[dict[str, Any]]
    """Evaluations during training by step."""
    attempts: list[RunAttempt]
    latency: list[dict[str, Any]]
    """Rows of ``graphkd bench`` for this run and its exports."""
    predictions: dict[int, list[dict[str, Any]]]
    """COCO results by image id: category_id of the dataset, bbox (x, y, width, height in image px), score."""

    @property
    def is_distilled(self) -> bool:
        """Whether it learned from a teacher."""
        return self.setting("method", "name") not in (None, "none")

    def setting(self, section: str, key: str) -> Any:
        """Value in the config, or None."""
        content = self.config.get(section)
        return content.get(key) if isinstance(content, dict) else None

    def points(self, key: str = "ap") -> float:
        """Figure of the evaluation as a percentage; NaN if it is missing or not defined."""
        return _percent((self.evaluation or {}).get(key))

    def class_points(self, name: str) -> float:
        """AP of a class as a percentage; NaN if it is not defined."""
        return _percent((self.evaluation or {}).get("per_class", {}).get(name))

    @property
    def trained_steps(self) -> int | None:
        """Step of the evaluated checkpoint, or the last one logged."""
        step = (self.evaluation or {}).get("step") or (self.metrics[-1]["step"] if self.metrics else None)
        return None if step is None else int(step)


def _percent(value: Any) -> float:
    return math.nan if value is None or value < 0 else 100 * float(value)


def class_names(runs: list[RunSummary]) -> list[str]:
    """Classes that any run was evaluated on, in the order of the evaluations."""
    return list(dict.fromkeys(name for run in runs for name in (run.evaluation or {}).get("per_class", {})))


def load_run(folder: Path, label: str | None = None) -> RunSummary:
    """Read a run folder; ``label`` is the folder's name by default.

    Raises:
        DataError: if the folder has no ``config.yaml``, or one of its files is malformed.
    """
    return RunSummary(
        label=folder.resolve().name if label is None else label,
        folder=folder,
        config=_read_config(folder),
        metrics=read_metrics(folder),
        evaluation=_read_json(folder / EVALUATION, dict),
        evaluations=read_evaluations(folder),
        attempts=read_attempts(folder),
        latency=(_read_json(folder / LATENCY, dict) or {}).get("rows", []),
        predictions=_read_predictions(folder / PREDICTIONS),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder} is no run: {CONFIG} is missing; give a folder that `graphkd train` made")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not readable YAML ({reason}); restore it or train again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} contains a {type(content).__name__}, but a config is a mapping; restore it")
    return content


def _read_json(path: Path, kind: type) -> Any:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); evaluate the run again") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} contains a {type(content).__name__}, not a {kind.__name__}; evaluate the run again")
    return content


def _read_predictions(path: Path) -> dict[int, list[dict[str, Any]]]:
    by_image: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, prediction in enumerate(_read_json(path, list) or []):
        try:
            complete = len(prediction["bbox"]) == 4 and {"category_id", "score"} <= prediction.keys()
            image_id = int(prediction["image_id"])
        except (KeyError, TypeError, ValueError, AttributeError):
            complete = False
        if not complete:
            raise DataError(
                f"{path}: entry {number} lacks image_id, category_id, bbox of 4 or score; evaluate the run again"
            )
        by_image[image_id].append(prediction)
    return dict(by_image)
