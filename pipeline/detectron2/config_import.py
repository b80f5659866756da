"""Converting detectron2's YAML to our configs, also the Distillation project's with its ``TEACHER`` and ``KD`` nodes.

Every key of a file is taken (same value under our name), renamed (converted to our terms) or ignored, with the reason.
Keys that a file omits have detectron2's default, which differs from ours, so those that matter are written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graphkd.errors import ConfigError
from pipeline.config.layers import merge, nest
from pipeline.detectron2.rules import DEFAULTS, DISTILLS, MASKS, RULES, TERMS, D2File, Rule, Tree, hardness
from pipeline.detectron2.yaml_reader import read_detectron2_yaml

UNKNOWN = "has no counterpart"
PAGE_RATIO = math.sqrt(2)
"""Height over width of the canvas, as of A4 pages."""


@dataclass(frozen=True, slots=True)
class Line:
    """The conversion of one key."""

    key: str
    value: Any
    verdict: Literal["taken", "renamed", "ignored"]
    why: str
    """Our key and value, or why it is ignored."""


@dataclass(frozen=True, slots=True)
class Imported:
    """Configs by name, the student's or only one last, and the conversion of every key."""

    configs: dict[str, Tree]
    lines: list[Line]


def import_detectron2(path: Path, name: str | None = None, framework: str = "torchvision") -> Imported:
    """Convert a file and its bases.

    Args:
        path: YAML of detectron2.
        name: name of the run; default: the file's, in lower case.
        framework: adapter of both detectors.

    Raises:
        ConfigError: if a file cannot be read safely, or names something unknown.
    """
    name = name or path.stem.lower()
    content = read_detectron2_yaml(path)
    teacher_content = content.pop("TEACHER", None)
    adapter = {"detector": {"framework": framework}}
    config, lines = _convert(content)
    config = merge({"name": name, **adapter}, config)
    if not isinstance(teacher_content, dict):
        return Imported({name: config}, lines)
    converted, teacher_lines = _convert(teacher_content)
    teacher_name = f"{name}-teacher"
    teacher = merge({"name": teacher_name, **adapter, "data": config.get("data", {})}, converted)
    teacher["data"]["view"] = config["data"]["view"]  # both need the same canvas
    lines += [Line(f"TEACHER.{line.key}", line.value, line.verdict, line.why) for line in teacher_lines]
    if D2File(content)["MODEL.META_ARCHITECTURE"] in DISTILLS:
        config |= _distillation(content, teacher_name)
    return Imported({teacher_name: teacher, name: config}, lines)


def _convert(content: Tree) -> tuple[Tree, list[Line]]:
    file, config, lines = D2File(content), dict[str, Any](), list[Line]()
    for key, value in DEFAULTS.items():
        if key not in file.given:
            config = merge(config, _nested(RULES[key](file, value)))
    for key, value in file.given.items():
        outcome = _outcome(file, key, value)
        config = merge(config, _nested(outcome))
        lines.append(_line(key, value, outcome))
    batch = config["schedule"]["batch"]
    fixed = {
        "detector": {"weights": "none", "anchors_rounded": False},
        "schedule": {"reference_batch": batch, "optimizer": "sgd"},
    }
    return merge(merge(fixed, config), {"data": {"view": {"canvas": _canvas(config)}}}), lines


def _outcome(file: D2File, key: str, value: Any) -> tuple[str, Any] | str:
    try:
        return _rule(key)(file, value)
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(f"{key} is {value!r}, which detectron2 cannot use either: {error}") from error


def _rule(key: str) -> Rule:
    if key.startswith("MODEL.ROI_MASK_HEAD."):
        return MASKS
    return RULES.get(key, lambda *_: UNKNOWN)


def _nested(outcome: tuple[str, Any] | str) -> Tree:
    if isinstance(outcome, str) or outcome[0].startswith("method."):  # assembled by _distillation
        return {}
    return nest(*outcome)


def _line(key: str, value: Any, outcome: tuple[str, Any] | str) -> Line:
    if isinstance(outcome, str):
        return Line(key, value, "ignored", outcome)
    plain = list(value) if isinstance(value, tuple) else value
    same = plain == outcome[1] and type(plain) is type(outcome[1])
    return Line(key, value, "taken" if same else "renamed", f"{outcome[0]}: {outcome[1]}")


def _distillation(content: Tree, teacher: str) -> Tree:
    """Method and teacher: Dsig at the student's own proposals, as in the project."""
    file = D2File(content)
    weights: Tree = {term: file.weight(*switch) for term, switch in TERMS.items()}
    weights["hard_background"] = hardness(file)
    return {
        "method": {"name": "dsig", "nodes": "student", "dsig": weights},
        "teacher": {"run": f"runs/{teacher}", "signals": "live"},
    }


def _canvas(config: Tree) -> list[int]:
    width = config["data"]["view"]["shortest_edge"][1]
    return [32 * math.ceil(side / 32) for side in (width * PAGE_RATIO, width)]


def check_valid(imported: Imported) -> None:
    """Raise ConfigError if a converted config is invalid."""
    from pipeline.config.load import resolve  # needs torch

    try:
        for name, config in imported.configs.items():
            resolve(config, name)
    except ConfigError as error:
        raise ConfigError(f"the file asks for something that is not supported: {error}") from error
