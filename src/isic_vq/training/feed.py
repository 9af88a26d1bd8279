"""How training data reach a process, step by step, and how rows of a data set do.

A feed knows where it stands, so that a resumed run is fed what the interrupted one would have been.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from isic_vq.training.batches import EpochBatches
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import LoopRecipe

Batch = dict[str, Any]
Collate = Callable[[list[Any]], Batch]


class Feed(Protocol):
    """What the loop asks of the training data."""

    num_items: int  # in an epoch, over all processes

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Batch, ...]]:
        """Yield this process's micro-batches of each step of an epoch, from batch `start` on, while they are whole."""

    def state(self, batch: int) -> dict[str, Any] | None:
        """What a checkpoint keeps beside (epoch, batch), before batch `batch` of the present epoch; JSON."""

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on, at the next call of `epoch`, as a feed whose state this was.

        Raises:
            TrainingError: it was another kind of feed, or one with other settings.
        """


class RowFeed:
    """The rows of a data set with random access, each epoch in a new order: where it stands is (epoch, batch).

    Args:
        dataset: has a length.
        collate: joins its items into a batch.
        recipe: batch size, seed and loading processes.
        processes: the group.
        order: as for `EpochBatches`.

    Raises:
        TrainingError: as `EpochBatches`.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Collate,
        recipe: LoopRecipe,
        processes: Processes,
        order: Callable[[int], NDArray[np.int64]] | None = None,
    ):
        self.num_items, self.micro_batches = len(dataset), recipe.accumulation_steps  # type: ignore[arg-type]
        self.batches = EpochBatches(
            self.num_items,
            recipe.batch_size,
            recipe.seed,
            recipe.accumulation_steps,
            processes.world,
            processes.rank,
            order,
        )
        # Not prepared by accelerate, which would cut the batches once more: EpochBatches has cut them.
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=recipe.num_workers,
            generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
            pin_memory=processes.device.type == "cuda",
        )

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Batch, ...]]:
        self.batches.epoch, self.batches.start = epoch, start
        yield from zip(*[iter(self.loader)] * self.micro_batches, strict=True)

    def state(self, batch: int) -> None:
        """Nothing: batches are numbered."""

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            raise TrainingError("the run was fed by a stream: resume it with data.stream=true")
