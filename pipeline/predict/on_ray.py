"""Prediction on Ray: Ray Data maps parts over actors that load the model once.

Parts go straight to the output folder, which all nodes must see. Ray restarts an actor that dies and repeats its part.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphkd.errors import ConfigError
from pipeline.core.ray_session import ray_session, set_ray_environment, to_user_error
from pipeline.core.ray_share import divide_cluster
from pipeline.predict.inputs import Document
from pipeline.predict.parts import Part, PredictSettings, predict_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class RayPrediction:
    """What an actor needs to predict parts."""

    model: Path
    """Run folder, checkpoint or bundle."""
    threshold: float
    thresholds: Mapping[str, float]
    """Of single classes."""
    device: str
    out: Path
    settings: PredictSettings


def predict_on_ray(work: RayPrediction) -> Callable[[Sequence[Part]], Iterator[tuple[int, int]]]:
    """Return what :func:`pipeline.predict.run.predict_documents` calls to predict on Ray.

    It uses the cluster that RAY_ADDRESS names, or a local one, with an actor for each GPU or share of CPUs.

    Raises:
        ConfigError: when called, if Ray is not installed.
    """
    return lambda parts: _predict(work, parts) if parts else iter(())


def _predict(work: RayPrediction, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    set_ray_environment()
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("Ray Data is not installed; pip install 'graphkd[ray]', or give --engine local") from error
    with ray_session(1):
        _silence(ray.data)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = divide_cluster(nodes, len(parts), device=work.device)
        rows = [{"part": json.dumps([{**asdict(each), "path": str(each.path)} for each in part])} for part in parts]
        predicted: Any = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Predictor,  # type: ignore[arg-type,unused-ignore]
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=share.actors),
            fn_constructor_args=(work, os.getcwd(), share.threads),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        try:
            for row in predicted.iter_rows():
                yield int(row["documents"]), int(row["pages"])
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise to_user_error(error, "prediction") from error


def _silence(data: Any) -> None:
    """Leave progress to the command."""
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Predictor:
    """In an actor."""

    def __init__(self, work: RayPrediction, directory: str, threads: int) -> None:
        import torch

        from pipeline.predict.model import open_model
        from pipeline.predict.predictor import Predictor

        os.chdir(directory)
        torch.set_num_threads(threads)
        self.work = work
        self.predictor = Predictor(open_model(work.model, work.device, threads), work.threshold, work.thresholds)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.int64]]:
        """Predict the parts of a batch."""
        parts = [[_document(each) for each in json.loads(part)] for part in batch["part"]]
        counts = list(predict_parts(self.predictor, parts, self.work.out, self.work.settings))
        return {
            "documents": np.array([count for count, _ in counts]),
            "pages": np.array([count for _, count in counts]),
        }


def _document(content: dict[str, Any]) -> Document:
    return Document(**{**content, "path": Path(content["path"])})
