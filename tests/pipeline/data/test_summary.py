"""Notes on regions that training or evaluation does not use as annotated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphkd.nodes import NodePolicy
from pipeline.data.format.dataset import PackedDataset
from pipeline.data.loading.augmentation import AugmentationConfig
from pipeline.data.loading.region_counts import count_regions, describe_losses
from pipeline.data.prepare.pack import pack
from pipeline.data.summary import DEFAULT_NODES, summarize
from tests.support.pages import write_coco


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pages with a crowd, two regions below a pixel and one that was clipped."""
    folder = write_coco(tmp_path_factory.mktemp("lossy") / "pages", 6)
    path = folder / "annotations.json"
    coco = json.loads(path.read_text())
    coco["annotations"][0]["iscrowd"] = 1
    for region in coco["annotations"][1:3]:
        region["bbox"] = [10.0, 20.0, 60.0, 0.05]
    coco["annotations"][3]["bbox"] = [60.0, 20.0, 60.0, 10.0]
    path.write_text(json.dumps(coco))
    pack(path, folder / "images", folder / "packed", samples_per_shard=4, repair=True)
    return folder / "packed"


def test_losses_are_counted_by_class_and_said(lossy: Path) -> None:
    content = summarize(lossy)
    assert content["classes"]["Title"] == {"id": 9, "text": True, "regions": 6, "crowd": 1, "thin": 0}
    assert content["classes"]["Text"]["thin"] + content["classes"]["Picture"]["thin"] == 2
    assert content["most_regions"] == 4
    crowd, thin, clipped = content["notes"]
    assert crowd == "1 of 24 regions are crowd, no targets (Title 1)"
    assert thin == "2 regions below 1 px on the canvas are widened to 1 px (Text 1, Picture 1)"
    assert clipped == "packing clipped 1 regions"


def test_pages_with_more_regions_than_nodes_and_detections_are_said(lossy: Path) -> None:
    counts = count_regions(PackedDataset(lossy), AugmentationConfig())
    notes = describe_losses(counts, nodes=3, detections=4, limit=3)
    assert notes[2].startswith("5 of 6 pages have more regions than 3 nodes (teacher.nodes.count)")
    assert notes[3].startswith("5 of 6 pages have more regions than 3 detections that AP counts")
    assert len(notes) == 4


def test_the_default_number_of_nodes_is_that_of_the_policy() -> None:
    assert NodePolicy().count == DEFAULT_NODES


def test_some_shards_stand_for_all(lossy: Path) -> None:
    assert count_regions(PackedDataset(lossy), AugmentationConfig(), max_shards=1).pages == 4
