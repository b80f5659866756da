"""docling converts a PDF with a bundle of ours as its layout model. Skipped where docling is not installed:

pip install 'docling-slim[convert-core,format-pdf,models-local,models-onnxruntime]'
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

import graphkd
from pipeline.predict.inputs import find_documents, read_pages
from pipeline.predict.page import PageSource
from pipeline.predict.writers import docling_label

pytestmark = pytest.mark.export
pytest.importorskip("onnxruntime")
THRESHOLD = 0.5


def converted(bundle: Path, pdf: Path, folder: Path) -> Any:
    """The DoclingDocument that docling makes of ``pdf`` with ``bundle``."""
    converter = pytest.importorskip("docling.document_converter")
    from docling.backend.pypdfium2_backend import PyPdfiumDocumentBackend
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.object_detection_engine_options import OnnxRuntimeObjectDetectionEngineOptions
    from docling.datamodel.pipeline_options import LayoutObjectDetectionOptions, PdfPipelineOptions
    from docling.datamodel.stage_model_specs import ObjectDetectionModelSpec

    shutil.copytree(bundle, folder / "own--student")  # as docling names the folder of own/student
    layout = LayoutObjectDetectionOptions(
        keep_empty_clusters=True,  # there is no text in a PDF of images
        model_spec=ObjectDetectionModelSpec(name="student", repo_id="own/student"),
        engine_options=OnnxRuntimeObjectDetectionEngineOptions(score_threshold=THRESHOLD),
    )
    options = PdfPipelineOptions(artifacts_path=folder, do_ocr=False, do_table_structure=False, layout_options=layout)
    pdf_option = converter.PdfFormatOption(pipeline_options=options, backend=PyPdfiumDocumentBackend)
    return converter.DocumentConverter(format_options={InputFormat.PDF: pdf_option}).convert(pdf).document


def kind(label: str | None) -> str | None:
    """docling turns titles into headings."""
    return "section_header" if label == "title" else label


def test_docling_converts_a_pdf_with_a_bundle(exported: Path, dataset_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("docling.document_converter")
    (document,) = find_documents([dataset_folder])
    pages = [page.image for page in read_pages(document, 72) if isinstance(page, PageSource)]
    pages[0].save(tmp_path / "pages.pdf", save_all=True, append_images=pages[1:], resolution=72)
    made = converted(exported, tmp_path / "pages.pdf", tmp_path / "models")
    expected = list(graphkd.load(exported, threshold=THRESHOLD).predict(tmp_path / "pages.pdf", dpi=72))
    items = [*made.texts, *made.tables, *made.pictures]
    assert len(made.pages) == len(pages) and len(items) >= len(pages)
    for item in items:  # docling renders pages otherwise, and drops and merges what overlaps
        (place,) = item.prov
        page = expected[place.page_no - 1]
        box = torch.tensor([place.bbox.to_top_left_origin(page.height).as_tuple()])
        alike = [kind(docling_label(name)) == kind(item.label.value) for name in page.labels]
        assert box_iou(box, torch.from_numpy(page.boxes[alike])).max() > 0.7, (item.label, box, page)


def test_classes_that_docling_does_not_know_are_named(caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.export.bundle import _hugging_face_config

    config = _hugging_face_config(["Title", "Stamp"])
    assert config["id2label"] == {"0": "title", "1": "text"} and "Stamp" in caplog.text
