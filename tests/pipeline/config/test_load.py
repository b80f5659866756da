"""Configs: bases, overrides, and every mistake at once with a close name."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphkd.errors import ConfigError
from pipeline.config import ScheduleConfig, load_config


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_bases_merge_in_order_and_the_file_counts_last(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "data: {train: one}\nschedule: {lr: 0.5, steps: 7}")
    write(tmp_path, "b.yaml", "schedule: {lr: 0.25}")
    path = write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\nname: run\nschedule: {batch: 4}")
    config = load_config(path, ["schedule.steps=9", "detector.backbone=resnet18"])
    assert (config.schedule.lr, config.schedule.steps, config.schedule.batch) == (0.25, 9, 4)
    assert (str(config.data.train), config.detector.backbone) == ("one", "resnet18")


def test_a_section_in_one_word_keeps_the_settings_of_its_bases(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "data: {train: one}\ndetector: {backbone: resnet18}\nengine: {name: ray, workers: 2}")
    path = write(tmp_path, "b.yaml", "base: a.yaml\nname: run\ndetector: detectron2")
    config = load_config(path, ["engine=local"])
    assert (config.detector.framework, config.detector.backbone) == ("detectron2", "resnet18")
    assert (config.engine.name, config.engine.workers) == ("local", 2)


def test_anchors_are_rounded_as_the_framework_does(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", "name: x\ndata: {train: a}")
    for framework, rounded in {"torchvision": True, "detectron2": False}.items():
        assert load_config(path, [f"detector={framework}"]).detector.anchors_rounded is rounded
    with pytest.raises(ConfigError, match="detectron2's anchors are never rounded"):
        load_config(path, ["detector=detectron2", "detector.anchors_rounded=true"])


def test_every_mistake_is_listed_at_once_with_a_close_name(tmp_path: Path) -> None:
    path = write(
        tmp_path, "bad.yaml", "name: x\ndata: {train: a, vew: 3}\nschedul: {}\nschedule: {lr: -1, optimiser: sgd}"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["engine.wrokers=2"])
    message = str(caught.value)
    assert "5 mistakes" in message
    for part in ("did you mean view?", "did you mean schedule?", "did you mean optimizer?", "did you mean workers?"):
        assert part in message
    assert "schedule.lr: input should be greater than 0, got -1" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds a list"),
        ("name: [", "not readable YAML"),
        ("base: self.yaml", "is its own base"),
        ("base: absent.yaml", "does not exist"),
        ("name: x", "data: missing"),
        ("name: ../x\ndata: {train: a}", "name:"),
        ("name: x\ndata: {train: a}\nmethod: {name: graphkd}", "needs teacher.run"),
        ("name: x\ndata: {train: a}\nengine: {workers: 9}", "without a page"),
        ("name: !!python/object/apply:os.system [true]\ndata: {train: a}", "not readable YAML"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, "self.yaml", text))


@pytest.mark.parametrize("override", ["schedule.lr", "=3", "schedule.lr=["])
def test_bad_overrides_are_explained(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(tmp_path, "c.yaml", "name: x\ndata: {train: a}"), [override])


def test_a_linear_scale_moves_rate_and_steps_along() -> None:
    scaled = ScheduleConfig(batch=32, lr=0.01, steps=180_000, milestones=(120_000, 160_000)).scaled()
    assert (scaled.lr, scaled.steps, scaled.milestones) == (0.04, 45_000, (30_000, 40_000))
    assert scaled.scaled() == scaled


def test_no_scale_leaves_the_schedule() -> None:
    plain = ScheduleConfig(batch=32, lr_scale="none")
    assert plain.scaled().steps == plain.steps


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("name: pkd", "pkd with nodes fixed needs the teacher's feature maps"),
        ("name: dsig, nodes: student", "dsig with nodes student needs the teacher at student proposals"),
        ("name: graphkd, nodes: student", "set teacher.signals=live"),
        ("name: pkd, nodes: student", "pkd compares whole maps and has no nodes"),
    ],
)
def test_what_no_cache_holds_is_refused_with_the_remedy(tmp_path: Path, method: str, message: str) -> None:
    path = write(tmp_path, "run.yaml", f"name: x\ndata: {{train: a}}\nmethod: {{{method}}}\nteacher: {{run: t}}")
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    if "pkd, nodes" not in method:
        assert load_config(path, ["teacher.signals=live"]).method.needs_live_teacher


@pytest.mark.parametrize("method", ["none", "dsig", "graphkd"])
def test_methods_that_a_cache_serves_are_one_word_apart(tmp_path: Path, method: str) -> None:
    path = write(tmp_path, "run.yaml", "name: x\ndata: {train: a}\nmethod: {name: graphkd}\nteacher: {run: t}")
    assert load_config(path, [f"method.name={method}"]).method.name == method
