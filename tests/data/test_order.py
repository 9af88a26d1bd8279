"""The order of an epoch over shards: every row once, and near in time what is near on disk."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.order import epoch_order

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=20)
NUMBERS = st.integers(0, 2**32)


@given(SIZES, NUMBERS, st.integers(0, 100), st.integers(1, 20))
def test_every_row_comes_once_and_few_shards_are_open(sizes, seed, epoch, window):
    order = epoch_order(sizes, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert (order == epoch_order(sizes, seed, epoch, window)).all()
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    times = {shard: np.flatnonzero(shard_of == shard) for shard in range(len(sizes))}
    for at in range(len(order)):
        assert sum(seen[0] <= at <= seen[-1] for seen in times.values()) <= window


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order([50] * 4, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_with_few_shards_any_row_may_come_first():
    first = [int(epoch_order([5, 5], 0, epoch)[0]) for epoch in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert (abs(counts - 200) < 60).all(), "four standard deviations of a binomial"
