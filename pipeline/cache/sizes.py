"""Size of a cache by form and number of nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from graphkd.detectors import DetectorSpec
from pipeline.cache.format import NodeStore, cache_schema
from pipeline.cache.quantize import Precision
from pipeline.cache.writer import record_batch

NODE_COUNTS = (16, 32, 64, 128, 256)
FORMS: tuple[tuple[NodeStore, Precision], ...] = (
    ("pooled", "fp32"),
    ("pooled", "fp16"),
    ("pooled", "int8"),
    ("descriptors", "fp16"),
)


@dataclass(frozen=True, slots=True)
class Size:
    """Size of one form of cache."""

    store: str
    precision: str
    nodes: int
    page_bytes: int
    """Of a page with that many nodes."""
    total_bytes: int


def row_bytes(spec: DetectorSpec, store: NodeStore, precision: Precision, nodes: float) -> int:
    """Bytes of an uncompressed page with ``nodes`` nodes, interpolated between whole numbers of nodes."""
    low = int(nodes)
    below, above = (_message_bytes(spec, store, precision, count) for count in (low, low + 1))
    return round(below + (above - below) * (nodes - low))


def _message_bytes(spec: DetectorSpec, store: NodeStore, precision: Precision, nodes: int) -> int:
    side = 2 if store == "descriptors" else spec.pooled_side**2
    heads = spec.num_classes if spec.classifies_regions else 0
    floats = {"affine": 4, "boxes": 4 * nodes, "scores": nodes, "classes": nodes}
    floats |= {"logits": (heads + bool(heads)) * nodes, "deltas": 4 * heads * nodes}
    floats |= {"pooled": nodes * spec.channels * side, "pooled_scale": spec.channels if precision == "int8" else 0}
    row: dict[str, Any] = {name: np.zeros(count, dtype=np.float32) for name, count in floats.items()}
    batch = record_batch({"sample": 0, "view": 0} | row, cache_schema(precision))
    return int(pa.ipc.get_record_batch_size(batch))


def cache_sizes(spec: DetectorSpec, rows: int, nodes: int) -> list[Size]:
    """Sizes of all forms at common node counts and ``nodes``, if every page has that many."""
    counts = sorted({*NODE_COUNTS, nodes})
    pages = [(*form, count, row_bytes(spec, *form, count)) for form in FORMS for count in counts]
    return [Size(store, precision, count, page, page * rows) for store, precision, count, page in pages]
