from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.report.pages import MAX_HEIGHT, Regions, draw_page, in_a_row, matched
from pipeline.report.palette import class_colour

NAMES = [f"class {number}" for number in range(13)]


def regions(boxes: list[list[float]], classes: list[int], scores: list[float] | None = None) -> Regions:
    return Regions(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        None if scores is None else np.array(scores, dtype=np.float32),
    )


def pixels_of(image: Image.Image, number: int) -> int:
    return int((np.asarray(image) == ImageColor.getrgb(class_colour(number))).all(axis=-1).sum())


TRUTH = regions([[20, 30, 100, 60]], [4])
NOTHING = regions([], [], [])


@pytest.mark.parametrize("size", [(192, 256), (30, 900), (3000, 2000), (2480, 3508)])
@pytest.mark.parametrize("runs", [0, 1, 3])
def test_every_page_is_legible_and_of_bounded_size(size, runs):
    image = draw_page(Image.new("L", size, 255), TRUTH, [("run", NOTHING)] * runs, NAMES)
    across = in_a_row(1 + runs)
    assert image.mode == "RGB"
    assert image.width <= across * 580 + 20
    assert image.height <= -(-(1 + runs) // across) * (MAX_HEIGHT + 80)
    if size[0] >= 192:
        assert image.width >= across * 420


def test_each_class_is_drawn_in_its_colour_and_no_other():
    sheet = draw_page(Image.new("RGB", (400, 400), "white"), TRUTH, [], NAMES)
    assert pixels_of(sheet, 4) > 300
    assert pixels_of(sheet, 5) == 0


def test_weak_predictions_are_left_out():
    found = regions([[20, 30, 100, 60], [150, 200, 60, 60]], [6, 7], [0.9, 0.3])
    sheet = draw_page(Image.new("RGB", (400, 400), "white"), TRUTH, [("run", found)], NAMES)
    assert pixels_of(sheet, 6) and not pixels_of(sheet, 7)
    sheet = draw_page(Image.new("RGB", (400, 400), "white"), TRUTH, [("run", found)], NAMES, score_threshold=0.2)
    assert pixels_of(sheet, 7)


def test_a_wrong_region_has_a_dashed_line():
    page, empty = Image.new("RGB", (400, 400), "white"), regions([], [])
    right = draw_page(page, TRUTH, [("run", regions([[20, 30, 100, 60]], [4], [0.9]))], NAMES)
    wrong = draw_page(page, empty, [("run", regions([[20, 30, 100, 60]], [4], [0.9]))], NAMES)
    truth = draw_page(page, TRUTH, [("run", NOTHING)], NAMES)
    assert 0 < pixels_of(wrong, 4) < pixels_of(right, 4) - pixels_of(truth, 4)


def test_boxes_beyond_the_page_or_without_size_do_no_harm():
    found = regions([[-50, -50, 900, 900], [10, 10, 0, 0], [10, 10, -5, 3], [800, 800, 5, 5]], [0, 1, 2, 3], [0.9] * 4)
    assert draw_page(Image.new("RGB", (200, 200)), TRUTH, [("run", found)], NAMES).width > 800


def test_one_annotated_region_is_found_once_and_by_its_class_only():
    truth = regions([[0, 0, 10, 10], [20, 0, 10, 10]], [1, 2])
    found = regions(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 10, 10], [0, 0, 30, 30]], [1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6]
    )
    assert matched(found, truth).tolist() == [True, False, False, False]
    assert matched(found, regions([], [])).tolist() == [False] * 4
    assert matched(NOTHING, truth).tolist() == []


def test_rows():
    assert [in_a_row(count) for count in range(1, 8)] == [1, 2, 3, 2, 3, 3, 3]
