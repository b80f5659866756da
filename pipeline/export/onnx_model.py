"""The detector as one ONNX graph: pages in, labels, boxes and scores out."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphkd.boxes import clip_to_pages
from graphkd.detectors.torchvision.common import TorchvisionDetector
from graphkd.detectors.torchvision.fixed import fixed_detections

OPSET = 18
INPUTS, OUTPUTS = ("images", "orig_target_sizes", "page_sizes"), ("labels", "boxes", "scores")


class ExportedDetector(nn.Module):
    """A detector with everything around it.

    ``images`` are float [B, 3, H, W] from 0 to 1, RGB, with the page at the top left of the canvas.
    ``orig_target_sizes`` int64 [B, 2] are width and height of the pages in px, to which the boxes refer. ``page_sizes``
    int64 [B, 2] are height and width of the pages on the canvas in px; 0 for the largest that keep their shape.
    """

    canvas: Tensor

    def __init__(self, detector: TorchvisionDetector, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        self.register_buffer("canvas", torch.tensor(canvas, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor, orig_target_sizes: Tensor, page_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes int64 [B, D], boxes [B, D, 4], xyxy in px of the pages, and scores [B, D], best first."""
        own = orig_target_sizes.flip(1).to(torch.float32)  # height and width
        fitted = (own * (self.canvas / own).amin(dim=1, keepdim=True)).floor().clamp(min=1)
        shown = torch.where(page_sizes > 0, page_sizes.to(torch.float32), fitted)
        features = self.detector.features(images * 255, shown.to(torch.int64))
        boxes, classes, scores = fixed_detections(self.detector, features)
        scale = (own / shown).flip(1).repeat(1, 2)[:, None]
        return classes, clip_to_pages(boxes * scale, own), scores


def write_onnx(detector: TorchvisionDetector, canvas: tuple[int, int], path: Path) -> None:
    """Export a detector in evaluation mode, for any number of pages at a time."""
    model = ExportedDetector(detector, canvas).eval()
    pages, height, width = 2, *canvas
    example = (
        torch.zeros(pages, 3, height, width),
        torch.tensor([[width, height]] * pages),
        torch.tensor([[height, width]] * pages),
    )
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        custom_translation_table={
            torch.ops.graphkd.suppress.default: _suppression,
            torch.ops.aten.sort.stable: _stable_sort,
        },
        external_data=False,
        optimize=False,  # takes minutes for graphs of this kind; onnxruntime does it when it loads them
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    _finish(path)


def _finish(path: Path) -> None:
    onnx = import_module("onnx")
    model = onnx.load(path)
    _make_optional(model.graph, "page_sizes")
    _drop_zero_biases(model.graph)
    _drop_scalar_shapes(model.graph)
    onnx.save(model, path)


def _make_optional(graph: Any, name: str) -> None:
    """Give an input of sizes the default 0, for callers that do not know it."""
    given = next(each for each in graph.input if each.name == name)
    given.type.tensor_type.shape.dim[0].dim_param = "batch_or_1"
    del graph.value_info[:]  # shapes that hold for a whole batch of sizes only; onnxruntime infers its own
    default = np.zeros((1, 2), dtype=np.int64)
    graph.initializer.append(import_module("onnx").numpy_helper.from_array(default, name))


def _drop_zero_biases(graph: Any) -> None:
    """Leave out biases of convolutions that torch's exporter fills with zeros: 8-bit ones are not fused with them."""
    filled = {node.output[0] for node in graph.node if node.op_type == "Expand"}
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[2] in filled:
            del node.input[2]


def _drop_scalar_shapes(graph: Any) -> None:
    """Leave out expansions to no dimensions, which torch's exporter makes of scalars and OpenVINO refuses."""
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        source = made.get(node.input[1]) if node.op_type == "Expand" else None
        while source is not None and source.op_type == "Cast":
            source = made.get(source.input[0])
        if source is not None and source.op_type == "Constant" and _is_empty(source.attribute[0]):
            node.op_type = "Identity"
            del node.input[1]


def _is_empty(attribute: Any) -> bool:
    """Whether a constant has no elements."""
    if attribute.name == "value_ints":
        return not attribute.ints
    return attribute.name == "value" and 0 in attribute.t.dims


def _suppression(boxes: Any, valid: Any, iou: float) -> Any:
    """ONNX's NonMaxSuppression in place of our operator; boxes are scored by their place in the list."""
    op: Any = import_module("onnxscript").opset18
    int64, float32, boolean = 7, 1, 9  # types in ONNX
    one, zero = op.Constant(value_int=1), op.Constant(value_int=0)
    count = op.Shape(boxes, start=1, end=2)
    rank = op.Cast(op.Range(op.Squeeze(count), zero, op.Constant(value_int=-1)), to=float32)
    scores = op.Unsqueeze(op.Where(valid, rank, op.Constant(value_float=-1.0)), op.Constant(value_ints=[1]))
    limits = op.Constant(value_floats=[iou]), op.Constant(value_floats=[0.0])
    chosen = op.NonMaxSuppression(boxes, scores, count, *limits)
    places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    none = op.Mul(op.Cast(valid, to=int64), zero)
    kept = op.ScatterND(none, places, op.Expand(one, op.Shape(places, start=0, end=1)))
    return op.Cast(kept, to=boolean)


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """ONNX's TopK, which takes the first of equal values first."""
    op: Any = import_module("onnxscript").opset18
    count = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)
