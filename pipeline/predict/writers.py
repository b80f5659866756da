"""Files of predictions, made from the lines of :meth:`pipeline.predict.page.PagePrediction.to_dict`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from pipeline.core.files import atomic_path, write_atomic, write_json
from pipeline.predict.page import POINTS_PER_INCH

Format = Literal["coco", "jsonl", "docling", "page-xml"]
Line = dict[str, Any]

PAGE_NAMESPACE = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"
# By the words of a class name; the first that occurs decides.
DOCLING_LABELS = {
    "caption": "caption",
    "footnote": "footnote",
    "formula": "formula",
    "equation": "formula",
    "list": "list_item",
    "footer": "page_footer",
    "section": "section_header",
    "header": "page_header",
    "picture": "picture",
    "figure": "picture",
    "image": "picture",
    "graphic": "picture",
    "table": "table",
    "title": "title",
    "heading": "section_header",
    "code": "code",
    "text": "text",
    "paragraph": "text",
}
PAGE_REGIONS = {
    "table": "TableRegion",
    "picture": "ImageRegion",
    "formula": "MathsRegion",
}
PAGE_TEXT_TYPES = {
    "caption": "caption",
    "footnote": "footnote",
    "list_item": "list-label",
    "page_footer": "footer",
    "page_header": "header",
    "section_header": "heading",
    "title": "heading",
    "text": "paragraph",
}


def docling_label(name: str) -> str | None:
    """Label of docling's that a class name means, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((label for word, label in DOCLING_LABELS.items() if any(word in own for own in words)), None)


def write_predictions(lines: Iterable[Line], category_ids: Mapping[str, int], form: Format, out: Path) -> list[Path]:
    """Write all pages in one format below ``out``, and return the files; each is whole or absent."""
    writers: dict[Format, Callable[[Iterable[Line], Mapping[str, int], Path], list[Path]]] = {
        "coco": _write_coco,
        "jsonl": _write_jsonl,
        "docling": _write_docling,
        "page-xml": _write_page_xml,
    }
    return writers[form](lines, category_ids, out)


def page_name(line: Line) -> str:
    """Name for files of a page: its file's path in letters that every file system takes, and its number."""
    plain = re.sub(r"[^\w.-]+", "_", line["file"]).strip("._") or "page"
    return f"{plain[-150:]}-{line['page']:04d}"


def _write_jsonl(lines: Iterable[Line], _: Mapping[str, int], out: Path) -> list[Path]:
    target = out / "predictions.jsonl"
    with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return [target]


def _write_coco(lines: Iterable[Line], category_ids: Mapping[str, int], out: Path) -> list[Path]:
    """``predictions.json``, COCO results that ``graphkd eval --predictions`` reads, and ``images.json`` beside it."""
    results, images = out / "predictions.json", out / "images.json"
    categories = json.dumps([{"id": number, "name": name} for name, number in category_ids.items()])
    with (
        atomic_path(results) as new_results,
        atomic_path(images) as new_images,
        new_results.open("w", encoding="utf-8") as results_file,
        new_images.open("w", encoding="utf-8") as images_file,
    ):
        results_file.write("[")
        images_file.write(f'{{"categories": {categories}, "annotations": [], "images": [')
        before_result = before_image = ""  # nothing is collected, since there may be millions
        for number, line in enumerate(lines, start=1):
            image = _coco_image(line, number)
            images_file.write(before_image + json.dumps(image, ensure_ascii=False))
            before_image = ",\n"
            for row in _coco_results(line, image["id"], category_ids):
                results_file.write(before_result + json.dumps(row))
                before_result = ",\n"
        results_file.write("]\n")
        images_file.write("]}\n")
    return [results, images]


def _coco_image(line: Line, number: int) -> dict[str, Any]:
    name = f"{line['file']}#page={line['page']}" if "dpi" in line or line["page"] > 1 else line["file"]
    return {
        "id": line.get("image_id", number),
        "file_name": name,
        "width": line["width"],
        "height": line["height"],
    }


def _coco_results(line: Line, image_id: int, category_ids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for region in line["regions"]:
        left, top, right, bottom = region["box"]
        yield {
            "image_id": image_id,
            "category_id": category_ids[region["label"]],
            "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)],
            "score": region["score"],
        }


def _write_docling(lines: Iterable[Line], _: Mapping[str, int], out: Path) -> list[Path]:
    """One ``DoclingDocument`` for each input file, with boxes and labels but without text."""
    written = []
    for file, group in groupby(lines, key=lambda line: str(line["file"])):
        pages = list(group)
        written.append(write_json(out / f"{page_name(pages[0])}.docling.json", _docling_document(file, pages)))
    return written


def _docling_document(file: str, pages: list[Line]) -> dict[str, Any]:
    items: dict[str, list[dict[str, Any]]] = {"texts": [], "tables": [], "pictures": []}
    order: list[dict[str, str]] = []
    for line in pages:
        for region in line["regions"]:
            label = docling_label(region["label"]) or "text"
            kind = {"table": "tables", "picture": "pictures"}.get(label, "texts")
            reference = f"#/{kind}/{len(items[kind])}"
            items[kind].append(_docling_item(line, region["box"], label, kind, reference))
            order.append({"$ref": reference})
    body = {"self_ref": "#/body", "children": order, "content_layer": "body", "name": "_root_", "label": "unspecified"}
    return {
        "schema_name": "DoclingDocument",
        "version": "1.0.0",
        "name": Path(file).stem,
        "body": body,
        "furniture": {**body, "self_ref": "#/furniture", "children": [], "content_layer": "furniture"},
        "groups": [],
        **items,
        "key_value_items": [],
        "pages": {str(line["page"]): _docling_page(line) for line in pages},
    }


def _docling_item(line: Line, box: list[float], label: str, kind: str, reference: str) -> dict[str, Any]:
    left, top, right, bottom = _docling_units(line, box)
    place = {"l": left, "t": top, "r": right, "b": bottom, "coord_origin": "TOPLEFT"}
    item: dict[str, Any] = {
        "self_ref": reference,
        "parent": {"$ref": "#/body"},
        "children": [],
        "content_layer": "body",
        "label": label,
        "prov": [{"page_no": line["page"], "bbox": place, "charspan": [0, 0]}],
    }
    if kind == "texts":
        return item | {"orig": "", "text": ""} | ({"level": 1} if label == "section_header" else {})
    table = {"data": {"table_cells": [], "num_rows": 0, "num_cols": 0}} if kind == "tables" else {}
    return item | {"captions": [], "references": [], "footnotes": []} | table


def _docling_page(line: Line) -> dict[str, Any]:
    width, height = _docling_units(line, [line["width"], line["height"]])
    return {"size": {"width": width, "height": height}, "page_no": line["page"]}


def _docling_units(line: Line, values: list[float]) -> list[float]:
    """Points for PDFs, px for images."""
    scale = POINTS_PER_INCH / line["dpi"] if "dpi" in line else 1
    return [round(value * scale, 3) for value in values]


def _write_page_xml(lines: Iterable[Line], _: Mapping[str, int], out: Path) -> list[Path]:
    return [_write_page(line, out / f"{page_name(line)}.xml") for line in lines]


def _write_page(line: Line, path: Path) -> Path:
    root = Element("PcGts", {"xmlns": PAGE_NAMESPACE})
    SubElement(SubElement(root, "Metadata"), "Creator").text = "graphkd"
    size = {"imageWidth": str(line["width"]), "imageHeight": str(line["height"])}
    page = SubElement(root, "Page", {"imageFilename": Path(line["file"]).name, **size})
    for number, region in enumerate(line["regions"]):
        label = docling_label(region["label"]) or "text"
        kind = PAGE_REGIONS.get(label, "TextRegion")
        about = {"id": f"r{number}", "custom": f"label:{region['label']}; score:{region['score']}"}
        if kind == "TextRegion":
            about["type"] = PAGE_TEXT_TYPES.get(label, "other")
        left, top, right, bottom = (round(side) for side in region["box"])
        corners = f"{left},{top} {right},{top} {right},{bottom} {left},{bottom}"
        SubElement(SubElement(page, kind, about), "Coords", {"points": corners})
    ElementTree.indent(root)
    return write_atomic(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
