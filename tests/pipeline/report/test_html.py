from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.report.html import _losses, shown_samples, write_report
from pipeline.report.runs import load_run

pytestmark = pytest.mark.e2e


class Page(HTMLParser):
    """Collects the ids, image sources and tags of a page, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.images: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.ids |= {named["id"]} if "id" in named else set()
        if tag == "img":
            assert named["alt"]
            self.images.append(named["src"])
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture
def graph() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((600, 400), 64).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def runs(make_run):
    folders = [make_run("big", ap=0.7), make_run("alone", ap=0.5), make_run("distilled", ap=0.55, teacher="big")]
    return [load_run(folder) for folder in folders]


def test_a_whole_report(runs, dataset, graph, tmp_path: Path):
    out = write_report(runs, tmp_path / "new" / "report.html", dataset=dataset, graph=graph, pages=3)
    text = out.read_text(encoding="utf8")
    page = Page(text)
    assert {"runs", "classes", "training", "pages", "graph", "config", "reproduce"} <= page.ids
    assert "AP: big 70.0, alone 50.0, distilled 55.0." in text and "page-1.png" in text
    assert len(page.images) == 3 + 3


@pytest.mark.e2e
def test_every_picture_is_embedded_and_can_be_decoded(runs, dataset, graph, tmp_path: Path):
    out = write_report(runs, tmp_path / "report.html", dataset=dataset, graph=graph)
    for source in Page(out.read_text(encoding="utf8")).images:
        assert source.startswith("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        image.load()
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 24)) > 5


def test_the_page_loads_nothing_and_runs_nothing(runs, dataset, tmp_path: Path):
    text = write_report(runs, tmp_path / "report.html", dataset=dataset, graph=None).read_text(encoding="utf8")
    assert not {"script", "link", "iframe"} & set(Page(text).tags)
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.findall(r"//[a-z]|url\(|@import", without_pictures)


@pytest.mark.e2e
def test_the_same_runs_give_the_same_bytes(runs, dataset, graph, tmp_path: Path):
    first = write_report(runs, tmp_path / "a.html", dataset=dataset, graph=graph).read_bytes()
    assert write_report(runs, tmp_path / "b.html", dataset=dataset, graph=graph).read_bytes() == first


def test_parts_that_are_missing_are_left_out(make_run, tmp_path: Path):
    folder = make_run("young")
    (folder / "metrics.jsonl").unlink()
    page = Page(text := write_report([load_run(folder)], tmp_path / "r.html", dataset=None, graph=None).read_text())
    assert page.ids == {"runs", "reproduce"} and page.images == []
    assert "No run has been evaluated yet." in text


def test_models_that_were_timed_are_shown_with_their_accuracy(make_run, tmp_path: Path):
    run = make_run("timed", ap=0.4)
    figures = {"ap": 0.4, "mb": 9.54, "total_ms": 12.34, "p90_ms": 15.0, "peak_mb": 210.4}
    rows = [{"kind": "torch <1>", "threads": 2, **figures}, {"kind": "ONNX int8", "threads": 1, "ap": None}]
    (run / "latency.json").write_text(json.dumps({"version": 1, "rows": rows}))
    text = write_report([load_run(run)], tmp_path / "r.html", dataset=None, graph=None).read_text()
    shown = text[text.index('id="latency"') :].partition("</section>")[0]
    cells = re.findall("<td>(.*?)</td>", shown)
    assert cells[:7] == ["torch &lt;1&gt;", "2", "40.0", "9.5", "12.3", "15.0", "210"]
    assert cells[7:] == ["ONNX int8", "1", "\N{EN DASH}", *["\N{EN DASH}"] * 4]


def test_metrics_alone_give_curves(make_run, tmp_path: Path):
    page = Page(write_report([load_run(make_run("young"))], tmp_path / "r.html", dataset=None, graph=None).read_text())
    assert {"training", "runs"} <= page.ids and "classes" not in page.ids
    assert len(page.images) == 1


def test_pages_are_shown_without_any_prediction(make_run, dataset, tmp_path: Path):
    page = Page(write_report([load_run(make_run("a"))], tmp_path / "r.html", dataset=dataset, graph=None).read_text())
    assert "pages" in page.ids


def test_names_are_escaped(make_run, tmp_path: Path):
    run = load_run(make_run("run", ap=0.5, note="<b>&"), "<script>alert(1)</script>")
    other = load_run(make_run("other", ap=0.5))
    text = write_report([run, other], tmp_path / "r.html", dataset=None, graph=None, title="<i>").read_text()
    assert "script" not in Page(text).tags and "i>alert" not in text
    assert "&lt;b&gt;&amp;" in text and "<title>&lt;i&gt;</title>" in text


def test_pages_are_spread_evenly_and_empty_ones_skipped(dataset):
    assert shown_samples(dataset, 3) == [1, 2, 4]
    assert shown_samples(dataset, 99) == [0, 1, 2, 3, 4, 5]
    assert shown_samples(dataset, 0) == []


def test_predictions_for_another_dataset_are_refused(make_run, dataset, tmp_path: Path):
    run = load_run(make_run("run", ap=0.5))
    run.predictions[101][0]["category_id"] = 99
    with pytest.raises(DataError, match="category id 99"):
        write_report([run], tmp_path / "report.html", dataset=dataset, graph=None)
    assert not (tmp_path / "report.html").exists()


def test_what_evaluation_does_not_see_is_said(make_run, dataset):
    run = load_run(make_run("young"))
    over = replace(run, evaluation={"detection_limit": 100, "pages_over_limit": 3})
    (said,) = _losses(dataset, [run, over])
    assert said.endswith("3 pages have more than 100 regions of one class, and AP counts no more detections of it.")
