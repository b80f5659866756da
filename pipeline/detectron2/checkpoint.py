"""Reading detectron2 checkpoints: ``.pth``, and ``.pkl`` of arrays, with its own names or Caffe2's.

Only arrays of numbers are unpickled: a ``.pkl`` goes through an unpickler that replaces the few functions that numpy
builds arrays with by ones that check type, shape and size, and refuses every other name.
"""

from __future__ import annotations

import codecs
import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import CheckpointError
from pipeline.core.files import check_regular, shown
from pipeline.runs.checkpoint import load_weights

Part = Literal["student", "teacher"]
TEACHER = "teacher."
BACKBONE = "backbone.bottom_up."
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
REFUSED = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ"}
NUMERIC = re.compile(r"[<>=|]?[fiu][1248]")
BRANCHES = {"conva": "conv1", "convb": "conv2", "convc": "conv3"}


class _NumericType:
    """Stands for numpy's dtype while unpickling: numbers only, and no state but their byte order.

    A dtype of another kind, or with fields, can make numpy read memory that is not the array's.
    """

    def __init__(self, code: object, *_: object) -> None:
        self.dtype = np.dtype(code) if isinstance(code, str) and NUMERIC.fullmatch(code) else None
        if self.dtype is None:
            raise pickle.UnpicklingError(f"it has an array of type {str(code)[:40]!r}, and only numbers are loaded")

    def __setstate__(self, state: tuple[object, ...]) -> None:
        order, rest = state[1] if len(state) > 1 else None, state[2:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in rest):
            raise pickle.UnpicklingError("it has an array with fields, and only numbers are loaded")
        assert self.dtype is not None
        self.dtype = self.dtype.newbyteorder("=" if order == "|" else order)


class _Array:
    """Stands for numpy's array while unpickling: its bytes are checked against shape and type before they are used."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _NumericType) or kind.dtype is None or not isinstance(content, (bytes, str)):
            raise pickle.UnpicklingError("it has an array of objects, and only numbers are loaded")
        raw = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(raw, kind.dtype)
        self.values = flat.reshape(shape, order="F" if fortran else "C")


def _scalar(kind: _NumericType, content: bytes | str) -> Any:
    raw = content.encode("latin1") if isinstance(content, str) else content
    assert kind.dtype is not None
    return np.frombuffer(raw, kind.dtype, 1)[0]


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Allow what numpy builds arrays with, and nothing of numpy itself."""
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are loaded")
        return ARRAYS[module, name]


ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _NumericType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): codecs.encode,
}
"""What a pickle of arrays may ask for, and what it gets."""


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
        check_regular(path)
        with path.open("rb") as file:
            content = _load_arrays(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {shown(path)} do not exist; give a .pkl, .pth or .safetensors file") from error
    except Exception as error:
        raise CheckpointError(f"{path} is no pickle of arrays: {str(error)[:160]}") from error
    content = content.get("model", content.get("blobs", content)) if isinstance(content, dict) else None
    found = (content if isinstance(content, dict) else {}).items()
    arrays = {str(name): each.values for name, each in found if isinstance(each, _Array) and each.values is not None}
    if not arrays:
        raise CheckpointError(f"{path} holds no mapping of names to arrays; give a state dict")
    # In this machine's byte order, which torch requires; a copy, since the pickle's bytes are read-only.
    return {name: torch.from_numpy(values.astype(values.dtype.newbyteorder("="))) for name, values in arrays.items()}


def _load_arrays(file: IO[bytes]) -> Any:
    content = file.read()
    _check_operations(content)
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


def _check_operations(content: bytes) -> None:
    """Raise UnpicklingError for operations that arrays do not need, or that reserve memory which the file lacks."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name in REFUSED or (operation.name.endswith("PUT") and int(argument or 0) > count):
            raise pickle.UnpicklingError(f"it has the operation {operation.name}, which no pickle of arrays needs")


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
