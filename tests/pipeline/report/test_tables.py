from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.charts import loss_curves
from pipeline.report.html import write_report
from pipeline.report.runs import load_run
from pipeline.report.tables import (
    attempt_rows,
    class_rows,
    commands,
    comparison_warnings,
    config_rows,
    duration,
    role,
    run_rows,
    summary,
)

DASH = "\N{EN DASH}"


@pytest.fixture
def three(make_run):
    """Makes teacher, student alone and distilled student with the AP given."""

    def make(teacher: float, alone: float, distilled: float):
        big = {"architecture": "faster_rcnn", "backbone": "resnet50"}
        folders = [
            make_run("big", ap=teacher, detector=big),
            make_run("alone", ap=alone),
            make_run("distilled", ap=distilled, teacher="big"),
        ]
        return [load_run(folder) for folder in folders]

    return make


def test_roles(three):
    runs = three(0.7, 0.5, 0.6)
    assert [role(run, runs) for run in runs] == ["teacher", "student alone", "distilled student"]


def test_the_summary_gives_figures_and_no_verdict(three, make_run):
    runs = three(0.7, 0.5, 0.55)
    assert summary(runs) == "AP: big 70.0, alone 50.0, distilled 55.0."
    assert comparison_warnings(runs) == ["Each result is from one seed; results vary between seeds."]
    young = load_run(make_run("young"))
    assert summary([young]) == "No run has been evaluated yet." and comparison_warnings([young]) == []


def test_unfair_comparisons_are_pointed_out(make_run):
    first = load_run(make_run("first", ap=0.5, data={"val": "a"}))
    second = load_run(make_run("second", ap=0.5, data={"val": "b"}))
    second.evaluation["step"] = 50
    assert comparison_warnings([first, second])[:2] == [
        "The runs were evaluated on different pages.",
        "The students were trained for different numbers of steps.",
    ]
    assert comparison_warnings([first]) == []


def test_only_differing_keys_are_listed(make_run):
    first = make_run("first", schedule={"lr": 0.01, "steps": 5}, run={"folder": "x", "seed": 0})
    second = make_run("second", teacher="big", schedule={"lr": 0.02, "steps": 5}, run={"folder": "y", "seed": 0})
    rows = config_rows([load_run(first), load_run(second)])
    assert {row.name: row.cells for row in rows} == {
        "method.name": ["none", "graphkd"],
        "schedule.lr": ["0.01", "0.02"],
        "teacher.run": [DASH, "runs/big"],
    }


def test_commands_are_quoted_and_do_not_touch_the_old_run(make_run):
    lines = commands([load_run(make_run("first")), load_run(make_run("my run", run={"folder": "out/there"}))])
    assert lines[0].endswith("config.yaml name=first-again")
    assert "'name=my run-again' 'run.folder=out/my run-again'" in lines[1]
    assert lines[2].startswith("graphkd report ") and lines[2].endswith("my run'")


def test_rows_of_runs(three):
    rows = {row.name: row.cells for row in run_rows(three(0.7, 0.5, 0.55))}
    assert rows["AP, %"] == ["70.0", "50.0", "55.0"]
    assert rows["Role"] == ["teacher", "student alone", "distilled student"]
    assert rows["Detector"][0] == "faster rcnn, resnet50"
    assert "AP small, %" not in rows, "not defined for any run"
    assert {name: cells[0] for name, cells in rows.items() if not name.startswith(("A", "R", "De"))} == {
        "Evaluated pages": "6",
        "Trained steps": "100",
        "Parameters": "28.4 M",
        "Training time": "1 h 01 min",
        "Training speed, pages/s": "12",
        "Data wait, %": "25",
    }


def test_rows_of_classes(three):
    rows = {row.name: row.cells for row in class_rows(three(0.7, 0.6, 0.5))}
    assert rows["table"] == ["35.0", "30.0", "25.0"]
    assert rows["figure"] == [DASH] * 3


def test_rows_without_content_are_left_out(make_run):
    folder = make_run("young")
    (folder / "metrics.jsonl").unlink()
    assert [row.name for row in run_rows([load_run(folder)])] == ["Role", "Detector"]


def test_durations():
    assert [duration(seconds) for seconds in (42.4, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]


def interrupted(folder: Path) -> Path:
    """A run that was killed after step 50, stopped by a signal after 70 and finished at 100, evaluated twice."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line | {"time": 1000.0 + line["step"]}) + "\n" for line in metrics)
    )
    host = {"workers": 2, "host": "node-7", "pid": 1}
    lines = [
        {"event": "start", "time": 1000.0, "step": 0, **host},
        {"event": "start", "time": 1055.0, "step": 40, **host},
        {"event": "end", "start": 1055.0, "time": 1071.0, "step": 70, "why": "SIGTERM"},
        {"event": "start", "time": 1072.0, "step": 70, **host, "workers": 1},
        {"event": "end", "start": 1072.0, "time": 1101.0, "step": 100, "why": "finished"},
    ]
    (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    scores = [{"step": step, "ap": ap} for step, ap in ((50, 0.2), (100, 0.4))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    return folder


def test_restarts_of_a_killed_run(make_run, dataset, tmp_path: Path):
    runs = [load_run(make_run("smooth", ap=0.5)), load_run(interrupted(make_run("rough", ap=0.4)))]
    assert attempt_rows(runs) == [
        ["rough", "1970-01-01 00:16:40", "0 to 50", "2 on node-7", "killed", "10"],
        ["rough", "1970-01-01 00:17:35", "40 to 70", "2 on node-7", "SIGTERM after 16 s", "0"],
        ["rough", "1970-01-01 00:17:52", "70 to 100", "1 on node-7", "finished after 29 s", DASH],
    ]
    page = write_report(runs, tmp_path / "report.html", dataset=dataset, graph=None).read_text()
    assert "Restarts" in page and "SIGTERM after 16 s" in page


def test_runs_that_nobody_stopped_have_no_restarts(make_run, dataset, tmp_path: Path):
    page = write_report([load_run(make_run("smooth", ap=0.5))], tmp_path / "r.html", dataset=dataset, graph=None)
    assert "Restarts" not in page.read_text()


def test_accuracy_during_training_has_a_panel(make_run, tmp_path: Path):
    def width(folder: Path) -> int:
        path = tmp_path / "curves.png"
        path.write_bytes(loss_curves([load_run(folder)]))
        image = Image.open(path)
        assert np.asarray(image).std() > 1
        return image.width

    plain = width(make_run("plain"))
    assert width(interrupted(make_run("evaluated"))) == plain * 3 // 2
