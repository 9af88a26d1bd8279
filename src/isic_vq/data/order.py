"""Seeded orders: random subsets, and epochs that read few prepared shards at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW = 16  # shards whose rows are mixed


def seeded_subset(number: int, limit: int, seed: int) -> Tensor:
    """Draw at most `limit` of `number` rows: int64 in the order of a random permutation, the same in every process."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))[:limit]


def stratified_subset(groups: Sequence[Any] | NDArray[Any], size: int, seed: int) -> NDArray[np.int64]:
    """Draw `size` rows at random so that every group has its share of them, up to one row.

    Args:
        groups: the group of each row, `(N,)`.
        size: how many of the N rows.
        seed: of the draw; how many rows each group gets is the same for all.

    Returns:
        Rows in rising order, int64 `(size,)`.

    Raises:
        ValueError: there are fewer rows.

    Examples:
        >>> stratified_subset(["a", "a", "a", "b", "b", "b"], 4, seed=0).shape
        (4,)
    """
    number = len(groups)
    if not 0 <= size <= number:
        raise ValueError(f"a subset of {size} of {number} rows: expected at most as many")
    order = np.lexsort((np.random.default_rng(seed).random(number), np.asarray(groups)))
    # Evenly spaced places of an order in which groups stay together.
    return np.sort(order[(2 * np.arange(size) + 1) * number // max(2 * size, 1)])


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> NDArray[np.int64]:
    """Order the rows of all shards, int64 (rows,): shards in random order, and the rows of every `window` of them mixed.

    The order depends only on the arguments, so that a position in an epoch is one integer. Up to `window` shards it is a
    uniform permutation of all rows.

    Examples:
        >>> sorted(epoch_order([2, 3], seed=0, epoch=0).tolist())
        [0, 1, 2, 3, 4]
    """
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = generator.permutation(len(shard_sizes))
    rows = []
    for first in range(0, len(shards), window):
        opened = [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + window]]
        rows.append(generator.permutation(np.concatenate(opened)))
    return np.concatenate(rows) if rows else np.empty(0, np.int64)
