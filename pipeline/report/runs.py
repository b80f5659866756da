"""What a run left on disk, as the report needs it."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import DataError
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.start_history import RunStart, read_start_history

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "eval.json"
PREDICTIONS_FILE = "predictions.json"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run; parts that it has not written yet are empty."""

    label: str
    """Name in charts and tables."""
    folder: Path
    config: dict[str, Any]
    """The resolved config as plain values."""
    metrics: list[dict[str, Any]]
    """Logged steps in rising order, one entry a step."""
    evaluation: dict[str, Any] | None
    """Content of ``eval.json``: AP and AR as fractions, -1 where not defined."""
    evaluations: list[dict[str, Any]]
    """Evaluations during training by step."""
    starts: list[RunStart]
    """When it was started and how each start ended."""
    predictions: dict[int, list[dict[str, Any]]]
    """COCO results by image id: category_id (the dataset's), bbox (x, y, width, height in image px), score."""

    @property
    def has_predictions(self) -> bool:
        """Whether the run was evaluated, though it may have found nothing."""
        return self.evaluation is not None or bool(self.predictions)

    @property
    def distilled(self) -> bool:
        """Whether it learned from a teacher."""
        method = self.config.get("method")
        return isinstance(method, dict) and method.get("name", "none") != "none"


def load_run(folder: Path, label: str | None = None) -> RunSummary:
    """Read a run folder; ``label`` is the folder's name by default.

    Raises DataError where the folder is no run (it lacks ``config.yaml``) or one of its files is malformed.
    """
    config = _read_config(folder)
    evaluation = _read_json(folder / EVALUATION_FILE, dict)
    predictions = _read_json(folder / PREDICTIONS_FILE, list)
    return RunSummary(
        label=label if label is not None else folder.resolve().name,
        folder=folder,
        config=config,
        metrics=_read_metrics(folder / METRICS_FILE),
        evaluation=evaluation,
        evaluations=read_evaluations(folder),
        starts=read_start_history(folder),
        predictions=_by_image(predictions or [], folder / PREDICTIONS_FILE),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{folder} is no run: {CONFIG_FILE} is missing; give a folder that `graphkd train` made"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not readable YAML ({reason}); restore it or train again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, but a config is a mapping; restore it")
    return content


def _read_json(path: Path, kind: type) -> Any:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} is not readable JSON ({error}); evaluate the run again") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}; evaluate the run again")
    return content


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Later lines replace earlier ones of the same step; lines that a kill cut off are skipped."""
    steps: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return []
    for number, line in enumerate(path.read_text(encoding="utf8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            steps[int(entry["step"])] = entry
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            logger.warning("line %d of %s is not a whole entry and was skipped", number, path)
    return [steps[step] for step in sorted(steps)]


def _by_image(predictions: list[Any], path: Path) -> dict[int, list[dict[str, Any]]]:
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, prediction in enumerate(predictions):
        try:
            complete = len(prediction["bbox"]) == 4 and {"category_id", "score"} <= prediction.keys()
            image_id = int(prediction["image_id"])
        except (KeyError, TypeError, ValueError, AttributeError):
            complete = False
        if not complete:
            raise DataError(
                f"{path}: entry {number} lacks image_id, category_id, bbox of 4 or score; evaluate the run again"
            )
        grouped[image_id].append(prediction)
    return dict(grouped)
