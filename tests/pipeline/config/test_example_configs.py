"""Every other config that ships loads, and starts with the command that launches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config

ROOT = Path(__file__).parents[3]
RUNS = [
    path.relative_to(ROOT)
    for folder in ("quickstart", "examples")
    for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    if not path.stem.endswith("base")
]


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_a_config_loads_and_names_its_command(path: Path) -> None:
    config = load_config(ROOT / path)
    assert (ROOT / path).read_text().startswith("# graphkd ")
    assert str(path) in (ROOT / path).read_text()
    if config.method.name != "none":
        assert config.teacher is not None
        assert any(load_config(ROOT / other).folder == config.teacher.run for other in RUNS)


def test_the_runs_of_one_comparison_differ_only_in_the_method() -> None:
    for alone, distilled in (
        ("quickstart/student", "quickstart/student-graphkd"),
        ("examples/polish-gov-student", "examples/polish-gov-graphkd"),
        ("examples/polish-gov-detectron2-student", "examples/polish-gov-detectron2-graphkd"),
        ("examples/publaynet-examples-student", "examples/publaynet-examples-graphkd"),
    ):
        first, second = (load_config(ROOT / "configs" / f"{name}.yaml") for name in (alone, distilled))
        for part in ("data", "detector", "schedule", "engine"):
            assert getattr(first, part) == getattr(second, part)
        assert first.run.seed == second.run.seed
