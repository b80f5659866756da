from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.report.curves import loss_curves
from pipeline.report.html import write_report
from pipeline.report.runs import load_run
from pipeline.report.starts import start_rows


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


def test_what_was_killed_and_resumed_when(make_run, dataset, tmp_path: Path):
    runs = [load_run(make_run("smooth", ap=0.5)), load_run(interrupted(make_run("rough", ap=0.4)))]
    rows = start_rows(runs)
    assert [row.run for row in rows] == ["rough"] * 3
    assert [row.steps for row in rows] == ["0 to 50", "40 to 70", "70 to 100"]
    assert [row.ended for row in rows] == ["killed", "SIGTERM after 16 s", "finished after 29 s"]
    assert [row.lost for row in rows] == ["10", "0", "–"]
    assert rows[0].began == "1970-01-01 00:16:40" and rows[2].workers == "1 on node-7"
    page = write_report(runs, tmp_path / "report.html", dataset=dataset, graph=None).read_text()
    assert "Stopped and gone on" in page and "SIGTERM after 16 s" in page


def test_runs_that_nobody_stopped_have_no_such_table(make_run, dataset, tmp_path: Path):
    page = write_report([load_run(make_run("smooth", ap=0.5))], tmp_path / "r.html", dataset=dataset, graph=None)
    assert "Stopped and gone on" not in page.read_text()


def test_accuracy_during_training_is_a_panel_of_its_own(make_run, tmp_path: Path):
    def width(folder: Path) -> int:
        path = tmp_path / "curves.png"
        path.write_bytes(loss_curves([load_run(folder)]))
        image = Image.open(path)
        assert np.asarray(image).std() > 1
        return image.width

    plain = width(make_run("plain"))
    assert width(interrupted(make_run("judged"))) == plain * 3 // 2
