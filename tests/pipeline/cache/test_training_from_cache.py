"""Fifty steps of training from a cache are those with the live teacher on the same nodes, within a bound per form."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cache.format import NodeStore
from pipeline.cache.quantize import Precision
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.runs.metrics import read_metrics
from pipeline.train.run import train_run
from tests.support.runs import StudentOf, build_here

pytestmark = pytest.mark.cache

STEPS = 50
BOUNDS: dict[tuple[NodeStore, Precision], float] = {
    ("pooled", "fp32"): 1e-6,
    ("pooled", "fp16"): 5e-4,
    ("pooled", "int8"): 2e-3,
    ("descriptors", "fp32"): 1e-6,
    ("descriptors", "fp16"): 5e-4,
}
"""Maximum relative difference of the total loss in any step."""
QUICK = (("pooled", "fp32"),)


def sections(name: str, **run: Any) -> dict[str, Any]:
    schedule = {"steps": STEPS, "optimizer": "sgd", "lr": 0.001, "clip_norm": 1.0, "policy": "constant"}
    return {"schedule": schedule, "run": {"checkpoint_every": 100, "eval_batch": 2, **run}, "data": {"val": None}}


def losses(config: RunConfig) -> dict[str, list[float]]:
    lines = read_metrics(config.folder)
    assert len(lines) == STEPS
    return {name: [line["terms"][name] for line in lines] for name in lines[0]["terms"]} | {
        "loss": [line["loss"] for line in lines]
    }


@pytest.fixture(scope="module")
def trained(student_of: StudentOf, taught: Any) -> Any:
    """Losses of a run of that form, trained once."""
    done: dict[str, dict[str, list[float]]] = {}

    def train(store: NodeStore, precision: Precision, signals: str) -> dict[str, list[float]]:
        name = f"{signals}-{store}-{precision}"
        if name not in done:
            made = sections(name, folder=str(taught / name))
            cache = f"steps-{store}-{precision}"
            config = student_of(cache, made, store=store, cache_dtype=precision, signals=signals)
            build_here(config)
            train_run(RunContext(config))
            done[name] = losses(config)
        return done[name]

    return train


@pytest.mark.parametrize(
    ("store", "precision"),
    [form if form in QUICK else pytest.param(*form, marks=pytest.mark.slow) for form in BOUNDS],
)
def test_training_from_a_cache_is_training_with_the_live_teacher(
    store: NodeStore, precision: Precision, trained: Any
) -> None:
    cached, live = trained(store, precision, "cache"), trained(store, "fp32", "live")
    bound = BOUNDS[store, precision]
    for step in range(STEPS):
        assert cached["loss"][step] == pytest.approx(live["loss"][step], rel=bound), f"step {step}"
    assert live["loss"][-1] < live["loss"][0], "it learns"
    assert {"kd_node", "kd_edge", "kd_logits", "kd_boxes"} <= set(live)


def test_the_bound_would_show_another_teacher(trained: Any) -> None:
    """Two points a channel are another target: the losses differ by far more than any bound."""
    pooled, compressed = trained("pooled", "fp32", "live"), trained("descriptors", "fp32", "live")
    worst = max(abs(a - b) / b for a, b in zip(pooled["kd_node"], compressed["kd_node"], strict=True))
    assert worst > 0.05
