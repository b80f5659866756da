"""COCO files as exporters write them: read if there is one meaning, refused with a remedy if not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import DataError
from pipeline.data.prepare.box_conventions import BoxOptions
from pipeline.data.prepare.coco import CheckedCoco, check_coco, load_coco

BOXES = [[20, 20, 150, 40], [20, 80, 150, 60], [20, 160, 100, 60]]
NAMES = ("text", "table", "figure")


def content(boxes: list[list[float]] | None = None, **region: Any) -> dict[str, Any]:
    found = boxes or BOXES
    return {
        "images": [{"id": 1, "file_name": "p0.png", "width": 192, "height": 256}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": number, "bbox": box, "iscrowd": 0, **region}
            for number, box in enumerate(found, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)],
    }


def checked(folder: Path, coco: dict[str, Any], options: BoxOptions | None = None, **kwargs: Any) -> CheckedCoco:
    path = folder / "a.json"
    path.write_text(json.dumps(coco))
    return check_coco(load_coco(path), path, options, **kwargs)


def boxes_of(found: CheckedCoco) -> list[list[float]]:
    return [[round(value, 6) for value in region.bbox] for page in found.pages for region in page.annotations]


def test_shares_of_the_page_are_refused_and_converted(tmp_path: Path) -> None:
    shares = [[x / 192, y / 256, w / 192, h / 256] for x, y, w, h in BOXES]
    with pytest.raises(DataError, match=r"all 3 boxes lie within one px.*--boxes relative"):
        checked(tmp_path, content(shares))
    with pytest.raises(DataError, match="--boxes relative"):
        checked(tmp_path, content(shares), repair=True)
    assert boxes_of(checked(tmp_path, content(shares), BoxOptions("relative"))) == BOXES


def test_corners_are_refused_and_converted(tmp_path: Path) -> None:
    corners = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    for repair in (False, True):
        with pytest.raises(DataError, match=r"1 of 3 boxes leave their page.*--boxes xyxy"):
            checked(tmp_path, content(corners), repair=repair)
    assert boxes_of(checked(tmp_path, content(corners), BoxOptions("xyxy"))) == BOXES


def test_rotated_boxes_are_refused_and_enclosed(tmp_path: Path) -> None:
    rotated = content([BOXES[0]], attributes={"occluded": False, "rotation": 90.0})
    with pytest.raises(DataError, match=r"1 of 1 boxes are rotated.*annotation 1 by 90 degrees; give --rotated"):
        checked(tmp_path, rotated)
    assert boxes_of(checked(tmp_path, rotated, BoxOptions(rotated=True))) == [[75, 0, 40, 115]]
    assert boxes_of(checked(tmp_path, content(attributes={"rotation": 0.0}))) == BOXES
    assert boxes_of(checked(tmp_path, content(attributes=["rotation"]))) == BOXES


def test_files_of_crowds_only_are_refused_and_converted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 3 regions have iscrowd 1.*--crowd-as-regions"):
        checked(tmp_path, content(iscrowd=1))
    found = checked(tmp_path, content(iscrowd=1), BoxOptions(crowd_as_regions=True))
    assert [region.iscrowd for region in found.pages[0].annotations] == [0, 0, 0]
    one = content()
    one["annotations"][0]["iscrowd"] = 1
    assert [region.iscrowd for region in checked(tmp_path, one).pages[0].annotations] == [1, 0, 0]


def test_repairs_are_counted_by_kind_and_limited(tmp_path: Path) -> None:
    slips = content([*BOXES] * 3)
    for region in slips["annotations"]:
        region["category_id"] = 1
    slips["annotations"][0]["bbox"] = [180, 20, 40, 40]
    slips["annotations"][1]["bbox"] = [20, 20, 0, 40]
    with pytest.raises(DataError, match=r"is off its page.*has no area.*or give --repair"):
        checked(tmp_path, slips)
    assert checked(tmp_path, slips, repair=True).repairs == {"clipped": 1, "dropped": 1}
    for region in slips["annotations"]:
        region["bbox"] = [180, 20, 40, 40]
    slips["annotations"][0]["bbox"] = [150, 200, 40, 100]  # no corners
    with pytest.raises(DataError, match="--repair would change 9 of 9 regions"):
        checked(tmp_path, slips, BoxOptions("xywh"), repair=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coco: coco["images"][0].update(id=2**70), "less than 9223372036854775808"),
        (lambda coco: coco["categories"][0].update(id=-(2**70)), "greater than or equal to -9223372036854775808"),
        (lambda coco: coco.update(categories=[]), "the first at categories"),
        (lambda coco: coco["categories"][0].update(name="\ud800"), "the first at categories.0.name"),
        (lambda coco: coco["annotations"][0].update(area=float("nan")), "the first at annotations.0.area"),
        (lambda coco: coco["categories"][1].update(id=1), "category id 1 is used 2 times"),
        (lambda coco: coco["annotations"][0].update(category_id=7), "category id 7, which does not exist"),
    ],
)
def test_what_has_no_meaning_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    coco = content()
    change(coco)
    with pytest.raises(DataError, match=message) as caught:
        checked(tmp_path, coco)
    assert "\n" not in str(caught.value)
    assert ("--repair" in str(caught.value)) is False


@pytest.mark.parametrize("text", ["[1, 2]", "7", '"text"', "{", "[" * 100_000, "1" * 5000, "\x00"])
def test_what_is_no_coco_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match="COCO") as caught:
        load_coco(path)
    assert "\n" not in str(caught.value)


def test_what_exporters_write_is_read(tmp_path: Path) -> None:
    coco = content(iscrowd=None)
    for category in coco["categories"]:
        category["supercategory"] = None
    coco["categories"] *= 4  # VIA writes each category once an image
    for region in coco["annotations"]:
        region["image_id"] = "1"
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(coco), encoding="utf8")
    found = load_coco(path)
    assert [category.name for category in found.categories] == list(NAMES)
    assert boxes_of(check_coco(found, path)) == BOXES


def test_a_page_of_20_000_boxes_is_refused(tmp_path: Path) -> None:
    coco = content()
    coco["annotations"] = [{**coco["annotations"][0], "id": number} for number in range(20_000)]
    with pytest.raises(DataError, match="image id 1 has 20000 regions, more than 10000"):
        checked(tmp_path, coco)
