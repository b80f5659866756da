"""Converting PAGE XML, PRImA's layout format (Pletschacher and Antonacopoulos, ICPR 2010), to COCO."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, TreeBuilder, XMLParser

from pipeline.core.errors import DataError
from pipeline.core.files import check_regular, write_json

logger = logging.getLogger(__name__)

CLASSES = ("TextRegion", "ImageRegion", "TableRegion", "MathsRegion", "SeparatorRegion", "OtherRegion")
CATEGORY_IDS = {name: number for number, name in enumerate(CLASSES, start=1)}
# The published results count charts and graphics as images (Layout-Parser's conversion of the dataset).
CLASS_OF = {name.lower(): name for name in CLASSES} | {"chartregion": "ImageRegion", "graphicregion": "ImageRegion"}
IMAGE_SUFFIXES = (".tif", ".tiff", ".jpg", ".png")
MIN_POINTS = 3  # minimum of a polygon with an area, as in the schema


def convert_page_folder(xml_folder: Path, image_folder: Path, out: Path) -> dict[str, Any]:
    """Convert every ``.xml`` file of ``xml_folder`` to one COCO file at ``out``, and return its content.

    The six classes are those of the published PRImA results, with ids 1 to 6 in the order of ``CLASSES``: charts and
    graphics are images, all remaining kinds are OtherRegion. Nested regions are regions too. Boxes [x, y, width,
    height] enclose the polygons, image px. Ids follow the sorted names of the XML files. Regions without coordinates or
    with fewer than three points are skipped, and their number is logged.

    Args:
        xml_folder: PAGE XML files of any version, 2009 to 2024.
        image_folder: their images, found by ``imageFilename``, or by the XML file's stem with or without ``pc-``,
            ignoring case.
        out: COCO file, replaced atomically.

    Raises:
        DataError: if the folder has no XML files, or one is malformed, declares a document type (which may define
            entities), or lacks its image.
        OutputError: if ``out`` cannot be written.
    """
    found = _files(image_folder)
    paths = [xml_folder / name for _, name in sorted(_files(xml_folder).items()) if name.lower().endswith(".xml")]
    if not paths:
        raise DataError(f"{xml_folder} holds no .xml file; give the folder of the PAGE XML files")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, path in enumerate(paths, start=1):
        page = _page(path)
        images.append({"id": image_id, "file_name": _image_name(page, path, found, image_folder), **_size(page, path)})
        for category_id, box in _regions(page, path):
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name, "supercategory": "layout"} for name, number in CATEGORY_IDS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(out, content)
    return content


def _files(folder: Path) -> dict[str, str]:
    """File names in ``folder`` by their lower-case form."""
    try:
        return {path.name.lower(): path.name for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror}); give a folder that exists") from error


class _NoDoctype(TreeBuilder):
    """Tree builder that refuses document types: PAGE has none, and entities can expand without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"it declares a document type {name!r}, which PAGE XML never does")


def _page(path: Path) -> Element:
    try:
        check_regular(path)
        root = ElementTree.parse(path, XMLParser(target=_NoDoctype())).getroot()
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise DataError(f"{path} cannot be read as PAGE XML ({error}); replace or remove it") from error
    if _local_name(root) == "alto":
        raise DataError(f"{path} is ALTO, not PAGE XML; convert it to PAGE first, or remove it from the folder")
    for element in root.iter():
        if _local_name(element) == "page":
            return element
    raise DataError(f"{path} has no Page element, so it is no PAGE XML; remove it from the folder")


def _local_name(element: Element) -> str:
    """Name without the namespace, which differs in each version, in lower case without the underscores of 2009."""
    return str(element.tag).rpartition("}")[2].replace("_", "").lower()


def _attribute(element: Element, name: str) -> str:
    """An attribute such as ``imageWidth``, which is ``image_width`` in the version of 2009."""
    return element.get(name, "") or element.get(re.sub("([A-Z])", r"_\1", name).lower(), "")


def _size(page: Element, path: Path) -> dict[str, int]:
    size: dict[str, int] = {}
    for key, attribute in (("width", "imageWidth"), ("height", "imageHeight")):
        text = _attribute(page, attribute)
        if not re.fullmatch("[1-9][0-9]{0,8}", text):
            raise DataError(f"{path}: Page has {attribute} {text!r}, which must be a size in px; correct it")
        size[key] = int(text)
    return size


def _image_name(page: Element, path: Path, found: Mapping[str, str], folder: Path) -> str:
    # Without folders: some files contain the path on the machine that made them.
    named = _attribute(page, "imageFilename").replace("\\", "/").rpartition("/")[2]
    stems = (path.stem, path.stem.removeprefix("pc-"))
    candidates = [named, *(stem + suffix for stem in stems for suffix in IMAGE_SUFFIXES)]
    for candidate in candidates:
        if candidate.lower() in found:
            return found[candidate.lower()]
    raise DataError(f"{path}: its image {named or candidates[1]!r} is not in {folder}; give the folder of the images")


def _regions(page: Element, path: Path) -> Iterator[tuple[int, list[float]]]:
    dropped = 0
    for element in page.iter():
        name = _local_name(element)
        if not name.endswith("region"):
            continue
        points = _points(element, path)
        if len(points) < MIN_POINTS:
            dropped += 1
            continue
        yield CATEGORY_IDS[CLASS_OF.get(name, "OtherRegion")], _box(points)
    if dropped:
        logger.warning("%s: skipped %d regions without coordinates or with fewer than 3 points", path, dropped)


def _points(region: Element, path: Path) -> list[tuple[float, float]]:
    coords = next((child for child in region if _local_name(child) == "coords"), None)
    where = f"{path}: {_local_name(region)} {region.get('id', 'without id')}"
    if coords is None:
        return []
    try:
        points = [(float(x), float(y)) for x, y in _point_texts(coords)]
    except ValueError as error:
        raise DataError(f"{where} has a point that is not two numbers ({error}); correct it") from error
    if not all(math.isfinite(value) for point in points for value in point):
        raise DataError(f"{where} has a point that is not finite; correct it")
    return points


def _point_texts(coords: Element) -> list[list[str]]:
    """Points as text: ``points="x,y x,y"`` since 2013, ``<Point x= y=/>`` before."""
    if "points" in coords.attrib:
        return [pair.split(",") for pair in coords.attrib["points"].split()]
    return [[point.get("x", ""), point.get("y", "")] for point in coords if _local_name(point) == "point"]


def _box(points: list[tuple[float, float]]) -> list[float]:
    left, top = (min(values) for values in zip(*points, strict=True))
    right, bottom = (max(values) for values in zip(*points, strict=True))
    return [left, top, right - left, bottom - top]
