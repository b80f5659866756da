"""Dsig and PKD: by hand, against naive loops, degenerate pages, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphkd.method import DsigWeights, PkdWeights, dsig_loss, pkd_loss
from graphkd.method.baselines import hard_background, map_loss
from graphkd.method.edges import cosine_lengths
from graphkd.signals import TeacherSignals
from tests.support.toy import B, C, K, N, student_side, teacher_signals

pytestmark = pytest.mark.method


def foreground_of(signals: TeacherSignals) -> Tensor:
    return (torch.arange(N) % 3 > 0).expand(B, N) & signals.valid


def maps(seed: int, channels: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = {"0": (8, 6), "1": (4, 3)}
    return {name: torch.randn(B, channels, *side, generator=generator) for name, side in sides.items()}


def test_cosine_lengths_by_hand() -> None:
    lengths = cosine_lengths(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]]))[0]
    expected = torch.tensor([[0.0, 1, 2, 1], [1, 0, 1, 1], [2, 1, 0, 1], [1, 1, 1, 0]])
    torch.testing.assert_close(lengths, expected)


def test_dsig_by_hand() -> None:
    # Two foreground nodes of one channel and position: errors 1 and 9, cosine 1 for the teacher and -1 for the student.
    one = torch.ones(1, 2, 1, 1, 1)
    signals = TeacherSignals(
        boxes=torch.zeros(1, 2, 4),
        valid=torch.ones(1, 2, dtype=torch.bool),
        scores=torch.ones(1, 2),
        classes=torch.zeros(1, 2, dtype=torch.long),
        logits=None,
        deltas=None,
        pooled=one,
    )
    student = torch.tensor([2.0, -2.0]).view(1, 2, 1, 1, 1)
    terms = dsig_loss(student, None, signals, signals.valid, 2.0, DsigWeights())
    assert float(terms["kd_node"]) == pytest.approx(0.5 * (1 + 9) / 2 / 2)
    assert float(terms["kd_edge"]) == pytest.approx(2.0 * 0.5 * (0 + 4 + 4 + 0) / 4)


def test_background_is_mined_by_the_teachers_cross_entropy() -> None:
    signals = teacher_signals()
    assert signals.logits is not None
    logits = torch.zeros_like(signals.logits)
    logits[..., -1] = 3.0  # p(background) = e^3 / (e^3 + 3), cross-entropy .14
    logits[0, 1, 0] = 5.0  # surprised: cross-entropy above 2
    mined = hard_background(replace(signals, logits=logits), torch.zeros_like(signals.valid), 0.6)
    assert mined.nonzero().tolist() == [[0, 1]]
    scores = torch.tensor([0.5, 0.4] + [0.0] * (N - 2)).expand(B, N)  # -log .5 = .69, -log .6 = .51
    mined = hard_background(replace(signals, logits=None, scores=scores), torch.zeros_like(signals.valid), 0.6)
    assert mined.nonzero().tolist() == [[0, 0], [1, 0]]


def kl_of(teacher: Tensor, student: Tensor) -> Tensor:
    """The parts of KL(teacher || student) from logits [K + 1]."""
    return teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))


def test_dsig_equals_the_naive_loop() -> None:
    signals, (pooled, regions) = teacher_signals(), student_side()
    foreground, mean_square = foreground_of(signals), 1.7
    assert signals.logits is not None
    assert signals.deltas is not None
    node, edge, logits, boxes = [], [], [], []
    for b in range(B):
        front = [i for i in range(N) if foreground[b, i]]
        hard = [
            i
            for i in range(N)
            if signals.valid[b, i] and i not in front and float(-signals.logits[b, i].log_softmax(0)[K]) >= 0.6
        ]
        error = [(pooled[b, i] - signals.pooled[b, i]).square().mean() / mean_square for i in range(N)]
        rest = [i for i in range(N) if signals.valid[b, i] and i not in front]
        back = torch.stack([error[i] for i in rest]).mean() if rest else torch.tensor(0.0)
        share = len(front) / (7.5 * len(rest) + 1e-4)
        node.append(0.5 * torch.stack([error[i] for i in front]).mean() + 0.5 * share * back)
        gaps = [
            (
                torch.cosine_similarity(pooled[b, i].flatten(), pooled[b, j].flatten(), dim=0)
                - torch.cosine_similarity(signals.pooled[b, i].flatten(), signals.pooled[b, j].flatten(), dim=0)
            ).square()
            for i in front + hard
            for j in front + hard
        ]
        edge.append(2 * 0.5 * torch.stack(gaps).mean())
        known = [i for i in range(N) if signals.valid[b, i]]
        kl = [kl_of(signals.logits[b, i], regions.logits[b, i]).sum() / (K + 1) for i in known]
        logits.append(3 * torch.stack(kl).mean())
        apart = (regions.deltas[b] - signals.deltas[b]) * torch.tensor([10.0, 10.0, 5.0, 5.0])
        l1 = [apart[i, int(signals.classes[b, i])].abs().sum() for i in front]
        boxes.append(torch.stack(l1).sum() / len(known))
    terms = dsig_loss(pooled, regions, signals, foreground, mean_square, DsigWeights())
    torch.testing.assert_close(terms["kd_node"], torch.stack(node))
    torch.testing.assert_close(terms["kd_edge"], torch.stack(edge))
    torch.testing.assert_close(terms["kd_logits"], torch.stack(logits))
    torch.testing.assert_close(terms["kd_boxes"], torch.stack(boxes))
    assert set(terms) == {"kd_node", "kd_edge", "kd_logits", "kd_boxes"}


def test_pkd_by_hand() -> None:
    teacher = {"0": torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)}
    student = {"0": torch.tensor([-3.0, 5.0]).view(1, 1, 1, 2)}  # standardised: -1, 1
    assert float(pkd_loss(student, teacher, PkdWeights())["kd_maps"]) == pytest.approx(6 * 4 / 2, rel=1e-4)


def test_pkd_equals_the_naive_loop() -> None:
    student, teacher = maps(0), maps(1)
    expected = []
    for b in range(B):
        total = torch.tensor(0.0)
        for name in teacher:
            errors = []
            for c in range(3):
                s, t = student[name][b, c], teacher[name][b, c]
                s, t = (s - s.mean()) / s.std(unbiased=False), (t - t.mean()) / t.std(unbiased=False)
                errors.append((s - t).square().mean())
            total = total + torch.stack(errors).mean() / 2
        expected.append(6 * total)
    actual = pkd_loss(student, teacher, PkdWeights())["kd_maps"]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_pkd_is_one_minus_the_pearson_correlation() -> None:
    student, teacher = maps(0), maps(1)
    one = {"0": student["0"]}, {"0": teacher["0"]}
    flat = [side["0"].flatten(2) for side in one]
    centred = [side - side.mean(-1, keepdim=True) for side in flat]
    correlation = torch.cosine_similarity(*centred, dim=-1).mean(dim=1)
    torch.testing.assert_close(pkd_loss(*one, PkdWeights(maps=1.0))["kd_maps"], 1 - correlation, atol=1e-4, rtol=1e-4)


def test_a_page_does_not_depend_on_its_batch_neighbours() -> None:
    student, teacher = maps(0), maps(1)
    first = {name: value[:1] for name, value in student.items()}, {name: value[:1] for name, value in teacher.items()}
    whole, alone = pkd_loss(student, teacher, PkdWeights()), pkd_loss(*first, PkdWeights())
    torch.testing.assert_close(whole["kd_maps"][:1], alone["kd_maps"])


def test_map_loss_by_hand() -> None:
    zeros = {"0": torch.zeros(1, 2, 2, 2), "1": torch.zeros(1, 2, 1, 1)}
    ones = {"0": torch.ones(1, 2, 2, 2), "1": torch.full((1, 2, 1, 1), 3.0)}
    assert float(map_loss(zeros, ones, mean_square=2.0)) == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize("nodes", [(0, 0), (1, 0), (2, 1)])
def test_degenerate_pages_give_finite_values_and_gradients(nodes: tuple[int, ...]) -> None:
    signals, (pooled, regions) = teacher_signals(nodes), student_side()
    terms = dsig_loss(pooled, regions, signals, foreground_of(signals), 1.0, DsigWeights())
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(values).all() for values in terms.values())
    for leaf in (pooled, regions.logits, regions.deltas):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


def test_a_constant_map_gives_a_finite_gradient() -> None:
    student = {"0": torch.zeros(1, 2, 3, 3, requires_grad=True)}
    pkd_loss(student, {"0": torch.ones(1, 2, 3, 3)}, PkdWeights())["kd_maps"].sum().backward()
    assert student["0"].grad is not None and torch.isfinite(student["0"].grad).all()


def test_what_does_not_fit_names_both_sides() -> None:
    signals, (pooled, _) = teacher_signals(), student_side()
    with pytest.raises(ValueError, match=r"student nodes \(2, 7, 6, 3, 3\) and teacher nodes \(2, 9, 6, 3, 3\)"):
        dsig_loss(pooled[:, :7], None, signals, signals.valid, 1.0, DsigWeights())
    with pytest.raises(ValueError, match=r"student maps .*\(2, 4, 8, 6\).* and teacher maps .*\(2, 3, 8, 6\)"):
        pkd_loss(maps(0, channels=4), maps(1), PkdWeights())


def test_maps_are_compared_on_the_levels_that_both_pyramids_have() -> None:
    """A DETR has strides 8 to 32, a Faster R-CNN 4 to 64; their names of levels differ."""
    fine, coarse, top = (torch.randn(1, 4, side, side) for side in (8, 4, 2))
    student, teacher = {"0": fine, "1": coarse, "pool": top}, {"0": coarse + 1, "1": top}
    torch.testing.assert_close(map_loss(student, teacher, mean_square=0.5), torch.tensor([2.0]))
    assert float(pkd_loss(student, teacher, PkdWeights())["kd_maps"]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no level in common; give both the same canvas"):
        map_loss({"0": fine}, {"0": coarse}, mean_square=1.0)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    signals, (pooled, regions) = teacher_signals(), student_side()
    weights = DsigWeights(edge=0, boxes=0)
    assert set(dsig_loss(pooled, regions, signals, signals.valid, 1.0, weights)) == {"kd_node", "kd_logits"}


def test_equal_networks_lose_nothing() -> None:
    signals = teacher_signals()
    terms = dsig_loss(signals.pooled, None, signals, foreground_of(signals), 1.0, DsigWeights())
    terms |= pkd_loss(maps(1), maps(1), PkdWeights())
    for values in terms.values():
        torch.testing.assert_close(values, torch.zeros(B), atol=1e-6, rtol=0)
    assert signals.pooled.shape[2] == C


def test_no_gradient_reaches_the_teacher() -> None:
    plain, (pooled, regions) = teacher_signals(), student_side()
    teacher = {name: getattr(plain, name).clone().requires_grad_() for name in ("pooled", "logits", "deltas")}
    whole = {name: value.requires_grad_() for name, value in maps(1).items()}
    student = {name: value.requires_grad_() for name, value in maps(0).items()}
    terms = dsig_loss(pooled, regions, replace(plain, **teacher), foreground_of(plain), 1.0, DsigWeights())
    terms |= {"maps": map_loss(student, whole, 1.0), **pkd_loss(student, whole, PkdWeights())}
    torch.stack(list(terms.values())).sum().backward()
    assert all(value.grad is None for value in [*teacher.values(), *whole.values()])
    assert all(value.grad is not None for value in [pooled, *student.values()])
