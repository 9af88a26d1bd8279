"""Which images a process sees at which step: a seeded permutation per epoch, cut the same way every time."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from isic_vq.training.processes import TrainingError


class EpochBatches(Sampler[list[int]]):
    """This process's micro-batches of a seeded permutation per epoch; the last incomplete batch is dropped.

    A batch is all an optimizer step sees. It is cut in order into micro-batches, and each of those in order into
    one part per process, so that what a batch holds does not depend on how many there are of either. `epoch` and
    `start` (a batch) are set by the loop before each pass: the position in the data is two integers.

    Args:
        num_items: size of the training set.
        batch_size: items per optimizer step, over all micro-batches and processes.
        seed: of the permutations.
        micro_batches: parts of a batch that are accumulated.
        world: number of processes.
        rank: number of this one.

    Raises:
        TrainingError: the training set is smaller than a batch, or a batch cannot be cut evenly.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        micro_batches: int = 1,
        world: int = 1,
        rank: int = 0,
    ):
        if num_items < batch_size:
            raise TrainingError(
                f"the training set has {num_items} images, fewer than one batch of {batch_size}: lower loop.batch_size"
            )
        if batch_size % (micro_batches * world):
            raise TrainingError(
                f"loop.batch_size is {batch_size}: expected a multiple of {micro_batches * world}, "
                f"{micro_batches} accumulated parts for each of {world} processes"
            )
        self.num_items, self.batch_size, self.seed, self.drop_last = num_items, batch_size, seed, True
        self.micro_batches, self.world, self.rank = micro_batches, world, rank
        self.epoch = self.start = 0

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.num_items // self.batch_size

    def __len__(self) -> int:
        return self.batches_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.epoch,)))
        permutation = order.permutation(self.num_items).tolist()
        size = self.batch_size // (self.micro_batches * self.world)
        for batch in range(self.start, self.batches_per_epoch):
            for micro_batch in range(self.micro_batches):
                first = batch * self.batch_size + (micro_batch * self.world + self.rank) * size
                yield permutation[first : first + size]
