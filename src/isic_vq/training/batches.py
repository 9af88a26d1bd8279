"""Which images a process sees at which step: a seeded order per epoch, cut the same way every time."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from isic_vq.training.processes import TrainingError


def shuffled_rows(num_items: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Every row of a training set once, in the random order of an epoch."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(num_items)


def check_batch_size(num_items: int, batch_size: int, micro_batches: int, world: int) -> None:
    """Refuse a batch that the training set does not fill, or that cannot be cut evenly.

    Raises:
        TrainingError: it is one.
    """
    if num_items < batch_size:
        raise TrainingError(
            f"the training set has {num_items} images, fewer than one batch of {batch_size}: lower loop.batch_size"
        )
    if batch_size % (micro_batches * world):
        raise TrainingError(
            f"loop.batch_size is {batch_size}: expected a multiple of {micro_batches * world}, "
            f"{micro_batches} accumulated parts for each of {world} processes"
        )


class EpochBatches(Sampler[list[int]]):
    """This process's micro-batches of an order per epoch; the last incomplete batch is dropped.

    A batch is all an optimizer step sees. It is cut in order into micro-batches, and each of those in order into
    one part per process, so that what a batch holds does not depend on how many there are of either. `epoch` and
    `start` (a batch) are set by the loop before each pass: the position in the data is two integers.

    Args:
        num_items: size of the training set.
        batch_size: items per optimizer step, over all micro-batches and processes.
        seed: of the orders.
        micro_batches: parts of a batch that are accumulated.
        world: number of processes.
        rank: number of this one.
        order: the rows of an epoch, `(num_items,)` int64, as a function of its number; `shuffled_rows` by default.

    Raises:
        TrainingError: as `check_batch_size`.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        micro_batches: int = 1,
        world: int = 1,
        rank: int = 0,
        order: Callable[[int], NDArray[np.int64]] | None = None,
    ):
        check_batch_size(num_items, batch_size, micro_batches, world)
        self.num_items, self.batch_size = num_items, batch_size
        self.order = order or partial(shuffled_rows, num_items, seed)
        self.micro_batches, self.world, self.rank = micro_batches, world, rank
        self.epoch = self.start = 0

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.num_items // self.batch_size

    def __len__(self) -> int:
        return self.batches_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(self.epoch).tolist()
        size = self.batch_size // (self.micro_batches * self.world)
        for batch in range(self.start, self.batches_per_epoch):
            for micro_batch in range(self.micro_batches):
                first = batch * self.batch_size + (micro_batch * self.world + self.rank) * size
                yield rows[first : first + size]
