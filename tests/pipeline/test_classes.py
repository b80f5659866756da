"""Classes are matched by name: in another order where that is safe, refused before the first step where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphkd.errors import ConfigError
from pipeline.config import RunConfig, resolve
from pipeline.context import RunContext
from pipeline.data.format.classes import match_classes
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.prepare.pack import pack
from pipeline.models import best_checkpoint
from pipeline.runs.checkpoint import load_weights
from pipeline.train.run import evaluate_run, train_run
from tests.support.pages import write_coco
from tests.support.runs import build_here, small_run

CLASSES = {"abc": ("Text", "Picture", "Title"), "acb": ("Text", "Title", "Picture"), "abd": ("Text", "Picture", "Note")}


def test_one_function_says_what_differs() -> None:
    assert match_classes(["a", "b", "c"], ["c", "a", "b"], "x", "y") == [1, 2, 0]
    with pytest.raises(
        ConfigError, match=r"the classes of x are a, b, and those of y are a, c: the latter lacks b and"
    ):
        match_classes(["a", "b"], ["a", "c"], "x", "y")
    with pytest.raises(ConfigError, match="has them in another order"):
        match_classes(["a", "b"], ["b", "a"], "x", "y", same_order=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Packs the same pages under other classes: abc, acb (2 and 3 swapped), abd (one renamed), ab (one fewer)."""
    root = tmp_path_factory.mktemp("classes")
    folder = write_coco(root / "pages", 4)
    coco = json.loads((folder / "annotations.json").read_text())

    def packed(name: str) -> Path:
        names = CLASSES.get(name, CLASSES["abc"][:2])
        new_id = {
            old: 1 + names.index(kind) for old, kind in ((3, "Text"), (5, "Picture"), (9, "Title")) if kind in names
        }
        new_id |= {9: 3} if name == "abd" else {}
        categories = [{"id": number, "name": kind} for number, kind in enumerate(names, start=1)]
        regions = [
            region | {"category_id": new_id[region["category_id"]]}
            for region in coco["annotations"]
            if region["category_id"] in new_id
        ]
        path = root / f"{name}.json"
        path.write_text(json.dumps({**coco, "annotations": regions, "categories": categories}))
        pack(path, folder / "images", root / name)
        return root / name

    return packed


@pytest.fixture(scope="module")
def teacher(data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("runs")
    config = resolve(small_run(folder, data("abc"), "teacher", schedule={"steps": 6}), "teacher")
    train_run(RunContext(config))
    return config


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    content = config.model_dump(mode="json")
    for section, values in changes.items():
        content[section] = {**(content.get(section) or {}), **values} if isinstance(values, dict) else values
    return resolve(content, "changed")


@pytest.mark.e2e
def test_a_run_carries_its_classes_and_is_evaluated_by_name(teacher: RunConfig, data: Callable[[str], Path]) -> None:
    names = list(CLASSES["abc"])
    assert best_checkpoint(teacher.folder).class_names == names
    same = evaluate_run(RunContext(teacher))
    swapped = evaluate_run(RunContext(changed(teacher, data={"val": str(data("acb"))})))
    assert swapped["per_class"] == same["per_class"] and swapped["ap"] == same["ap"]
    for name, message in (("abd", "lacks Title and has besides Note"), ("ab", "lacks Title")):
        with pytest.raises(ConfigError, match=message):
            evaluate_run(RunContext(changed(teacher, data={"val": str(data(name))})))


@pytest.mark.e2e
def test_other_classes_are_refused_before_the_first_step(
    teacher: RunConfig, data: Callable[[str], Path], tmp_path: Path
) -> None:
    distilled = {"method": {"name": "graphkd"}, "teacher": {"run": str(teacher.folder), "statistics_pages": 4}}
    cached = changed(teacher, name="student", run={"folder": str(tmp_path / "student")}, **distilled)
    build_here(cached)
    wrong = [
        changed(teacher, data={"val": str(data("ab"))}, run={"folder": str(tmp_path / "val")}),
        changed(cached, data={"train": str(data("ab")), "val": None}, run={"folder": str(tmp_path / "fewer")}),
        changed(cached, data={"train": str(data("acb")), "val": None}, run={"folder": str(tmp_path / "order")}),
        changed(cached, data={"train": str(data("abd")), "val": None}, run={"folder": str(tmp_path / "renamed")}),
    ]
    for config in wrong:
        with pytest.raises(ConfigError, match="the classes of") as caught:
            train_run(RunContext(config))
        assert "\n" not in str(caught.value) and not config.folder.exists()
    train_run(RunContext(cached))


@pytest.mark.e2e
def test_layers_of_classes_start_anew_under_other_names(
    teacher: RunConfig, data: Callable[[str], Path], tmp_path: Path
) -> None:
    trained = load_weights(best_checkpoint(teacher.folder).weights)
    layer = "model.roi_heads.box_predictor.cls_score.weight"
    for name, copied in (("abc", True), ("abd", False), ("acb", False)):
        folder = {"folder": str(tmp_path / name), "init": str(teacher.folder)}
        config = changed(teacher, data={"train": str(data(name)), "val": None}, run=folder)
        started = RunContext(config).build_detector().state_dict()
        assert torch.equal(started[layer], trained[f"detector.{layer}"]) is copied
        body = "model.backbone.body.conv1.weight"
        assert torch.equal(started[body], trained[f"detector.{body}"])


def test_two_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "pages", 2)
    path = folder / "annotations.json"
    coco = json.loads(path.read_text())
    coco["categories"][1]["name"] = "Title"
    path.write_text(json.dumps(coco))
    pack(path, folder / "images", tmp_path / "out")
    assert PackedDataset(tmp_path / "out").class_names == ["Text", "Title (id 5)", "Title (id 9)"]
