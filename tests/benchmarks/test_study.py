"""The study's arithmetic, and that every variant it names is a config that can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study import CONFIGS, TABLES, planned
from benchmarks.study_table import print_table, summarise
from pipeline.config import load_config


def rows(**scores: list[float]) -> list[dict[str, object]]:
    return [{"variant": name, "seed": seed, "ap": ap} for name, own in scores.items() for seed, ap in enumerate(own)]


def test_gains_are_taken_seed_by_seed() -> None:
    summary = summarise(rows(none=[0.30, 0.40], graphkd=[0.40, 0.52]), ["none", "graphkd"])
    none, graphkd = summary
    assert (none["ap"], none["gain"], none["noise"]) == pytest.approx((35.0, 0.0, 0.0))
    assert graphkd["gain"] == pytest.approx(11.0)
    assert graphkd["noise"] == pytest.approx(1.0)  # gains 10 and 12: deviation sqrt 2, over sqrt 2
    assert graphkd["spread"] == pytest.approx(12 / 2**0.5)


def test_a_seed_without_its_baseline_has_no_gain(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise(rows(graphkd=[0.5]), ["none", "graphkd"])
    assert [row["variant"] for row in summary] == ["graphkd"]
    assert summary[0]["gain"] is None
    print_table(summary)
    assert "| graphkd | 1 | 50.0 | 0.0 |  |" in capsys.readouterr().out


@pytest.mark.parametrize("name", TABLES)
def test_variants_of_a_table_share_all_but_their_method(name: str) -> None:
    runs = planned(Path("out"), Path("data"), name, TABLES[name].variants, [0, 1])
    assert len({run.key for run in runs}) == len(runs) == 2 * len(TABLES[name].variants)
    configs = [load_config(CONFIGS / "student-graphkd.yaml", run.overrides) for run in runs]
    assert len({config.folder for config in configs}) == len(configs)
    for part in ("data", "schedule", "detector"):
        assert len({getattr(config, part).model_dump_json() for config in configs}) == 1
    assert len({config.run.init for config in configs}) == 1
    told = {(c.method.model_dump_json(), c.teacher.signals, c.teacher.store) for c in configs if c.teacher}
    assert len(told) == len(configs) // 2
