"""What is sampled of each page, and that it depends on the page alone."""

from __future__ import annotations

import torch
from torch import Tensor

from graphkd.detectors.sampling import SeededSampler

LABELS = torch.tensor([1.0, 0, -1, 0, 0, 1, 0, 2, 0, -1, 0, 0])
SAMPLER = SeededSampler(size=6, positive_fraction=0.5, salt=1)


def chosen(labels: Tensor, seed: int) -> tuple[list[int], list[int]]:
    sampled = SAMPLER.sample(labels[None], [seed])
    return sampled.indices[sampled.positive].tolist(), sampled.indices[sampled.negative].tolist()


def test_samples_are_different_entries_of_their_kind() -> None:
    for seed in range(20):
        positives, negatives = chosen(LABELS, seed)
        assert sorted(positives) == [0, 5, 7]
        assert len(set(negatives)) == 3 and all(LABELS[negatives] == 0)


def test_every_entry_is_as_likely_as_another() -> None:
    labels = torch.zeros(5000)
    drawn = torch.cat([torch.tensor(chosen(labels, seed)[1]) for seed in range(2000)])
    assert len(drawn) == 12000
    tenths = torch.histc(drawn.float(), bins=10, min=0, max=5000)
    assert ((tenths - 1200).abs() < 5 * 1200**0.5).all()


def test_missing_positives_are_made_up_for_by_negatives_and_missing_negatives_by_nothing() -> None:
    assert [len(part) for part in chosen(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), 3)] == [1, 5]
    assert [len(part) for part in chosen(torch.tensor([1.0, 1, 1, 1, 0, -1]), 3)] == [3, 1]
    assert [len(part) for part in chosen(torch.tensor([-1.0, -1]), 3)] == [0, 0]


def test_a_page_samples_the_same_in_any_batch() -> None:
    other = torch.zeros(12)
    SAMPLER.seeds = [5, 9]
    beside = SAMPLER([LABELS, other[:7]])
    SAMPLER.seeds = [5]
    alone = SAMPLER([LABELS])
    for kind, mask in enumerate(alone):
        assert torch.equal(beside[kind][0], mask[0])
        assert sorted(mask[0].nonzero()[:, 0].tolist()) == sorted(chosen(LABELS, 5)[kind])
    assert chosen(torch.zeros(5000), 5) != chosen(torch.zeros(5000), 6)
