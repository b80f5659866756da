"""PAGE XML of both generations becomes COCO that the packer takes; anything malformed names its file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.data.prepare.pack import pack
from pipeline.data.prepare.page_xml import CLASSES, convert_page_folder

NAMESPACE_2019 = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"
NAMESPACE_2009 = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2009-03-16"
SQUARE = "10,20 60,20 60,50 10,50"


def region(name: str, points: str, inner: str = "") -> str:
    return f'<{name} id="r"><Coords points="{points}"/>{inner}</{name}>'


def old_region(name: str, points: str) -> str:
    inside = "".join(f'<Point x="{pair.split(",")[0]}" y="{pair.split(",")[1]}"/>' for pair in points.split())
    return f'<{name} id="r"><Coords>{inside}</Coords></{name}>'


def page_xml(regions: str, *, image: str = "page.png", size: str = "100", namespace: str = NAMESPACE_2019) -> str:
    page = f'<Page imageFilename="{image}" imageWidth="{size}" imageHeight="120">{regions}</Page>'
    return f'<?xml version="1.0" encoding="UTF-8"?><PcGts xmlns="{namespace}"><Metadata/>{page}</PcGts>'


PAGE_2009 = (
    f'<pcGts xmlns="{NAMESPACE_2009}"><page image_filename="page.png" image_width="100" image_height="120">'
    '<text_region id="r0"><coords><point x="10" y="10"/><point x="90" y="10"/><point x="90" y="50"/></coords>'
    '</text_region><separator_region id="r1"><coords><point x="80" y="60"/><point x="84" y="60"/>'
    '<point x="84" y="110"/></coords></separator_region></page></pcGts>'
)


class Folder:
    """A folder of XML files and one of images, and its conversion."""

    def __init__(self, root: Path) -> None:
        self.xml, self.images, self.out = root / "xml", root / "images", root / "out" / "coco.json"
        self.xml.mkdir()
        self.images.mkdir()

    def add(self, content: str | bytes, name: str = "page", image: str | None = "page.png") -> Folder:
        raw = content.encode() if isinstance(content, str) else content
        (self.xml / f"{name}.xml").write_bytes(raw)
        if image is not None:
            Image.new("RGB", (100, 120), "white").save(self.images / image)
        return self

    def convert(self) -> dict:
        return convert_page_folder(self.xml, self.images, self.out)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def boxes(content: dict) -> list[tuple[str, list[float]]]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    return [(names[region["category_id"]], region["bbox"]) for region in content["annotations"]]


@pytest.mark.parametrize(
    "content",
    [
        page_xml(region("TextRegion", SQUARE)),
        page_xml(old_region("TextRegion", SQUARE), namespace=NAMESPACE_2009),
        page_xml(region("TextRegion", SQUARE), namespace="urn:any-other-year"),
    ],
    ids=["points", "point-elements", "other-namespace"],
)
def test_both_forms_of_polygon_give_the_enclosing_box(folder: Folder, content: str) -> None:
    assert boxes(folder.add(content).convert()) == [("TextRegion", [10, 20, 50, 30])]


def test_box_encloses_a_polygon_that_starts_anywhere(folder: Folder) -> None:
    content = page_xml(region("TextRegion", "30,90 5,40.5 70,10"))
    assert boxes(folder.add(content).convert()) == [("TextRegion", [5, 10, 65, 80])]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, name) for name in CLASSES[:5]),
        ("GraphicRegion", "ImageRegion"),
        ("ChartRegion", "ImageRegion"),
        *(
            (f"{kind}Region", "OtherRegion")
            for kind in ("LineDrawing", "Noise", "Frame", "Advert", "Chem", "Music", "Map", "Custom", "Unknown")
        ),
    ],
)
def test_kinds_of_region_map_to_the_published_six(folder: Folder, name: str, expected: str) -> None:
    assert boxes(folder.add(page_xml(region(name, SQUARE))).convert())[0][0] == expected


def test_categories_are_the_six_with_ids_from_one(folder: Folder) -> None:
    categories = folder.add(page_xml(region("TextRegion", SQUARE))).convert()["categories"]
    assert [(category["id"], category["name"]) for category in categories] == list(enumerate(CLASSES, start=1))


def test_nested_regions_count_and_lines_do_not(folder: Folder) -> None:
    line = f'<TextLine><Coords points="{SQUARE}"/></TextLine>'
    cell = region("TextRegion", "20,20 30,20 30,30 20,30", line)
    order = '<ReadingOrder><RegionRefIndexed regionRef="r" index="0"/></ReadingOrder>'
    content = page_xml(order + region("TableRegion", SQUARE, cell))
    assert [name for name, _ in boxes(folder.add(content).convert())] == ["TableRegion", "TextRegion"]


def test_regions_without_a_polygon_are_skipped_and_logged(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    empty = '<NoiseRegion id="n"><Coords/></NoiseRegion>'
    content = page_xml(empty + region("TextRegion", "1,1 5,5") + region("TextRegion", SQUARE))
    with caplog.at_level(logging.WARNING):
        assert len(folder.add(content).convert()["annotations"]) == 1
    assert "skipped 2 regions" in caplog.text and "page.xml" in caplog.text


def test_ids_follow_sorted_names_and_the_file_is_reproducible(folder: Folder) -> None:
    for name in ("b", "a", "c"):
        folder.add(page_xml(region("TextRegion", SQUARE) * 2, image=f"{name}.png"), name, f"{name}.png")
    content = folder.convert()
    first = folder.out.read_bytes()
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (1, "a.png"),
        (2, "b.png"),
        (3, "c.png"),
    ]
    assert [region["id"] for region in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert json.loads(first) == content and folder.convert() == content and folder.out.read_bytes() == first


@pytest.mark.parametrize(
    ("named", "xml_name", "image"),
    [
        ("C:\\scans\\page.png", "page", "page.png"),
        ("../../elsewhere/page.png", "page", "page.png"),
        ("gone.tif", "00001", "00001.jpg"),
        ("gone.tif", "pc-00001", "00001.tif"),
        ("PAGE.TIF", "x", "page.tif"),
    ],
)
def test_image_is_found_by_name_or_stem(folder: Folder, named: str, xml_name: str, image: str) -> None:
    folder.add(page_xml(region("TextRegion", SQUARE), image=named), xml_name, image)
    assert folder.convert()["images"] == [{"id": 1, "file_name": image, "width": 100, "height": 120}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<PcGts><Page", "cannot be read"),
        ("", "cannot be read"),
        ('<?xml version="1.0" encoding="no-such"?><PcGts/>', "cannot be read"),
        ("<PcGts><Metadata/></PcGts>", "no Page element"),
        (page_xml("", size="0"), "imageWidth '0'"),
        (page_xml("", size="wide"), "imageWidth 'wide'"),
        (page_xml("", size="9" * 5000), "imageWidth '999"),
        (page_xml(region("TextRegion", "1,2 3,4 5")), "not two numbers"),
        (page_xml(region("TextRegion", "1,2 3,four 5,6")), "not two numbers"),
        (page_xml(region("TextRegion", "1,2 3,nan 5,6")), "not finite"),
        (page_xml('<TextRegion><Coords><Point x="1"/></Coords></TextRegion>'), "not two numbers"),
    ],
)
def test_malformed_files_are_named_and_nothing_is_written(folder: Folder, content: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        folder.add(content).convert()
    assert "page.xml" in str(caught.value) and "\n" not in str(caught.value)
    assert not folder.out.exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_in_any_encoding(folder: Folder, encoding: str) -> None:
    bomb = '<!DOCTYPE z [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    content = page_xml("<TextRegion>&b;</TextRegion>").replace("UTF-8", encoding).replace("?><PcGts", f"?>{bomb}<PcGts")
    with pytest.raises(DataError, match="document type 'z'"):
        folder.add(content.encode(encoding)).convert()


def test_external_document_types_are_refused(folder: Folder) -> None:
    content = page_xml("").replace("?><PcGts", '?><!DOCTYPE PcGts SYSTEM "file:///etc/passwd"><PcGts')
    with pytest.raises(DataError, match="document type"):
        folder.add(content).convert()


def test_missing_image_and_empty_or_absent_folders_are_errors(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.xml file"):
        folder.convert()
    with pytest.raises(DataError, match=r"page\.xml: its image 'page\.png' is not in"):
        folder.add(page_xml(region("TextRegion", SQUARE)), image=None).convert()
    with pytest.raises(DataError, match="cannot be read"):
        convert_page_folder(tmp_path / "absent", folder.images, folder.out)


def test_what_is_converted_can_be_packed(folder: Folder, tmp_path: Path) -> None:
    folder.add(page_xml(region("TextRegion", SQUARE) + region("TableRegion", SQUARE)), "a", "a.tif").convert()
    dataset = pack(folder.out, folder.images, tmp_path / "packed")
    assert [category.name for category in dataset.categories if category.text] == ["TextRegion"]
    assert [shard.samples for shard in dataset.shards] == [1]


def test_the_names_of_2009_are_read(folder: Folder) -> None:
    found = boxes(folder.add(PAGE_2009).convert())
    assert found == [("TextRegion", [10, 10, 80, 40]), ("SeparatorRegion", [80, 60, 4, 50])]


def test_alto_is_named(folder: Folder) -> None:
    alto = '<alto xmlns="http://www.loc.gov/standards/alto/ns-v4#"><Layout><Page WIDTH="1" HEIGHT="1"/></Layout></alto>'
    with pytest.raises(DataError, match=r"page\.xml is ALTO, not PAGE XML"):
        folder.add(alto).convert()


def test_regions_without_coordinates_are_skipped_and_counted(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = folder.add(page_xml('<TextRegion id="r"/>' + region("TextRegion", SQUARE))).convert()
    assert len(found["annotations"]) == 1
    assert "skipped 1 regions without coordinates" in caplog.text
