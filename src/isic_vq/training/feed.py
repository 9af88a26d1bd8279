"""How training data reach a process, step by step: rows of a data set in a seeded order, or images of a stream.

A batch is all an optimizer step sees. It is cut in order into micro-batches, and each of those in order into one part per
process, so that what a batch holds does not depend on how many there are of either. A feed knows where it stands, so that
a resumed run is fed what the interrupted one would have been.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from isic_vq.data.streaming import Position, StreamedImages
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import LoopRecipe

Batch = dict[str, Any]
Collate = Callable[[list[Any]], Batch]
Place = dict[str, int]  # the fields of a `Position`


class Feed(Protocol):
    """What the loop asks of the training data."""

    num_items: int  # in an epoch, over all processes

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Batch, ...]]:
        """Yield this process's micro-batches of each step of an epoch, from batch `start` on, while they are whole."""

    def state(self, batch: int) -> dict[str, Any] | None:
        """What a checkpoint keeps beside (epoch, batch), before batch `batch` of the present epoch; JSON."""

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue, at the next call of `epoch`, as a feed of the same kind and settings whose state this was."""


def check_batch_size(num_items: int, batch_size: int, micro_batches: int, world: int) -> None:
    """Raise TrainingError for a batch that the training set does not fill, or that cannot be cut evenly."""
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
    """Rows of this process's micro-batches; the last incomplete batch of an epoch is dropped.

    `epoch` and `start` (a batch) are set by the feed before each pass: the position in the data is two integers. `order` gives
    an epoch's rows `(num_items,)` int64; by default each is a random permutation.
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
        self.num_items, self.batch_size, self.seed, self.order = num_items, batch_size, seed, order
        self.micro_batches, self.world, self.rank = micro_batches, world, rank
        self.epoch = self.start = 0

    @property
    def batches_per_epoch(self) -> int:
        return self.num_items // self.batch_size

    def __len__(self) -> int:
        return self.batches_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        if self.order is not None:
            rows = self.order(self.epoch).tolist()
        else:
            key = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
            rows = np.random.default_rng(key).permutation(self.num_items).tolist()
        size = self.batch_size // (self.micro_batches * self.world)
        for batch in range(self.start, self.batches_per_epoch):
            for micro_batch in range(self.micro_batches):
                first = batch * self.batch_size + (micro_batch * self.world + self.rank) * size
                yield rows[first : first + size]


class RowFeed:
    """The rows of a data set with random access, each epoch in a new order: its place is (epoch, batch)."""

    def __init__(
        self,
        dataset: Dataset,
        collate: Collate,
        recipe: LoopRecipe,
        processes: Processes,
        order: Callable[[int], NDArray[np.int64]] | None = None,
    ):
        self.num_items, self.micro_batches = len(dataset), recipe.accumulation_steps  # type: ignore[arg-type]
        world, rank = processes.world, processes.rank
        self.batches = EpochBatches(
            self.num_items, recipe.batch_size, recipe.seed, self.micro_batches, world, rank, order
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


class StreamFeed:
    """A stream of images, whose end nobody knows.

    Each loading process of each process of the run reads one lane of the stream. Those of one process take turns with
    their micro-batches, and their places come with these: a checkpoint keeps them. A lane drops its last images if they do
    not fill a micro-batch, and the loop ends an epoch for all processes when one has no whole share left: more is dropped
    where parts are of unequal size. TrainingError for fewer parts than processes, or a batch that cannot be cut evenly.
    """

    def __init__(self, images: StreamedImages, collate: Collate, recipe: LoopRecipe, processes: Processes):
        self.images, self.collate, self.recipe, self.processes = images, collate, recipe, processes
        self.num_items, self.num_lanes = images.num_images, max(1, recipe.num_workers)
        check_batch_size(self.num_items, recipe.batch_size, recipe.accumulation_steps, processes.world)
        if len(images.parts) < processes.world:
            raise TrainingError(
                f"{images.source.name} has {len(images.parts)} parts that can be read independently, fewer than the "
                f"{processes.world} processes: start no more processes than parts, or write the images to files with "
                "isic-vq data prepare"
            )
        self.restored: dict[str, Any] | None = None
        self.states: dict[int, dict[str, Any]] = {}  # before the present step, and after it

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Batch, ...]]:
        fresh = [(number, dataclasses.asdict(Position())) for number in range(self.num_lanes)]
        places = self.restored["lanes"] if start and self.restored else fresh
        self.states = {start: self._state(places)}
        lanes = deque(_Lane(number, place, self._loader(epoch, number, place)) for number, place in places)
        for batch in itertools.count(start):
            share: list[Batch] = []
            while lanes and len(share) < self.recipe.accumulation_steps:
                lane = lanes.popleft()
                if loaded := next(lane.batches, None):
                    micro_batch, lane.place = loaded
                    share.append(micro_batch)
                    lanes.append(lane)
            if len(share) < self.recipe.accumulation_steps:
                return
            after = self._state([(lane.number, lane.place) for lane in lanes])
            self.states = {batch: self.states[batch], batch + 1: after}
            yield tuple(share)

    def state(self, batch: int) -> dict[str, Any]:
        """The place of each lane that has not ended, in the order of their turns."""
        return self.states[batch] if batch else self._state([])

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            raise TrainingError("the run was not fed by a stream: resume it without data.stream=true")
        if state["num_lanes"] != self.num_lanes:
            raise TrainingError(
                f"the run was fed by {state['num_lanes']} loading processes, each with a part of the stream: resume "
                f"it with loop.num_workers={state['num_lanes']}"
            )
        self.restored = state

    def _state(self, places: list[tuple[int, Place]]) -> dict[str, Any]:
        return {"num_lanes": self.num_lanes, "lanes": places}

    def _loader(self, epoch: int, number: int, place: Place) -> DataLoader:
        """Load the rest of a lane, in a process of its own if the recipe has any."""
        recipe, processes = self.recipe, self.processes
        size = recipe.batch_size // (recipe.accumulation_steps * processes.world)
        lane, num_lanes = processes.rank + processes.world * number, processes.world * self.num_lanes
        items = partial(self.images.lane, recipe.seed, epoch, lane, num_lanes, Position(**place))
        return DataLoader(
            _LaneBatches(items, self.collate, size),
            batch_size=None,  # they are batches already
            num_workers=min(1, recipe.num_workers),
            generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
            pin_memory=processes.device.type == "cuda",
        )


class _Lane:
    def __init__(self, number: int, place: Place, loader: DataLoader):
        self.number, self.place, self.batches = number, place, iter(loader)


class _LaneBatches(IterableDataset):
    """Whole micro-batches of a lane, each with the place after it."""

    def __init__(
        self, items: Callable[[], Iterator[tuple[dict[str, Any], Position]]], collate: Collate, size: int
    ):
        self.items, self.collate, self.size = items, collate, size

    def __iter__(self) -> Iterator[tuple[Batch, Place]]:
        items = self.items()
        while len(chunk := list(itertools.islice(items, self.size))) == self.size:
            yield self.collate([item for item, _ in chunk]), dataclasses.asdict(chunk[-1][1])
