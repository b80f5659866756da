"""Converting weights between the torchvision and detectron2 adapters, without importing detectron2.

Besides names, the first convolution (BGR in detectron2), the position of the background class (last) and the box
deltas of background (none) differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphkd.detectors.config import Framework

STEM = "backbone.bottom_up.stem.conv1.weight"


def _stage(match: re.Match[str]) -> str:
    """Name of a tensor in a ResNet stage; timm counts layers from 1, detectron2 stages from 2."""
    layer, block, rest = match.groups()
    part, _, field = rest.rpartition(".")
    names = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
    theirs = names.get(part) or re.sub(r"bn(\d)", r"conv\1.norm", part)
    return f"backbone.bottom_up.res{int(layer) + 1}.{block}.{theirs}.{field}"


def _level(name: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"backbone.fpn_{name}{int(match[1]) + 2}.{match[2]}"


NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"backbone\.body\.conv1\.weight", STEM),
    (r"backbone\.body\.bn1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    (r"backbone\.body\.layer(\d)\.(\d+)\.(.+)", _stage),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(\w+)", _level("lateral")),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(\w+)", _level("output")),
    (r"rpn\.head\.conv\.0\.0\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn\.head\.cls_logits\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn\.head\.bbox_pred\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(\w+)", r"roi_heads.box_head.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(\w+)", r"roi_heads.box_head.fc2.\1"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(\w+)", r"roi_heads.box_predictor.\1.\2"),
]


def detectron2_name(name: str) -> str | None:
    """detectron2's name of a tensor of the torchvision adapter's Faster R-CNN, or None if it has no counterpart."""
    for pattern, theirs in NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return theirs(match) if callable(theirs) else match.expand(theirs)
    return None


def to_detectron2(name: str, values: Tensor) -> Tensor:
    """Convert values of the torchvision adapter to those of detectron2's tensor ``name``."""
    if name == STEM:
        return values.flip(1)
    if ".box_predictor.cls_score." in name:
        return torch.cat([values[1:], values[:1]])
    return values[4:] if ".box_predictor.bbox_pred." in name else values


def from_detectron2(name: str, values: Tensor) -> Tensor:
    """Convert values of detectron2's tensor ``name`` to the torchvision adapter's; deltas of background are 0."""
    if name == STEM:
        return values.flip(1)
    if ".box_predictor.cls_score." in name:
        return torch.cat([values[-1:], values[:-1]])
    if ".box_predictor.bbox_pred." in name:
        return torch.cat([torch.zeros_like(values[:4]), values])
    return values


def to_detectron2_tensors(tensors: Mapping[str, Tensor], prefix: str = "model.") -> dict[str, Tensor]:
    """Convert tensors of the torchvision adapter, whose names start with ``prefix``, to detectron2's, without it.

    Tensors without a counterpart keep their names.
    """
    bare = {name.removeprefix(prefix): values for name, values in tensors.items()}
    names = {name: detectron2_name(name) or name for name in bare}
    return {names[name]: to_detectron2(names[name], values) for name, values in bare.items()}


def convert_framework(
    framework: Framework, own: Iterable[str], theirs: Mapping[str, Tensor], prefix: str = "model."
) -> dict[str, Tensor]:
    """Convert tensors of one adapter to the other. Tensors without a counterpart keep their names.

    Args:
        framework: to convert to.
        own: names of that framework's adapter.
        theirs: tensors of the other framework's adapter by name.
        prefix: of the adapters' names.
    """
    if framework == "detectron2":
        return {prefix + name: values for name, values in to_detectron2_tensors(theirs, prefix).items()}
    bare = {name.removeprefix(prefix): values for name, values in theirs.items()}
    ours = {detectron2_name(name.removeprefix(prefix)): name for name in own}
    return {ours.get(name, prefix + name): from_detectron2(name, values) for name, values in bare.items()}


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """Tensors of a file matched with those of a detector."""

    matched: dict[str, Tensor]
    """By the detector's names, converted."""
    missing: list[str]
    """Tensors of the detector that are not in the file."""
    shape_mismatch: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Shapes in the file and in the detector, by the detector's names."""
    unused: list[str]
    """Tensors of the file that are not in the detector."""


def match_tensors(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, same_framework: bool, prefix: str = "model."
) -> TensorMatch:
    """Match tensors in detectron2's names and layout with those of a detector.

    Args:
        own: tensors of the detector, whose names start with ``prefix``.
        theirs: tensors of the file.
        same_framework: whether the detector is of the detectron2 adapter, so that no values are converted.
        prefix: of the adapters' names.
    """
    result, used = TensorMatch({}, [], {}, []), set[str]()
    for name, values in own.items():
        bare = name.removeprefix(prefix)
        source = bare if same_framework else detectron2_name(bare)
        if source is None or source not in theirs:
            result.missing.append(name)
            continue
        used.add(source)
        found = theirs[source] if same_framework else from_detectron2(source, theirs[source])
        if found.shape == values.shape:
            result.matched[name] = found
        else:
            result.shape_mismatch[name] = (tuple(theirs[source].shape), tuple(values.shape))
    result.unused.extend(name for name in theirs if name not in used)
    return result
