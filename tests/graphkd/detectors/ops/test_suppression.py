"""Suppression of many lists at once keeps the boxes that torchvision keeps for each."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from graphkd.detectors.ops.suppression import _float32_below, suppress


def ranked(count: int, seed: int, rounded: bool, spread: float = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * spread
    found = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 60], dim=1)
    return found.round() if rounded else found


def kept_by_torchvision(boxes: torch.Tensor, valid: torch.Tensor, iou: float) -> torch.Tensor:
    rank = torch.arange(len(boxes), 0, -1).float()
    index = valid.nonzero()[:, 0]
    kept = torch.zeros_like(valid)
    kept[index[nms(boxes[index], rank[index], iou)]] = True
    return kept


@settings(deadline=None, max_examples=60)
@given(
    count=st.sampled_from([1, 2, 63, 128, 129, 300, 700]),
    seed=st.integers(0, 1000),
    iou=st.sampled_from([0.1, 0.5, 0.6, 0.7, 0.9, 1.0]),
    rounded=st.booleans(),  # equal overlaps, and overlaps that equal the threshold
    spread=st.sampled_from([0.0, 30.0, 400.0]),
)
def test_the_same_boxes_are_kept_as_by_torchvision(
    count: int, seed: int, iou: float, rounded: bool, spread: float
) -> None:
    boxes = torch.stack([ranked(count, seed + page, rounded, spread) for page in range(3)])
    valid = torch.rand(3, count, generator=torch.Generator().manual_seed(seed)) > 0.1
    found = suppress(boxes, valid, iou)
    for page in range(3):
        assert torch.equal(found[page], kept_by_torchvision(boxes[page], valid[page], iou))


def test_a_chain_as_long_as_a_list_is_followed_to_its_end() -> None:
    """Every box overlaps its neighbours only: every other one is kept, which takes one round for each."""
    left = torch.arange(1000.0) * 4
    boxes = torch.stack([left, left * 0, left + 20, left * 0 + 20], dim=1)[None]
    kept = suppress(boxes, torch.ones(1, 1000, dtype=torch.bool), 0.6)
    assert kept[0].tolist() == [place % 2 == 0 for place in range(1000)]


def test_a_threshold_is_compared_as_by_torchvision() -> None:
    for value in (0.1, 0.3, 0.5, 0.6, 0.7, 0.9):
        found = _float32_below(value)
        assert np.float32(found) == found <= value < float(np.nextafter(np.float32(found), np.float32(1)))


INTERPRETED = """
import torch
from graphkd.detectors.ops.suppression import _in_blocks
from graphkd.detectors.ops.suppression_kernel import launch

for count, rounded in ((1, False), (17, True), (130, False)):
    corner = torch.rand(3, count, 2) * 100
    boxes = torch.cat([corner, corner + torch.rand(3, count, 2) * 60], dim=2)
    boxes = boxes.round() if rounded else boxes
    valid = torch.rand(3, count) > 0.1
    assert torch.equal(launch(boxes, valid, 0.5), _in_blocks(boxes, valid, 0.5))
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from graphkd.detectors.ops.suppression_kernel import suppress_kernel

types = {"boxes": "*fp32", "kept": "*i8", "count": "i32", "iou": "fp32", "SIZE": "constexpr"}
source = triton.compiler.ASTSource(suppress_kernel, signature=types, constexprs={"SIZE": 2048})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
assert len(compiled.asm["ptx"]) > 1000
"""


@pytest.mark.parametrize(
    ("script", "interpreted"), [(INTERPRETED, "1"), (COMPILED, "0")], ids=["interpreted", "compiled"]
)
def test_the_kernel_for_gpus(script: str, interpreted: str) -> None:
    """It gives the same in Triton's interpreter, and compiles for an H100."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": interpreted}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)


@pytest.mark.gpu
def test_a_gpu_keeps_the_same_boxes() -> None:
    boxes = torch.stack([ranked(2000, seed, rounded=False, spread=400) for seed in range(8)])
    valid = torch.rand(8, 2000, generator=torch.Generator().manual_seed(5)) > 0.1
    found = suppress(boxes.cuda(), valid.cuda(), 0.7).cpu()
    assert (found == suppress(boxes, valid, 0.7)).float().mean() > 0.9999  # a GPU may round an overlap otherwise
