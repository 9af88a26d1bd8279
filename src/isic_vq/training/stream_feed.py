"""How a stream of images reaches a process, step by step, though nobody knows where it ends.

Each loading process of each process of the run reads one lane of the stream. Those of one process take turns with
their micro-batches, and where they stand comes with these: a checkpoint keeps it.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from isic_vq.data.streaming import Position, StreamedImages
from isic_vq.training.batches import check_batch_size
from isic_vq.training.feed import Batch, Collate
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import LoopRecipe

Place = dict[str, int]  # the fields of a `Position`


class StreamFeed:
    """A stream of images as a `Feed`.

    A lane drops its last images if they do not fill a micro-batch, and the loop ends an epoch for all processes
    when one has no whole share left: what is dropped grows with parts of unequal size.

    Args:
        images: the stream.
        collate: joins its items into a batch.
        recipe: batch size, seed and loading processes.
        processes: the group.

    Raises:
        TrainingError: the stream has fewer parts than there are processes, or a batch cannot be cut evenly.
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
        self.states: dict[int, dict[str, Any]] = {}  # before the step under way, and after it

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Batch, ...]]:
        fresh = [(number, dataclasses.asdict(Position())) for number in range(self.num_lanes)]
        places = self.restored["lanes"] if start and self.restored else fresh
        self.states = {start: self._state(places)}
        lanes = deque(_Lane(number, place, self._loader(epoch, number, place)) for number, place in places)
        for batch in itertools.count(start):
            share: list[Batch] = []
            while lanes and len(share) < self.recipe.accumulation_steps:
                lane = lanes.popleft()
                if found := next(lane.batches, None):
                    micro_batch, lane.place = found
                    share.append(micro_batch)
                    lanes.append(lane)
            if len(share) < self.recipe.accumulation_steps:
                return
            after = self._state([(lane.number, lane.place) for lane in lanes])
            self.states = {batch: self.states[batch], batch + 1: after}
            yield tuple(share)

    def state(self, batch: int) -> dict[str, Any]:
        """As `Feed` has it: the place of each lane that has not ended, in the order of their turns."""
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
        lane = processes.rank + processes.world * number
        num_lanes = processes.world * self.num_lanes
        items = partial(self.images.lane, recipe.seed, epoch, lane, num_lanes, Position(**place))
        return DataLoader(
            _LaneBatches(items, self.collate, size),
            batch_size=None,  # they are batches already
            num_workers=min(1, recipe.num_workers),
            generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
            pin_memory=processes.device.type == "cuda",
        )


class _Lane:
    """A lane while it is read: its number in this process, where it stands, and its micro-batches to come."""

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
