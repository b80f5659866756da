"""Cost of checking each image's digest, relative to loading the page: ``python -m benchmarks.digest_cost``.

Pages of 1240 x 1754 px (A4 at 150 dpi) in JPEG, read from the page cache, decoded and rendered in one process.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from benchmarks.common import finish, interleaved, ratio
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import EVALUATION_VIEW, AugmentationConfig
from pipeline.data.loading.loader import PageDataset
from pipeline.data.loading.order import SampleRef
from pipeline.data.prepare.pack import pack
from pipeline.synth import write_pages

PAGES, PAIRS, SIZE = 24, 9, (1240, 1754)


def main() -> None:
    """Print the table and the JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        pages = PageDataset(_packed(Path(folder)), AugmentationConfig(), seed=0, views=EVALUATION_VIEW)
        refs = [SampleRef(0, number) for number in range(PAGES)]

        def unchecked() -> None:
            with patch("pipeline.data.format.dataset._is_packed", lambda content, sample: True):
                pages.__getitems__(refs)

        checked, plain = interleaved(PAIRS, lambda: pages.__getitems__(refs), unchecked)
    cost = ratio(checked, plain)
    print(f"{PAGES} pages: {statistics.median(checked):.3f} s checked, {statistics.median(plain):.3f} s unchecked")
    print(f"checked / unchecked: {cost['median']:.4f} ({cost['low']:.4f} to {cost['high']:.4f}), {PAIRS} pairs")
    finish({"benchmark": "digest_cost", "ratio": cost})


def _packed(folder: Path) -> PackedDataset:
    path = write_pages(folder / "pages", count=PAGES, seed=0, width=SIZE[0], height=SIZE[1])
    coco = json.loads(path.read_text())
    for image in coco["images"]:
        source = path.parent / "images" / image["file_name"]
        image["file_name"] = f"{source.stem}.jpg"
        Image.open(source).convert("RGB").save(source.with_suffix(".jpg"), quality=90)
    path.write_text(json.dumps(coco))
    pack(path, path.parent / "images", folder / "packed")
    return PackedDataset(folder / "packed")


if __name__ == "__main__":
    main()
