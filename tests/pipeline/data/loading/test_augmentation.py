"""Views of a page: a pure function, and boxes that stay on what they mark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import (
    NEW_VIEW_EVERY_EPOCH,
    Augmentation,
    AugmentationConfig,
    boxes_to_canvas,
    compute_transform,
    evaluation_augmentation,
    regions_on_canvas,
    render_page,
    training_augmentation,
)
from pipeline.data.loading.loader import PageDataset, collate
from pipeline.data.loading.order import SampleRef

PLAIN = AugmentationConfig(canvas=(128, 96), shortest_edge=(64, 96))
BUSY = AugmentationConfig(canvas=(128, 96), shortest_edge=(64, 96), flip=0.5, crop=0.6, noise=0.8)


def test_thin_regions_keep_one_px_of_the_canvas() -> None:
    page = compute_transform(7496, 10728, evaluation_augmentation(AugmentationConfig()), (1184, 832))
    boxes = np.array(
        [[300, 300, 3000, 800], [300, 1500, 3000, 5], [3600, 300, 5, 9000], [7494, 10725, 2, 3]], dtype=np.float32
    )
    corners, shown, widened = regions_on_canvas(boxes, page)
    sides = corners[:, 2:] - corners[:, :2]
    assert shown.all() and widened.tolist() == [False, True, True, True]
    assert (sides > 0.999).all() and np.allclose(sides[1:3].min(axis=1), 1, atol=1e-4)
    assert np.array_equal(corners[0], boxes_to_canvas(boxes, page)[0])
    assert corners.min() >= 0 and (corners[:, 2] <= page.width).all() and (corners[:, 3] <= page.height).all()
    middle = boxes_to_canvas(boxes, page)[1, [1, 3]].mean()
    assert abs(corners[1, [1, 3]].mean() - middle) < 1e-3


def test_a_crop_hides_thin_regions_and_slivers_of_others() -> None:
    crop = Augmentation(64, crop=(0.5, 0.0, 1.0, 1.0))
    placed = compute_transform(200, 260, crop, (128, 96))
    boxes = np.array([[10, 10, 1, 100], [150, 10, 1, 100], [40, 10, 60.5, 100], [40, 10, 70, 100]], dtype=np.float32)
    _, shown, widened = regions_on_canvas(boxes, placed)
    assert shown.tolist() == [False, True, False, True]
    assert widened.tolist() == [False, True, False, False]


def marked_page() -> tuple[Image.Image, np.ndarray]:
    """A white page of 200 x 260 px with a black rectangle, and its box as x, y, width, height."""
    pixels = np.full((260, 200, 3), 255, dtype=np.uint8)
    pixels[100:160, 70:130] = 0
    return Image.fromarray(pixels), np.array([[70, 100, 60, 60]], dtype=np.float32)


@pytest.mark.parametrize("v", range(12))
def test_boxes_stay_on_what_they_mark(v: int) -> None:
    image, boxes = marked_page()
    view = training_augmentation(
        AugmentationConfig(canvas=(128, 96), shortest_edge=(64, 96), flip=0.5, crop=0.6), 1, 5, v
    )
    placed = compute_transform(*image.size, view, PLAIN.canvas)
    left, top, right, bottom = boxes_to_canvas(boxes, placed)[0]
    page = render_page(image, view, PLAIN.canvas)[0, : placed.height, : placed.width]
    rows, columns = np.nonzero(page < 128)
    assert abs(columns.min() - left) <= 1.5 and abs(columns.max() + 1 - right) <= 1.5
    assert abs(rows.min() - top) <= 1.5 and abs(rows.max() + 1 - bottom) <= 1.5


@pytest.mark.parametrize("v", range(6))
def test_the_affine_map_takes_boxes_to_the_canvas(v: int) -> None:
    _, boxes = marked_page()
    placed = compute_transform(200, 260, training_augmentation(BUSY, 0, 3, v), BUSY.canvas)
    scale_x, scale_y, shift_x, shift_y = placed.affine
    across = sorted(value * scale_x + shift_x for value in (70, 130))
    down = [value * scale_y + shift_y for value in (100, 160)]
    expected = np.clip([across[0], down[0], across[1], down[1]], 0, [placed.width, placed.height] * 2)
    np.testing.assert_allclose(boxes_to_canvas(boxes, placed)[0], expected, atol=1e-3)


def test_a_view_is_a_pure_function_of_seed_sample_and_number(dataset_folder: Path) -> None:
    first, again = (PageDataset(PackedDataset(dataset_folder), BUSY, 1, NEW_VIEW_EVERY_EPOCH) for _ in range(2))
    refs = [SampleRef(epoch, sample) for epoch in (0, 1) for sample in (2, 5)]
    forward, backward = collate(first.__getitems__(refs)), collate(again.__getitems__(refs[::-1]))
    assert torch.equal(forward.images, backward.images.flip(0))
    assert torch.equal(forward.affine, backward.affine.flip(0))
    assert not torch.equal(forward.images[0], forward.images[2])  # another epoch
    assert (
        training_augmentation(BUSY, 0, 2, 1)
        != training_augmentation(BUSY, 1, 2, 1)
        != training_augmentation(BUSY, 1, 3, 1)
    )


def test_views_spread_over_their_ranges() -> None:
    views = [training_augmentation(BUSY, 0, sample, 0) for sample in range(400)]
    assert {view.shortest_edge for view in views} == set(range(64, 97))
    assert 0.4 < np.mean([view.flip for view in views]) < 0.6
    widths = [view.crop[2] - view.crop[0] for view in views]
    assert 0.6 <= min(widths) < 0.62 and 0.98 < max(widths) <= 1
    assert all(view.crop[0] >= 0 and view.crop[2] <= 1 for view in views)
    assert min(view.noise for view in views) >= 0 and 0.75 < max(view.noise for view in views) <= 0.8


def test_nothing_varies_unless_asked_for() -> None:
    plain = AugmentationConfig(canvas=(128, 96), shortest_edge=(96, 96))
    for sample in range(20):
        view = training_augmentation(plain, 0, sample, 0)
        assert (view.shortest_edge, view.flip, view.crop, view.noise) == (96, False, (0.0, 0.0, 1.0, 1.0), 0.0)


def test_noise_is_seen_and_bounded() -> None:
    image, _ = marked_page()
    clean = render_page(image, Augmentation(96), (128, 96)).astype(int)
    noisy = render_page(image, Augmentation(96, noise=1.0, noise_key=9), (128, 96)).astype(int)
    deviation = np.abs(noisy - clean)[:, :124, :95]
    assert 5 < deviation.mean() < 60
    assert noisy[:, 124 + 2 :, :].max() == 0  # the canvas beside the page stays black


def test_a_crop_keeps_the_size_that_regions_have() -> None:
    whole = compute_transform(200, 260, Augmentation(64), (128, 96))
    part = compute_transform(200, 260, Augmentation(64, crop=(0.2, 0.3, 0.9, 1.0)), (128, 96))
    assert part.scale == pytest.approx(whole.scale, rel=0.02)
    assert part.crop == (40, 78, 180, 260)


def test_landscape_pages_fit_the_canvas() -> None:
    placed = compute_transform(1024, 724, evaluation_augmentation(PLAIN), PLAIN.canvas)
    assert (placed.width, placed.height) == (96, 68)


@pytest.mark.parametrize("canvas", [(100, 96), (0, 96)])
def test_a_canvas_off_the_grid_is_refused(canvas: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        AugmentationConfig(canvas=canvas)
