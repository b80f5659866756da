"""A step cannot tell a cached teacher from a live one: equal losses on equal nodes, within a bound per precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphkd.batch import PageBatch
from pipeline.cache.quantize import Precision, dequantize, quantize
from pipeline.config import RunConfig
from pipeline.context import RunContext
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef
from pipeline.train.signal_source import signal_source
from pipeline.training_step import build_training_step
from tests.support.runs import StudentOf, build_here

pytestmark = [pytest.mark.method, pytest.mark.cache]

CPU = torch.device("cpu")
BATCH = 4  # pages at a time when the cache is built, and in the step that it is compared with


@pytest.fixture(scope="module")
def cached(student_of: StudentOf) -> Callable[[Precision], RunConfig]:
    """A student with a finished cache of that precision."""

    def make(precision: Precision) -> RunConfig:
        config = student_of(f"cache-{precision}", cache_dtype=precision)
        build_here(config)
        return config

    return make


def pages(config: RunConfig, samples: range) -> PageBatch:
    items = PageDataset(PackedDataset(config.data.train), config.data.view, config.run.seed, config.views)
    return collate([items[SampleRef(0, sample)] for sample in samples])


def losses(config: RunConfig, batch: PageBatch) -> dict[str, Tensor]:
    step = build_training_step(RunContext(config), CPU).train()
    terms = step(batch, signal_source(RunContext(config), CPU).signals(batch))
    return {name: values.detach() for name, values in terms.items()}


def live(config: RunConfig) -> RunConfig:
    """The same student with a live teacher and the same statistics."""
    assert config.teacher is not None
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"signals": "live"})})


@pytest.mark.parametrize("min_score", [0.0, 0.9])
def test_an_fp32_cache_gives_the_live_losses_bit_for_bit_at_equal_batch(
    student_of: StudentOf, min_score: float
) -> None:
    nodes = {"count": 12, "min_score": min_score}  # .9 leaves ground truth only, and padding behind it
    config = student_of(f"bits-{min_score}", cache_dtype="fp32", nodes=nodes)
    build_here(config)
    batch = pages(config, range(BATCH))
    ours, theirs = losses(config, batch), losses(live(config), batch)
    assert {"kd_node", "kd_edge", "kd_logits", "kd_boxes"} <= set(ours)
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


@pytest.mark.parametrize("samples", [range(2), range(3, 9)])
def test_an_fp32_cache_gives_the_live_losses_at_any_batch(
    cached: Callable[[Precision], RunConfig], samples: range
) -> None:
    config = cached("fp32")
    batch = pages(config, samples)
    ours, theirs = losses(config, batch), losses(live(config), batch)
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-3), ("int8", 3e-2)])
def test_rounded_caches_stay_within_their_bound(
    cached: Callable[[Precision], RunConfig], precision: Precision, bound: float
) -> None:
    """Each distillation term within 0.2% (fp16) and 3% (int8) of the live one, over all pages with regions."""
    config = cached(precision)
    batch = pages(config, range(8))
    ours, theirs = losses(config, batch), losses(live(config), batch)
    for name in ("kd_node", "kd_edge", "kd_logits", "kd_boxes"):
        assert float(ours[name].sum()) == pytest.approx(float(theirs[name].sum()), rel=bound), name


def test_int8_is_off_by_at_most_half_a_scale() -> None:
    pooled = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    pooled[:, 2] = 0
    stored, scales = quantize(pooled, "int8")
    assert stored.dtype == torch.int8 and scales.shape == (4,)
    torch.testing.assert_close(scales, pooled.abs().amax(dim=(0, 2, 3)) / 127)
    assert ((dequantize(stored, scales) - pooled).abs() <= scales[:, None, None] * 0.5001).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_page_without_nodes_can_be_stored(precision: Precision) -> None:
    stored, scales = quantize(torch.zeros(0, 4, 3, 3), precision)
    assert dequantize(stored, scales).shape == (0, 4, 3, 3)
