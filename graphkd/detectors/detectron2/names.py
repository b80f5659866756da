"""The same weights in both frameworks: what detectron2 calls the torchvision adapter's tensors, and how they differ.

The one place that turns one into the other: detectron2's first convolution sees BGR, its background class is last, and
it has no box deltas for background. Needs no detectron2.
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
    """A ResNet's layers count from 1, detectron2's stages from 2."""
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
    """detectron2's name of a tensor of the torchvision adapter's Faster R-CNN, or None where it has no such thing."""
    for pattern, theirs in NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return theirs(match) if callable(theirs) else match.expand(theirs)
    return None


def to_detectron2(name: str, values: Tensor) -> Tensor:
    """Our values as those of the tensor that detectron2 calls ``name``."""
    if name == STEM:
        return values.flip(1)
    if ".box_predictor.cls_score." in name:
        return torch.cat([values[1:], values[:1]])
    return values[4:] if ".box_predictor.bbox_pred." in name else values


def from_detectron2(name: str, values: Tensor) -> Tensor:
    """The values of the tensor that detectron2 calls ``name`` as ours; deltas of background are 0."""
    if name == STEM:
        return values.flip(1)
    if ".box_predictor.cls_score." in name:
        return torch.cat([values[-1:], values[:-1]])
    if ".box_predictor.bbox_pred." in name:
        return torch.cat([torch.zeros_like(values[:4]), values])
    return values


def to_detectron2_tensors(tensors: Mapping[str, Tensor], prefix: str = "model.") -> dict[str, Tensor]:
    """Tensors of the torchvision adapter, which begin with ``prefix``, as detectron2 has them, without it.

    What has no counterpart there keeps its name.
    """
    bare = {name.removeprefix(prefix): values for name, values in tensors.items()}
    names = {name: detectron2_name(name) or name for name in bare}
    return {names[name]: to_detectron2(names[name], values) for name, values in bare.items()}


def convert_framework(
    framework: Framework, own: Iterable[str], theirs: Mapping[str, Tensor], prefix: str = "model."
) -> dict[str, Tensor]:
    """Tensors of one adapter as those of the other; what has no counterpart there keeps its name.

    Args:
        framework: into which; ``theirs`` are of the other one.
        own: names of the adapter there.
        theirs: by name.
        prefix: of an adapter's names.
    """
    if framework == "detectron2":
        return {prefix + name: values for name, values in to_detectron2_tensors(theirs, prefix).items()}
    bare = {name.removeprefix(prefix): values for name, values in theirs.items()}
    ours = {detectron2_name(name.removeprefix(prefix)): name for name in own}
    return {ours.get(name, prefix + name): from_detectron2(name, values) for name, values in bare.items()}


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """What of a file's tensors fits a detector."""

    matched: dict[str, Tensor]
    """By the detector's names, ready to load."""
    missing: list[str]
    """Names of the detector's that the file has nothing for."""
    shape_mismatch: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """By the detector's names: shape in the file, shape in the detector."""
    unused: list[str]
    """Names of the file's that the detector has no use for."""


def match_tensors(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, same_framework: bool, prefix: str = "model."
) -> TensorMatch:
    """Find what of ``theirs``, named and laid out as detectron2 has it, fits a detector.

    Args:
        own: the detector's tensors, whose names begin with ``prefix``.
        theirs: of the file.
        same_framework: whether the detector is of detectron2's adapter, so that nothing needs to be turned.
        prefix: of an adapter's names.
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
