"""The order of samples: a permutation each epoch, the same for every topology."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import CanonicalOrder, batch_positions, permuted, sample_seed, share

pytestmark = pytest.mark.ledger

shards = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(tuple)


@given(shards, st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_each_sample_comes_exactly_once_per_epoch(sizes: tuple[int, ...], seed: int, epoch: int) -> None:
    order = CanonicalOrder(sizes, seed)
    total = sum(sizes)
    seen = [order.at(position) for position in range(epoch * total, (epoch + 1) * total)]
    assert {ref.epoch for ref in seen} == {epoch}
    assert sorted(ref.sample for ref in seen) == list(range(total))


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_the_keyed_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


@given(st.integers(1, 16), st.integers(1, 64), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_ranks_cover_each_global_batch_exactly(ranks: int, batch: int, step: int) -> None:
    positions = [place for rank in range(ranks) for place in batch_positions(step, batch, rank, ranks)]
    assert positions == list(range(step * batch, (step + 1) * batch))


def test_unequal_shares_differ_by_one_at_most() -> None:
    assert sorted(len(share(8, part, 3)) for part in range(3)) == [2, 3, 3]


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = CanonicalOrder((50, 50, 50), seed)
        return [order.at(position).sample for position in range(number * 150, (number + 1) * 150)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_neighbours_end_up_apart_and_batches_mix_shards() -> None:
    order = CanonicalOrder((100,) * 16, seed=3)
    samples = [order.at(position).sample for position in range(1600)]
    place = {sample: number for number, sample in enumerate(samples)}
    apart = sorted(abs(place[sample] - place[sample + 1]) for sample in range(1599) if (sample + 1) % 100)
    assert apart[len(apart) // 2] > 100  # a full shuffle of 1600 gives about 470, one of a window of 800 about 230
    mixed = [len(Counter(sample // 100 for sample in samples[start : start + 8])) for start in range(0, 1600, 8)]
    assert sum(mixed) / len(mixed) > 4


def test_sample_seeds_are_distinct() -> None:
    seeds = {sample_seed(0, epoch, sample) for epoch in range(20) for sample in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**62 for seed in seeds)
