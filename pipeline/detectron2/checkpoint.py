"""Reading detectron2 checkpoints: ``.pth``, and ``.pkl`` of arrays, with its own names or Caffe2's.

Only arrays are unpickled: a ``.pkl`` goes through an unpickler that allows the few functions that numpy builds arrays
with, and refuses every other name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import CheckpointError
from pipeline.runs.checkpoint import load_weights

Part = Literal["student", "teacher"]
TEACHER = "teacher."
BACKBONE = "backbone.bottom_up."
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}
CAFFE2: list[tuple[str, str]] = [
    (r"conv1_w", "stem.conv1.weight"),
    (r"res_conv1_bn_s", "stem.conv1.norm.weight"),
    (r"res_conv1_bn_b", "stem.conv1.norm.bias"),
    (r"res(\d)_(\d+)_branch1_w", r"res\1.\2.shortcut.weight"),
    (r"res(\d)_(\d+)_branch1_bn_s", r"res\1.\2.shortcut.norm.weight"),
    (r"res(\d)_(\d+)_branch1_bn_b", r"res\1.\2.shortcut.norm.bias"),
    (r"res(\d)_(\d+)_branch2([abc])_w", r"res\1.\2.conv\3.weight"),
    (r"res(\d)_(\d+)_branch2([abc])_bn_s", r"res\1.\2.conv\3.norm.weight"),
    (r"res(\d)_(\d+)_branch2([abc])_bn_b", r"res\1.\2.conv\3.norm.bias"),
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?_([wb])", r"backbone.fpn_lateral\1.\2"),
    (r"fpn_res(\d)_\d+_sum_([wb])", r"backbone.fpn_output\1.\2"),
    (r"conv_rpn_fpn2_([wb])", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn_cls_logits_fpn2_([wb])", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn_bbox_pred_fpn2_([wb])", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"fc6_([wb])", r"roi_heads.box_head.fc1.\1"),
    (r"fc7_([wb])", r"roi_heads.box_head.fc2.\1"),
    (r"cls_score_([wb])", r"roi_heads.box_predictor.cls_score.\1"),
    (r"bbox_pred_([wb])", r"roi_heads.box_predictor.bbox_pred.\1"),
]
BRANCHES = {"conva": "conv1", "convb": "conv2", "convc": "conv3"}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Allow numpy's array constructors only."""
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are loaded")
        return super().find_class(module, name)


def read_checkpoint(path: Path, part: Part = "student") -> dict[str, Tensor]:
    """Read the tensors of a file, by detectron2's names.

    Args:
        path: ``.pth``, ``.safetensors`` or ``.pkl``.
        part: which network of a file that holds a student and, below ``teacher.``, its teacher.

    Raises:
        CheckpointError: if the file is no mapping of names to arrays, or has no such part.
    """
    tensors = _read_pickle(path) if path.suffix == ".pkl" else load_weights(path)
    own = {name for name in tensors if not name.startswith(TEACHER)}
    if part == "teacher":
        tensors = {name.removeprefix(TEACHER): values for name, values in tensors.items() if name not in own}
    else:
        tensors = {name: tensors[name] for name in tensors if name in own}
    if not tensors:
        raise CheckpointError(f"{path} holds nothing of a {part}; leave --part out, or give another file")
    return _rename(tensors)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            content = _load_arrays(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path} do not exist; give a .pkl, .pth or .safetensors file") from error
    except Exception as error:
        raise CheckpointError(f"{path} is no pickle of arrays: {str(error)[:160]}") from error
    content = content.get("model", content.get("blobs", content)) if isinstance(content, dict) else None
    arrays = {str(name): values for name, values in (content or {}).items() if isinstance(values, np.ndarray)}
    arrays = {name: values for name, values in arrays.items() if values.dtype.kind in "fiu"}
    if not arrays:
        raise CheckpointError(f"{path} holds no mapping of names to arrays; give a state dict")
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}


def _load_arrays(file: IO[bytes]) -> Any:
    return _ArraysOnly(file, encoding="latin1").load()


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Caffe2's tensors to detectron2's, and put those of a bare backbone below the FPN's."""
    renamed: dict[str, Tensor] = {}
    for name, values in tensors.items():
        theirs, converted = _from_caffe2(name), values
        if theirs is not None and ".box_predictor.cls_score." in theirs:
            converted = torch.cat([values[1:], values[:1]])  # Caffe2 has background first
        elif theirs is not None and ".box_predictor.bbox_pred." in theirs:
            converted = values[4:]
        theirs = theirs or name
        renamed[f"{BACKBONE}{theirs}" if theirs.startswith(("stem.", "res")) else theirs] = converted
    return renamed


def _from_caffe2(name: str) -> str | None:
    for pattern, theirs in CAFFE2:
        match = re.fullmatch(pattern, name)
        if match:
            plain = re.sub(r"conv[abc](?=\.)", lambda branch: BRANCHES[branch[0]], match.expand(theirs))
            return re.sub(r"\.([wb])$", lambda field: {"w": ".weight", "b": ".bias"}[field[1]], plain)
    return None
