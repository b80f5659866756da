"""What is sampled of each page, and that it depends on the page alone."""

from __future__ import annotations

import torch
from torch import Tensor

from graphkd.detectors.sampling import VERSION, SeededSampler

LABELS = torch.tensor([1.0, 0, -1, 0, 0, 1, 0, 2, 0, -1, 0, 0])
SAMPLER = SeededSampler(size=6, positive_fraction=0.5, salt=1)


def chosen(labels: Tensor, seed: int) -> tuple[list[int], list[int]]:
    sampled = SAMPLER.sample(labels[None], torch.tensor([seed]))
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
    beside, alone = (
        SAMPLER.sample(labels, torch.tensor(seeds))
        for labels, seeds in ((torch.stack([LABELS, other]), [5, 9]), (LABELS[None], [5]))
    )
    assert torch.equal(beside.indices[:1], alone.indices) and torch.equal(beside.positive[:1], alone.positive)
    padded = SAMPLER.sample(torch.nn.functional.pad(LABELS[None], (0, 50), value=-1), torch.tensor([5]))
    assert torch.equal(padded.indices, alone.indices), "entries that are ignored change nothing"
    assert chosen(torch.zeros(5000), 5) != chosen(torch.zeros(5000), 6)


def test_seeds_of_64_bits_and_salts_draw_differently() -> None:
    labels = torch.zeros(1, 5000)
    draws = {
        tuple(SeededSampler(64, 0.5, salt).sample(labels, torch.tensor([seed])).indices[0].tolist())
        for salt in (0, 1)
        for seed in (0, 1, 2, 1 << 32, (1 << 32) + 1, (1 << 62) + 5)
    }
    assert len(draws) == 12
    first, second = ({*draw} for draw in list(draws)[:2])
    assert len(first & second) < 8, "samples of two seeds share few entries"


def test_what_is_drawn_does_not_change_between_releases() -> None:
    """Runs continue across releases; change VERSION with this."""
    assert VERSION == 2
    sampled = SeededSampler(4, 0.5, salt=1).sample(torch.zeros(1, 1000), torch.tensor([7]))
    assert sampled.indices[0].tolist() == [195, 940, 696, 430]
