"""Text or not, by the words of a name; and a question where no word is known."""

from __future__ import annotations

import pytest

from pipeline.core.errors import DataError
from pipeline.data.prepare.coco import Category
from pipeline.data.prepare.text_classes import categories_with_text, is_text

DOCLAYNET = "Caption Footnote List-item Page-footer Page-header Section-header Text Title"
TEXT = f"{DOCLAYNET} text title list TextRegion 8_textline table_caption MainZone RunningTitleZone captions Headlines"
NON_TEXT = (
    "Formula Picture Table figure natural_image logo signature isolate_formula Tables MusicRegion LineDrawingRegion "
    "GraphicZone StampZone 4_illustration 5_stamp SeparatorRegion OtherRegion Background Signatures photographs"
)


@pytest.mark.parametrize("name", TEXT.split())
def test_text(name: str) -> None:
    assert is_text(name) is True


@pytest.mark.parametrize("name", NON_TEXT.split())
def test_not_text(name: str) -> None:
    assert is_text(name) is False


def categories(*names: str) -> list[Category]:
    return [Category(id=number, name=name) for number, name in enumerate(names)]


def test_unknown_names_are_asked_for() -> None:
    given = categories("title", "abandon", "figure", "文字")
    with pytest.raises(DataError, match=r"whether 'abandon', '文字' is text cannot be told.*--text 'title'"):
        categories_with_text(given, None)
    assert [each.text for each in categories_with_text(given, ["title", "文字"])] == [True, False, False, True]
    assert not any(each.text for each in categories_with_text(given, ["none"]))
