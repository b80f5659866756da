from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.report.runs import load_run


def test_reads_everything_a_run_wrote(make_run):
    run = load_run(make_run("student", ap=0.5, teacher="big"))
    assert run.label == "student" and run.is_distilled
    assert len(run.metrics) == 10 and run.evaluation["ap"] == 0.5
    assert sorted(run.predictions) == [101, 102, 103, 104, 105] and len(run.predictions[101]) == 3


def test_label_can_be_given(make_run):
    assert load_run(make_run("student"), "mine").label == "mine"


def test_a_run_that_has_only_begun(make_run):
    folder = make_run("young")
    (folder / "metrics.jsonl").unlink()
    run = load_run(folder)
    assert (run.metrics, run.evaluation, run.predictions) == ([], None, {})
    assert not run.is_distilled


def test_no_run(tmp_path: Path):
    with pytest.raises(DataError, match=r"is no run: config.yaml is missing; give") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_steps_repeated_after_a_restart_replace_earlier_ones_and_cut_lines_are_skipped(make_run):
    folder = make_run("restarted")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "loss": 42.0}\n\n{"step": 110, "lo')
    metrics = load_run(folder).metrics
    assert [entry["step"] for entry in metrics] == list(range(10, 80, 10))
    assert metrics[6]["loss"] == 42.0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", "- 1"),
        ("eval.json", "{"),
        ("eval.json", "[]"),
        ("predictions.json", "{}"),
        ("predictions.json", json.dumps([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}])),
        ("predictions.json", json.dumps([{"image_id": 1, "bbox": [1, 2, 3], "score": 1, "category_id": 1}])),
    ],
)
def test_malformed_files_are_named_in_one_line(make_run, name, content):
    folder = make_run("broken", ap=0.5)
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
