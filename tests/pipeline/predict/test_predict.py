"""Predicting files: what is read, where boxes land, what is written, and what a second start does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from pipeline.core.errors import DataError, OutputError
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.predict import inputs
from pipeline.predict.inputs import PageError, find_documents, parse_pages, read_pages
from pipeline.predict.model import Found
from pipeline.predict.page import PagePrediction
from pipeline.predict.parts import PredictSettings
from pipeline.predict.predictor import Predictor
from pipeline.predict.run import predict_documents
from pipeline.predict.writers import docling_label, write_predictions

NAMES = ["Text", "Table <1>", "Picture"]


def pdf(*objects: str, trailer: str = "") -> bytes:
    """A PDF of numbered objects, of which the first is the catalogue."""
    content, places = b"%PDF-1.4\n", list[int]()
    for number, each in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(content)}\n%%EOF\n"
    return content + end.encode()


CATALOGUE = "<< /Type /Catalog /Pages 2 0 R >>"
EMPTY = pdf(CATALOGUE, "<< /Type /Pages /Kids [] /Count 0 >>")
ENCRYPTED = pdf(  # with a hash of the password that no empty one has
    CATALOGUE,
    "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
    "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] >>",
    f"<< /Filter /Standard /V 1 /R 2 /O <{'41' * 32}> /U <{'42' * 32}> /P -4 >>",
    trailer=f"/Encrypt 4 0 R /ID [<{'43' * 16}> <{'43' * 16}>]",
)


class MarkedModel:
    """Finds the dark rectangle of a page, as class 1 with score .9, and the page itself as class 0 with score .2."""

    class_names, identity = NAMES, "marked"
    view = AugmentationConfig(canvas=(128, 96), shortest_edge=(96, 96))

    def __init__(self) -> None:
        self.batches: list[int] = []

    def detect(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Found]:
        self.batches.append(len(images))
        return [self._one(image, int(height), int(width)) for image, (height, width) in zip(images, sizes, strict=True)]

    def _one(self, image: NDArray[np.uint8], height: int, width: int) -> Found:
        rows, columns = np.nonzero(image[0, :height, :width] < 100)
        mark = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 1, 1]
        boxes = np.array([mark, [0, 0, width, height]], dtype=np.float32)
        return Found(boxes=boxes, classes=np.array([1, 0]), scores=np.array([0.9, 0.2], dtype=np.float32))


class AnyModel(MarkedModel):
    """With the classes of the small dataset."""

    class_names = ("Text", "Picture", "Title")  # type: ignore[assignment]


def page(width: int = 300, height: int = 400, box: tuple[int, int, int, int] = (30, 40, 150, 200)) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste("black", box)
    return image


def predicted(*inputs: object, **options: object) -> list[PagePrediction]:
    return list(Predictor(MarkedModel()).predict(*inputs, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (96, 128), (900, 300), (1, 1)])
def test_boxes_are_in_px_of_the_page_whatever_its_shape(size: tuple[int, int]) -> None:
    box = (size[0] // 5, size[1] // 5, max(1, size[0] * 3 // 5), max(1, size[1] * 4 // 5))
    (found,) = predicted(page(*size, box))
    step = max(size) / 96 + 1  # a pixel of the canvas
    assert np.abs(found.boxes[0] - np.array(box)).max() <= step
    assert (found.width, found.height) == size and found.labels == ["Table <1>"]
    assert np.isclose(found.scores[0], 0.9)


def test_arrays_images_and_paths_are_pages(tmp_path: Path) -> None:
    page().save(tmp_path / "a.png")
    found = predicted(np.asarray(page()), page(), tmp_path / "a.png")
    assert len(found) == 3
    for each in found:
        np.testing.assert_allclose(each.boxes, found[0].boxes)


def test_an_image_that_is_passed_is_decoded_as_one_in_a_file(tmp_path: Path) -> None:
    """Transparency is white paper, also where the colour behind it is black."""
    clear = Image.new("RGBA", (300, 400), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (30, 40, 150, 200))
    clear.save(tmp_path / "clear.png")
    found, expected = predicted(clear, tmp_path / "clear.png")
    np.testing.assert_allclose(found.boxes, expected.boxes)
    assert np.abs(found.boxes[0] - np.array([30, 40, 150, 200])).max() < 6
    assert clear.mode == "RGBA", "the caller's image stays as it is"


def test_a_photograph_is_turned_and_a_scan_is_split_into_its_pages(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter
    page().rotate(90, expand=True).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    page().save(tmp_path / "scan.tiff", save_all=True, append_images=[page(200, 200), page().convert("CMYK")])
    (photo,) = predicted(tmp_path / "photo.jpg")
    assert (photo.width, photo.height) == (300, 400)
    assert np.abs(photo.boxes[0] - np.array([30, 40, 150, 200])).max() < 6
    scan = predicted(tmp_path / "scan.tiff")
    assert [(each.page, each.width, each.height) for each in scan] == [(1, 300, 400), (2, 200, 200), (3, 300, 400)]
    assert [each.page for each in predicted(tmp_path / "scan.tiff", pages={2, 3})] == [2, 3]


def test_the_pages_of_a_pdf_have_boxes_in_px_and_in_points(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    page().save(tmp_path / "a.pdf", save_all=True, append_images=[page(), page()], resolution=72)
    found = predicted(tmp_path / "a.pdf", dpi=144, pages={1, 3})
    assert [each.page for each in found] == [1, 3]
    assert (found[0].width, found[0].height, found[0].dpi) == (600, 800, 144)
    assert found[0].boxes_pt is not None
    assert np.abs(found[0].boxes_pt[0] - np.array([30, 40, 150, 200])).max() < 6
    assert "box_pt" in found[0].to_dict()["regions"][0]


def test_a_long_pdf_is_divided_into_ranges_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pypdfium2")
    monkeypatch.setattr(inputs, "PDF_PART", 2)
    page().save(tmp_path / "a.pdf", save_all=True, append_images=[page()] * 4, resolution=72)
    documents = find_documents([tmp_path])
    assert [(each.first, each.last) for each in documents] == [(0, 2), (2, 4), (4, 5)]
    assert len({each.key for each in documents}) == 3
    numbers = [each.page for document in documents for each in read_pages(document, 72)]  # type: ignore[union-attr]
    assert numbers == [1, 2, 3, 4, 5]
    (middle,) = find_documents([tmp_path], {3})
    assert [each.page for each in read_pages(middle, 72, {3})] == [3]  # type: ignore[union-attr]
    (error,) = read_pages(find_documents([tmp_path], {9})[0], 72, {9})
    assert "none of the wanted pages" in str(error)


def test_pages_of_many_files_are_detected_together(tmp_path: Path) -> None:
    documents, model = find_documents([folder_of_pages(tmp_path / "in")]), MarkedModel()
    predict_documents(Predictor(model), documents, tmp_path / "out", PredictSettings(batch=4))
    assert model.batches == [4, 1]


def test_pages_of_two_datasets_have_numbers_of_their_own(dataset_folder: Path, tmp_path: Path) -> None:
    """Both may have the same ids, with which results of one would count for the other."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset_folder, copy)
    for given, own in (([dataset_folder], True), ([dataset_folder, copy], False)):
        out = tmp_path / f"out-{own}"
        predict_documents(Predictor(AnyModel()), find_documents(given), out, PredictSettings())
        ids = [each["id"] for each in json.loads((out / "images.json").read_text())["images"]]
        assert len(set(ids)) == len(ids) == 10 * len(given)


def test_folders_patterns_and_single_files_are_found_once(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_documents([tmp_path, tmp_path / "b.png", str(tmp_path / "*.png")])
    assert [each.path.name for each in found] == ["a.JPG", "b.png", "c.tif"]
    for missing in ("nothing.png", str(tmp_path / "*.gif")):
        with pytest.raises(DataError, match="does not exist"):
            find_documents([missing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no page images or PDFs"):
        find_documents([tmp_path / "empty"])


@pytest.mark.parametrize("text", ["0", "a", "3-", "-3", "1,,2", ""])
def test_page_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="give such as 1-3,7"):
        parse_pages(text)
    assert parse_pages("1-3,7") == {1, 2, 3, 7} and parse_pages(None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"not a PDF", "no readable PDF"),
        ("a.pdf", b"", "no readable PDF"),
        ("a.pdf", ENCRYPTED, "has a password"),
        ("a.pdf", EMPTY, "no readable PDF"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "a.png"),
        ("a.png", b"%!PS-Adobe EPSF-3.0", "a.png"),  # would start another program
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (error,) = read_pages(find_documents([tmp_path / name])[0], 72)
    assert isinstance(error, PageError) and message in str(error) and "\n" not in str(error)


def test_a_page_of_twenty_thousand_px_is_refused_in_one_line(tmp_path: Path) -> None:
    Image.new("1", (20_001, 10)).save(tmp_path / "long.png")
    (error,) = read_pages(find_documents([tmp_path / "long.png"])[0], 72)
    assert isinstance(error, PageError) and "more than 20000" in str(error)


def test_thresholds_are_for_all_classes_or_single_ones() -> None:
    assert len(next(Predictor(MarkedModel(), 0.1).predict(page()))) == 2
    assert len(next(Predictor(MarkedModel(), 0.95).predict(page()))) == 0
    assert next(Predictor(MarkedModel(), 0.95, {"Text": 0.1}).predict(page())).labels == ["Text"]
    with pytest.raises(DataError, match="no such class; it has Text"):
        Predictor(MarkedModel(), 0.1, {"Heading": 0.5})


def folder_of_pages(folder: Path) -> Path:
    folder.mkdir()
    for number in range(5):
        page(box=(30 + number, 40, 150, 200)).save(folder / f"page-{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_a_bad_file_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    documents, model = find_documents([folder_of_pages(tmp_path / "in")]), MarkedModel()
    summary = predict_documents(Predictor(model), documents, tmp_path / "out", PredictSettings(batch=2))
    assert (summary.documents, summary.pages, summary.regions) == (6, 5, 5)
    assert len(summary.errors) == 1 and "broken.png" in summary.errors[0]
    truth = COCO(str(tmp_path / "out" / "images.json"))
    results = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert len(results.anns) == 5 and [each["name"] for each in truth.dataset["categories"]] == NAMES


def test_a_second_start_predicts_what_is_missing_only(tmp_path: Path) -> None:
    documents, out = find_documents([folder_of_pages(tmp_path / "in")]), tmp_path / "out"

    class Interrupted(MarkedModel):
        def detect(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[Found]:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().detect(images, sizes)

    with pytest.raises(KeyboardInterrupt):
        predict_documents(Predictor(Interrupted()), documents, out, PredictSettings())
    assert not (out / "predictions.json").exists()
    model = MarkedModel()
    summary = predict_documents(Predictor(model), documents, out, PredictSettings())
    assert sum(model.batches) == 3 and summary.pages == 5
    whole = tmp_path / "whole"
    predict_documents(Predictor(MarkedModel()), documents, whole, PredictSettings())
    assert (out / "predictions.json").read_bytes() == (whole / "predictions.json").read_bytes()


def test_the_folder_of_another_prediction_is_refused(tmp_path: Path) -> None:
    documents, out = find_documents([folder_of_pages(tmp_path / "in")]), tmp_path / "out"
    predict_documents(Predictor(MarkedModel()), documents, out, PredictSettings())
    with pytest.raises(OutputError, match="holds a prediction with another thresholds"):
        predict_documents(Predictor(MarkedModel(), 0.5), documents, out, PredictSettings())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        predict_documents(Predictor(MarkedModel()), documents, tmp_path / "mine", PredictSettings())


def test_every_format_holds_every_region(tmp_path: Path) -> None:
    lines = [each.to_dict() for each in Predictor(MarkedModel(), 0.1).predict(page(), page(200, 200))]
    ids = {name: 7 + number for number, name in enumerate(NAMES)}
    (target,) = write_predictions(lines, ids, "jsonl", tmp_path)
    assert [json.loads(line) for line in target.read_text().splitlines()] == lines
    results, images = write_predictions(lines, ids, "coco", tmp_path)
    assert [each["category_id"] for each in json.loads(results.read_text())] == [8, 7, 8, 7]
    assert [each["width"] for each in json.loads(images.read_text())["images"]] == [300, 200]
    for path in write_predictions(lines, ids, "page-xml", tmp_path):
        root = ElementTree.parse(path).getroot()
        kinds = [region.tag.rpartition("}")[2] for region in root[1]]
        assert kinds == ["TableRegion", "TextRegion"]
        assert root[1][0].get("custom") == "label:Table <1>; score:0.9"
    documents = [json.loads(path.read_text()) for path in write_predictions(lines, ids, "docling", tmp_path)]
    assert [len(each["tables"]) for each in documents] == [1, 1]
    assert documents[0]["pages"]["1"]["size"] == {"width": 300, "height": 400}


def test_docling_reads_its_format(tmp_path: Path) -> None:
    docling = pytest.importorskip("docling_core.types.doc")
    lines = [each.to_dict() for each in Predictor(MarkedModel(), 0.1).predict(page())]
    (path,) = write_predictions(lines, {name: 1 for name in NAMES}, "docling", tmp_path)
    document = docling.DoclingDocument.model_validate_json(path.read_text())
    assert len(document.tables) == 1 and len(document.texts) == 1


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Section-header", "section_header"),
        ("List-item", "list_item"),
        ("Page-footer", "page_footer"),
        ("figure", "picture"),
        ("Stamp", None),
    ],
)
def test_class_names_map_onto_those_of_docling(name: str, label: str | None) -> None:
    assert docling_label(name) == label


def test_a_page_is_drawn_with_its_regions(tmp_path: Path) -> None:
    (found,) = predicted(page())
    drawn = found.draw(tmp_path / "page.png")
    assert drawn.size == (300, 400) and (tmp_path / "page.png").exists()
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(page()).astype(int)).max() > 100
    with pytest.raises(ValueError, match="keep_images"):
        next(Predictor(MarkedModel()).stream(_sources(page()), keep_images=False)).draw()


def _sources(*images: Image.Image) -> list[object]:
    from pipeline.predict.page import PageSource

    return [PageSource(file="page", page=1, image=image) for image in images]
