"""Both architectures pass the same tests, so that the interface is not shaped by one model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphkd.batch import PageBatch, Targets
from graphkd.detectors import Detector, DetectorConfig, DetectorModule, build_detector
from tests.support.runs import SMALL_DETECTOR

CANVAS = (128, 96)
CLASSES = 4
SMALL = {**SMALL_DETECTOR, "score_threshold": 0.0}


DETR = {
    "framework": "transformers",
    "fpn_channels": 32,
    "settings": {"decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 30},
}
KINDS = {
    "faster_rcnn": {},
    "retinanet": {"architecture": "retinanet"},
    "detectron2": {"framework": "detectron2"},
    "detectron2-retinanet": {"framework": "detectron2", "architecture": "retinanet"},
    "detectron2-timm": {"framework": "detectron2", "backbone": "mobilenetv2_050"},
    **{f"transformers-{name}": {**DETR, "architecture": name} for name in ("rt_detr", "rt_detr_v2", "d_fine")},
}
MARKS = {"detectron2": pytest.mark.detectron2, "transformers": pytest.mark.transformers}


@pytest.fixture(params=[pytest.param(kind, marks=MARKS.get(kind.partition("-")[0], ())) for kind in KINDS])
def detector(request: pytest.FixtureRequest) -> DetectorModule:
    torch.manual_seed(0)
    return build_detector(DetectorConfig(**{**SMALL, **KINDS[request.param]}), CLASSES, CANVAS)


def pages(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, *CANVAS), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([(128, 96), (100, 96), (128, 60)][:count])


def targets() -> Targets:
    return Targets.from_lists(
        [
            torch.tensor([[10.0, 10.0, 60.0, 30.0], [5.0, 50.0, 80.0, 120.0]]),
            torch.tensor([[20.0, 20.0, 50.0, 70.0]]),
            torch.zeros(0, 4),
        ],
        [torch.tensor([0, 3]), torch.tensor([1]), torch.zeros(0, dtype=torch.int64)],
        [11, 12, 13],
    )


def page_targets(page: int) -> Targets:
    """Of one page, without padding."""
    every = targets()
    boxes, classes = every.by_page()[page]
    return Targets.from_lists([boxes], [classes], [int(every.seeds[page])])


def test_is_a_detector(detector: DetectorModule) -> None:
    assert isinstance(detector, Detector)
    assert detector.spec.num_classes == CLASSES


def test_one_backbone_pass_a_step(detector: DetectorModule) -> None:
    passes: list[int] = []
    detector.compilable_modules()[0].register_forward_hook(lambda *_: passes.append(1))
    features = detector.features(*pages())
    detector.propose_and_losses(features, targets())
    detector.classify(detector.pool(features, targets().boxes))
    detector.detect(features)
    assert len(passes) == 1


def test_losses_are_one_finite_value_a_page_with_gradients(detector: DetectorModule) -> None:
    _, losses = detector.propose_and_losses(detector.features(*pages()), targets())
    assert all(values.shape == (3,) and torch.isfinite(values).all() for values in losses.values())
    sum(values.sum() for values in losses.values()).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in detector.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_losses_do_not_depend_on_batch_neighbours(detector: DetectorModule) -> None:
    images, sizes = pages()
    _, together = detector.propose_and_losses(detector.features(images, sizes), targets())
    for page in range(3):
        _, alone = detector.propose_and_losses(
            detector.features(images[page : page + 1], sizes[page : page + 1]), page_targets(page)
        )
        for name, values in together.items():
            torch.testing.assert_close(values[page], alone[name][0], rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_batch_neighbours(detector: DetectorModule) -> None:
    images, sizes = pages()
    boxes = targets().boxes
    together = detector.pool(detector.features(images, sizes), boxes)
    alone = detector.pool(detector.features(images[:1], sizes[:1]), boxes[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_what_lies_beyond_the_page_does_not_count(detector: DetectorModule) -> None:
    images, sizes = pages()
    other = images.clone()
    other[1, :, 100:] = 255
    first, second = (detector.features(content, sizes).maps["0"] for content in (images, other))
    assert torch.equal(first, second)


def test_sampling_is_seeded_by_the_page(detector: DetectorModule) -> None:
    features = detector.features(*pages())
    torch.manual_seed(1)
    _, first = detector.propose_and_losses(features, targets())
    torch.manual_seed(2)
    _, second = detector.propose_and_losses(features, targets())
    changed = replace(targets(), seeds=torch.tensor([21, 22, 23]))
    _, third = detector.propose_and_losses(features, changed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # RetinaNet uses every anchor, so there the seed changes nothing.
    assert all(torch.equal(first[name], third[name]) for name in first) == (detector.spec.activation == "sigmoid")


def test_outputs_are_canonical(detector: DetectorModule) -> None:
    detector.eval()
    features = detector.features(*pages())
    pooled = detector.pool(features, targets().boxes)
    assert pooled.shape == (3, 16, detector.spec.channels, 7, 7)
    regions = detector.classify(pooled)
    assert (regions is not None) == detector.spec.classifies_regions
    if regions is not None:
        assert regions.logits.shape == (3, 16, CLASSES + 1)
        assert regions.deltas.shape == (3, 16, CLASSES, 4)
    for found, (height, width) in zip(detector.detect(features), pages()[1].tolist(), strict=True):
        assert found.classes.numel() == 0 or (int(found.classes.min()) >= 0 and int(found.classes.max()) < CLASSES)
        assert (found.boxes[:, [0, 2]] <= width).all() and (found.boxes[:, [1, 3]] <= height).all()
        assert (found.scores.diff() <= 0).all()


def test_proposals_stay_on_the_page_best_first(detector: DetectorModule) -> None:
    proposals = detector.eval().propose(detector.features(*pages()))
    for page, (height, width) in enumerate(pages()[1].tolist()):
        boxes, scores, valid = proposals.boxes[page], proposals.scores[page], proposals.valid[page]
        count = int(valid.sum())
        assert count > 0 and valid[:count].all() and not boxes[count:].any() and not scores[count:].any()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (scores.diff() <= 0).all()


@pytest.mark.e2e
def test_learns_one_page(detector: DetectorModule) -> None:
    images, sizes = pages(1)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    history = []
    for _ in range(24):
        _, losses = detector.propose_and_losses(detector.features(images, sizes), page_targets(0))
        loss = torch.stack([values.sum() for values in losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.8 * history[0]


def test_background_is_last_and_deltas_have_unit_weights() -> None:
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig(**SMALL), CLASSES, CANVAS)
    heads = detector.model.roi_heads  # type: ignore[union-attr]
    pooled = torch.randn(2, 16, 7, 7)
    logits, deltas = heads.box_predictor(heads.box_head(pooled))  # type: ignore[operator, union-attr]
    regions = detector.classify(pooled)
    assert regions is not None
    assert torch.equal(regions.logits[:, -1], logits[:, 0])
    assert torch.equal(regions.logits[:, 2], logits[:, 3])
    expected = deltas.view(2, CLASSES + 1, 4)[:, 3] / torch.tensor([10.0, 10.0, 5.0, 5.0])
    torch.testing.assert_close(regions.deltas[:, 2], expected)


def test_batches_split_into_targets() -> None:
    batch = PageBatch(
        images=torch.zeros(2, 3, *CANVAS, dtype=torch.uint8),
        sizes=torch.tensor([[128, 96], [100, 90]]),
        boxes=torch.arange(12.0).view(3, 4),
        classes=torch.tensor([2, 0, 1]),
        counts=torch.tensor([1, 2]),
        samples=torch.tensor([4, 5]),
        seeds=torch.tensor([7, 8]),
        view_index=torch.tensor([0, 0]),
        affine=torch.ones(2, 4),
        replaced_sample=torch.full((2,), -1),
    )
    split = batch.targets()
    assert [(boxes.tolist(), classes.tolist()) for boxes, classes in split.by_page()] == [
        ([[0.0, 1, 2, 3]], [2]),
        ([[4.0, 5, 6, 7], [8, 9, 10, 11]], [0, 1]),
    ]
    assert split.boxes.shape == (2, 16, 4) and split.seeds.tolist() == [7, 8]
