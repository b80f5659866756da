"""The order of samples: a permutation each epoch, the same for every topology."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphkd.errors import ConfigError
from pipeline.data.loading.order import (
    CanonicalOrder,
    batch_positions,
    check_batch_size,
    sample_seed,
    split_range,
)
from pipeline.data.loading.rng import feistel_permute, random_uint64, random_uniform

pytestmark = pytest.mark.ledger

shards = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.lists(st.integers(1, 1200), min_size=1, max_size=3),
    st.lists(st.just(1), min_size=1, max_size=300),
).map(tuple)
batches = st.integers(1, 48)


def read(order: CanonicalOrder, epoch: int) -> list[int]:
    first = epoch * order.samples
    return [ref.sample for ref in order.refs(range(first, first + order.samples))]


@given(shards, batches, st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_each_sample_comes_exactly_once_per_epoch(sizes: tuple[int, ...], batch: int, seed: int, epoch: int) -> None:
    assert sorted(read(CanonicalOrder(sizes, seed, batch), epoch)) == list(range(sum(sizes)))


@given(shards, batches, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_position_does_not_depend_on_earlier_reads(sizes: tuple[int, ...], batch: int, seed: int) -> None:
    total = sum(sizes)
    positions = range(max(0, total - 7), total + 7)  # straddles two epochs
    together = CanonicalOrder(sizes, seed, batch).refs(positions)
    assert together == [CanonicalOrder(sizes, seed, batch).at(position) for position in positions]
    assert [ref.epoch for ref in together] == [position // total for position in positions]


@given(
    shards,
    batches,
    st.lists(st.tuples(st.integers(1, 16), st.integers(0, 4)), min_size=2, max_size=3),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_ranks_and_workers_share_the_same_global_batches(
    sizes: tuple[int, ...], batch: int, topologies: list[tuple[int, int]], seed: int
) -> None:
    """Loader workers take whole batches in turn, so what each would read is put back together here."""
    order = CanonicalOrder(sizes, seed, batch)
    steps = range(5)
    expected = [order.refs(range(step * batch, (step + 1) * batch)) for step in steps]
    for ranks, workers in topologies:
        read_by_step: list[list[object]] = [[] for _ in steps]
        for rank in range(ranks):
            own = CanonicalOrder(sizes, seed, batch)
            for worker in range(max(1, workers)):
                for step in steps[worker :: max(1, workers)]:
                    read_by_step[step] += own.refs(batch_positions(step, batch, rank, ranks))
        assert [Counter(map(str, refs)) for refs in read_by_step] == [Counter(map(str, refs)) for refs in expected]


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_the_seeded_permutation_is_a_bijection(size: int, key: int) -> None:
    index = np.arange(size)
    sent = feistel_permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(sent.tolist()) == list(range(size))


def test_the_order_is_part_of_the_format() -> None:
    """Changing any of these makes checkpoints mean other samples: it takes a new ORDER_VERSION."""
    assert random_uint64(7, 2).tolist() == [7191089600892374487, 309689372594955804]
    assert read(CanonicalOrder((3, 5, 4), 7, 4), 1) == [10, 3, 5, 6, 9, 0, 8, 4, 7, 2, 1, 11]
    assert sample_seed(7, 1, 3) == 987026514588351028


@given(st.integers(1, 16), st.integers(1, 64), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_ranks_cover_each_global_batch_exactly(ranks: int, batch: int, step: int) -> None:
    positions = [place for rank in range(ranks) for place in batch_positions(step, batch, rank, ranks)]
    assert positions == list(range(step * batch, (step + 1) * batch))


def test_unequal_shares_differ_by_one_at_most() -> None:
    assert sorted(len(split_range(8, part, 3)) for part in range(3)) == [2, 3, 3]


def test_a_batch_that_leaves_a_rank_without_a_page_is_refused_with_the_nearest_that_does_not() -> None:
    check_batch_size(8, 3)
    with pytest.raises(ConfigError, match=r"batch 3 leaves some of 4 workers .* schedule.batch=4, or give at most 3"):
        check_batch_size(3, 4)


def test_epochs_and_seeds_differ() -> None:
    order = CanonicalOrder((50, 50, 50), 0, 4)
    assert read(order, 0) == read(CanonicalOrder((50, 50, 50), 0, 4), 0)
    assert read(order, 0) != read(order, 1)
    assert read(order, 0) != read(CanonicalOrder((50, 50, 50), 1, 4), 0)


@pytest.mark.parametrize(("shard_size", "shard_count"), [(64, 10), (256, 100), (25_600, 1)])
def test_the_order_mixes_nearly_as_well_as_a_full_shuffle(shard_size: int, shard_count: int) -> None:
    order = CanonicalOrder((shard_size,) * shard_count, seed=3, batch=8)
    total = order.samples
    place = np.empty(total)
    samples = np.array(read(order, 0))
    place[samples] = np.arange(total)
    apart = np.abs(np.diff(place))[np.arange(1, total) % shard_size != 0]
    shuffled = np.random.default_rng(0).permutation(total)
    # Neighbours of a shard: 64 lanes keep them thousands of places apart, a third of the epoch in small datasets.
    assert np.median(apart) > min(2000, 0.8 * np.median(np.abs(np.diff(shuffled))))

    def documents(numbers: np.ndarray) -> float:
        """Different documents of eight neighbouring pages in one batch of 8, on average."""
        return float(np.mean([len(set(batch.tolist())) for batch in (numbers // 8)[: total // 8 * 8].reshape(-1, 8)]))

    assert documents(samples) > 0.98 * documents(shuffled)


@pytest.mark.parametrize(("ranks", "batch"), [(8, 8), (3, 12), (16, 64)])
def test_a_shard_is_read_by_few_ranks_and_forward(ranks: int, batch: int) -> None:
    order = CanonicalOrder((512,) * 256, seed=0, batch=batch)
    readers: dict[int, set[int]] = {}
    steps = order.samples // batch
    for rank in range(ranks):
        positions = np.concatenate([np.array(batch_positions(step, batch, rank, ranks)) for step in range(steps)])
        samples = order.samples_of(0, positions)
        for shard in np.unique(samples // 512).tolist():
            readers.setdefault(shard, set()).add(rank)
            rows = samples[samples // 512 == shard] % 512
            blocks = rows // 256  # within a lane, one block follows the other
            turns = np.count_nonzero(np.diff(blocks))
            assert turns <= 2 * len(readers[shard])
    counts = [len(who) for who in readers.values()]
    assert np.mean(counts) < 1.5
    assert max(counts) <= 3


def test_a_hundred_million_samples_take_memory_for_their_shards_only() -> None:
    sizes = (2500,) * 40_000
    tracemalloc.start()
    order = CanonicalOrder(sizes, seed=1, batch=2048)
    refs = [order.refs(batch_positions(99_999, 2048, rank, 1024)) for rank in range(1024)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.samples == 10**8
    assert len({ref.sample for own in refs for ref in own}) == 2048
    assert peak < 32e6  # a table of samples would take 800 MB


def test_a_million_shards_of_one_sample() -> None:
    order = CanonicalOrder((1,) * 1_000_000, seed=2, batch=8)
    assert len({ref.sample for ref in order.refs(range(990_000, 1_000_000))}) == 10_000


def test_random_numbers_are_uniform() -> None:
    numbers = random_uniform(5, 20_000)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.allclose(np.histogram(numbers, bins=10, range=(0, 1))[0], 2000, atol=200)


def test_sample_seeds_are_distinct() -> None:
    seeds = {sample_seed(0, epoch, sample) for epoch in range(20) for sample in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**62 for seed in seeds)
