"""Smaller ONNX models: half precision, and 8-bit convolutions calibrated on pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError
from pipeline.predict.bundle import model_inputs

HEADS = (".rpn.", ".head.", ".roi_heads.")  # in the names of weights that stay in float
FLOAT_OPERATORS = [
    *("NonMaxSuppression", "TopK", "RoiAlign", "ScatterND", "Range", "Floor", "Log", "Exp", "Sqrt"),
    *("CastLike", "Where"),  # whose inputs would be of two types
]


def half(source: Path, target: Path) -> None:
    """Convert weights and most operators to fp16; inputs and outputs stay."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, *FLOAT_OPERATORS]
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked), target)


def int8(
    source: Path, target: Path, pages: list[tuple[NDArray[np.uint8], NDArray[np.int64]]], reduce_range: bool
) -> None:
    """Quantise the convolutions of backbone and pyramid to 8 bits, statically, with QDQ nodes.

    Args:
        source: fp32 model.
        target: where the quantised one goes.
        pages: canvases uint8 [3, H, W] and the pages' sizes [2] on them, on which activations are measured.
        reduce_range: 7-bit weights; without them sums saturate on CPUs that lack VNNI.

    Raises:
        DataError: without pages.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not pages:
        raise DataError("int8 needs pages to measure activations on; give --data DATASET")
    folded = target.with_name("folded.onnx")
    # Folds normalisation into convolutions; shapes are not inferred, since they are dynamic.
    quant_pre_process(source, folded, skip_onnx_shape=True, skip_symbolic_shape=True)
    heads = [
        node.name
        for node in onnx.load(folded, load_external_data=False).graph.node
        if node.op_type == "Conv" and any(word in node.input[1] for word in HEADS)
    ]
    quantize_static(
        folded,
        target,
        _Pages(pages),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=heads,
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    folded.unlink()


class _Pages:
    """Feeds calibration pages to onnxruntime, which calls ``get_next`` until it returns None."""

    def __init__(self, pages: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> None:
        self._pages: Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]] = iter(pages)

    def get_next(self) -> dict[str, Any] | None:
        """Inputs of the next page."""
        page = next(self._pages, None)
        return None if page is None else model_inputs(page[0][None], page[1][None])

    def set_range(self, start_index: int, end_index: int) -> None:
        """Called by onnxruntime for strided calibration, which is not used."""
