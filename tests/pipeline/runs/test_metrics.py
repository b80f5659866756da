"""Metrics files after restarts and kills."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.runs.metrics import read_metrics


def test_steps_redone_after_a_restart_replace_their_predecessors(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0))]
    content = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(content)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 9.0), (2, 5.0), (3, 4.0)]


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
