"""Synthetic pages: deterministic, annotated where the ink is, with every class often enough to learn it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import OutputError
from pipeline.data.prepare.coco import check_coco, load_coco
from pipeline.synth import CATEGORIES, TEXT_CATEGORIES, draw_page, write_pages
from pipeline.synth.defects import turned

pytestmark = pytest.mark.e2e


def test_a_page_is_a_pure_function_of_seed_and_index() -> None:
    first, regions = draw_page(3, 7)
    again, same = draw_page(3, 7)
    assert first.tobytes() == again.tobytes() and regions == same
    assert draw_page(3, 8)[0].tobytes() != first.tobytes()
    assert draw_page(4, 7)[0].tobytes() != first.tobytes()


@pytest.mark.parametrize("size", [(192, 256), (384, 512), (600, 800)])
def test_regions_lie_on_the_page_and_hold_ink(size: tuple[int, int]) -> None:
    for index in range(6):
        image, regions = draw_page(0, index, width=size[0], height=size[1])
        assert image.size == size and len(regions) >= 3
        grey = np.asarray(image.convert("L"), dtype=float)
        for region in regions:
            left, top, right, bottom = region.box
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            part = grey[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert part.min() < grey.max() - 20


def test_little_ink_is_left_outside_the_regions_of_clean_pages() -> None:
    outside = []
    for index in range(30):
        image, regions = draw_page(1, index)
        grey = np.asarray(image.convert("L"), dtype=float)
        if np.bincount(grey.astype(int).ravel()).argmax() < 250:
            continue  # a page with scan defects is grey all over
        ink = grey < 128
        covered = np.zeros_like(ink)
        for region in regions:
            left, top, right, bottom = (int(value) for value in region.box)
            covered[max(0, top - 1) : bottom + 2, max(0, left - 1) : right + 2] = True
        outside.append((ink & ~covered).sum() / ink.sum())
    assert len(outside) > 10
    assert np.mean(outside) < 0.02


def test_every_class_comes_often_and_pages_have_what_is_not_text() -> None:
    counts = Counter(CATEGORIES[region.category] for index in range(120) for region in draw_page(0, index)[1])
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 30
    assert sum(counts[name] for name in set(CATEGORIES) - TEXT_CATEGORIES) >= 120


def test_a_turned_page_turns_its_boxes() -> None:
    page = Image.new("RGB", (200, 200), "white")
    page.paste((0, 0, 0), (150, 90, 160, 110))
    image, boxes = turned(page, [(150.0, 90.0, 160.0, 110.0)], 5.0)
    rows, columns = np.nonzero(np.asarray(image.convert("L")) < 128)
    left, top, right, bottom = boxes[0]
    assert left - 1 <= columns.min() and columns.max() <= right + 1
    assert top - 1 <= rows.min() and rows.max() <= bottom + 1


def test_written_pages_are_coco_and_the_same_again(tmp_path: Path) -> None:
    path = write_pages(tmp_path / "a", count=3, seed=5)
    other = write_pages(tmp_path / "b", count=3, seed=5)
    assert path.read_bytes() == other.read_bytes()
    names = sorted(image.name for image in (tmp_path / "a" / "images").iterdir())
    for name in names:
        assert (tmp_path / "a" / "images" / name).read_bytes() == (tmp_path / "b" / "images" / name).read_bytes()
    assert len(check_coco(load_coco(path), path).pages) == 3
    assert [category["name"] for category in json.loads(path.read_text())["categories"]] == list(CATEGORIES)


def test_finished_pages_are_left_and_other_folders_refused(tmp_path: Path) -> None:
    path = write_pages(tmp_path / "pages", count=2, seed=5)
    stamp = path.stat().st_mtime_ns
    assert write_pages(tmp_path / "pages", count=2, seed=5).stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="holds other pages"):
        write_pages(tmp_path / "pages", count=2, seed=6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="already holds something"):
        write_pages(tmp_path / "other", count=2, seed=5)
