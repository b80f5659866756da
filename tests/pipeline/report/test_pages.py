from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.report.pages import Regions, class_colour, columns_of, draw_page, matched

NAMES = [f"class {number}" for number in range(13)]


def regions(boxes: list[list[float]], classes: list[int], scores: list[float] | None = None) -> Regions:
    return Regions(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        None if scores is None else np.array(scores, dtype=np.float32),
    )


def drawn(*arguments: Any, **named: Any) -> Image.Image:
    return Image.open(io.BytesIO(draw_page(*arguments, **named))).convert("RGB")


def pixels_of(image: Image.Image, number: int) -> int:
    return int((np.asarray(image) == ImageColor.getrgb(class_colour(number))).all(axis=-1).sum())


TRUTH = regions([[20, 30, 100, 60]], [4])
NOTHING = regions([], [], [])


@pytest.mark.e2e
@pytest.mark.parametrize("size", [(192, 256), (30, 900), (3000, 2000), (2480, 3508)])
@pytest.mark.parametrize("runs", [0, 1, 3])
def test_every_page_is_legible_and_of_bounded_size(size, runs):
    image = drawn(Image.new("L", size, 255), TRUTH, [("run", NOTHING)] * runs, NAMES)
    columns = columns_of(1 + runs)
    assert columns * 420 <= image.width <= columns * 580
    assert image.height <= -(-(1 + runs) // columns) * 1500


def test_each_class_is_drawn_in_its_colour_and_no_other():
    sheet = drawn(Image.new("RGB", (400, 400), "white"), TRUTH, [], NAMES)
    assert pixels_of(sheet, 4) > 300
    assert pixels_of(sheet, 5) == 0


def test_weak_predictions_are_left_out():
    found = regions([[20, 30, 100, 60], [150, 200, 60, 60]], [6, 7], [0.9, 0.3])
    sheet = drawn(Image.new("RGB", (400, 400), "white"), TRUTH, [("run", found)], NAMES)
    assert pixels_of(sheet, 6) and not pixels_of(sheet, 7)
    sheet = drawn(Image.new("RGB", (400, 400), "white"), TRUTH, [("run", found)], NAMES, score_threshold=0.2)
    assert pixels_of(sheet, 7)


def test_a_wrong_region_has_a_dashed_line():
    page, empty = Image.new("RGB", (400, 400), "white"), regions([], [])
    right = drawn(page, TRUTH, [("run", regions([[20, 30, 100, 60]], [4], [0.9]))], NAMES)
    wrong = drawn(page, empty, [("run", regions([[20, 30, 100, 60]], [4], [0.9]))], NAMES)
    truth = drawn(page, TRUTH, [("run", NOTHING)], NAMES)
    assert 0 < pixels_of(wrong, 4) < pixels_of(right, 4) - pixels_of(truth, 4)


def test_boxes_beyond_the_page_or_without_size_do_no_harm():
    found = regions([[-50, -50, 900, 900], [10, 10, 0, 0], [10, 10, -5, 3], [800, 800, 5, 5]], [0, 1, 2, 3], [0.9] * 4)
    assert drawn(Image.new("RGB", (200, 200)), TRUTH, [("run", found)], NAMES).width > 800


def test_one_annotated_region_is_found_once_and_by_its_class_only():
    truth = regions([[0, 0, 10, 10], [20, 0, 10, 10]], [1, 2])
    found = regions(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 10, 10], [0, 0, 30, 30]], [1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6]
    )
    assert matched(found, truth).tolist() == [True, False, False, False]
    assert matched(found, regions([], [])).tolist() == [False] * 4
    assert matched(NOTHING, truth).tolist() == []


def test_rows():
    assert [columns_of(count) for count in range(1, 8)] == [1, 2, 3, 2, 3, 3, 3]
