"""Training images from streamed sources: shuffled, decoded, and resumable at any image.

An epoch reads the parts of a source in a new order and deals them to lanes, one per loading process. A lane decodes its
images and shuffles them in windows: while one window is yielded in random order, the next one is read. The position of a
lane is four integers; resuming there is exact and reads up to two windows, and the part they begin in, once more.
Differs from `datasets.IterableDataset.shuffle`, which shuffles encoded images of unbounded size and loses its buffer on
resuming. Images farther apart than a window are shuffled only by the order of the parts.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Image

from isic_vq.data.augmentation import NUM_VIEWS
from isic_vq.data.loading import decoded_item
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources import Source
from isic_vq.data.sources.base import read_parts
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

WINDOW = 512  # decoded images that are shuffled together; 24 MiB at 128 pixels
MAX_SAMPLE = 4096  # decoded images that `sample` keeps in memory; 192 MiB at 128 pixels
MAX_BYTES_IN_MEMORY = 2**31


Place = tuple[int, int]  # a part of a lane, and a row in it


@dataclass(frozen=True)
class Position:
    """The position in a lane of an epoch."""

    window: int = 0  # number of the current window
    part: int = 0  # number, among the lane's parts, of the one in which the window begins
    row: int = 0  # rows of that part before the window
    taken: int = 0  # images of the window that were yielded


class StreamedImages:
    """Decoded images of a source, which may lack random access, in a new random order every epoch.

    Items are those of `DecodedImages` with `isic_id`; their `index` is a checksum of the pixels instead of a row.
    """

    def __init__(
        self, source: Source, image_processor: IsicVQImageProcessor, num_images: int, window: int = WINDOW
    ):
        self.source, self.image_processor, self.num_images = source, image_processor, num_images
        self.window, self.parts = window, source.parts()

    def lane(
        self, seed: int, epoch: int, lane: int = 0, num_lanes: int = 1, position: Position | None = None
    ) -> Iterator[tuple[dict[str, Any], Position]]:
        """Yield the items of a lane from a position on, each with the position after it; all lanes yield every image once."""
        position = position or Position()
        parts = [self.parts[index] for index in _permutation(len(self.parts), seed, epoch)[lane::num_lanes]]
        start = position.part, position.row
        items = self._items(parts, *start)
        window = list(itertools.islice(items, self.window))
        number, taken = position.window, position.taken
        while window:
            following: list[Any] = []
            for count, index in enumerate(_permutation(len(window), seed, epoch, lane, number), 1):
                following.extend(itertools.islice(items, 1))
                if count > taken:
                    yield window[index][0], Position(number, *start, count)
            start, window, number, taken = window[-1][1], following, number + 1, 0

    def _items(self, parts: list[Any], part: int, row: int) -> Iterator[tuple[dict[str, Any], Place]]:
        """Decode parts in order from a row of a part on; yield each item, and the part and row of the next one."""
        for number in range(part, len(parts)):
            for record in itertools.islice(self.source.read(parts[number]), row, None):
                row += 1
                item = decoded_item(_stored(record), self.image_processor)
                if "pixels" in item:
                    item["index"] = zlib.crc32(item["pixels"])
                yield {**item, "isic_id": record["isic_id"]}, (number, row)
            row = 0

    def views(self, seed: int, epoch: int) -> "StreamViews":
        """The view of each image in an epoch, by its item's index."""
        return StreamViews(seed, epoch)

    def sample(self, size: int, seed: int) -> list[dict[str, Any]]:
        """The first items of a random order, at most `size` and `MAX_SAMPLE`, the same in every process."""
        return [item for item, _ in itertools.islice(self.lane(seed, 0), min(size, MAX_SAMPLE))]


@dataclass(frozen=True)
class StreamViews:
    """A dihedral view, 0 to 7, for every index of a streamed item, from seed, epoch and index alone."""

    seed: int
    epoch: int

    def __getitem__(self, index: int) -> int:
        state = np.random.SeedSequence(self.seed, spawn_key=(self.epoch, index)).generate_state(1)
        return int(state[0]) % NUM_VIEWS


def read_into_memory(source: Source, max_bytes: int = MAX_BYTES_IN_MEMORY) -> Dataset:
    """Read all records of a source with encoded images; DataError if the images take more than `max_bytes`."""
    records, size = [], 0
    for record in map(_stored, read_parts(source, source.parts())):
        size += len((record["image"] or {}).get("bytes") or b"")
        if size > max_bytes:
            raise DataError(
                f"{source.name} streams over {max_bytes / 2**30:g} GiB: write it to files with isic-vq data prepare"
            )
        records.append(record)
    return Dataset.from_list(records, features=FEATURES)


def _stored(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "image": None if record["image"] is None else Image().encode_example(record["image"])}


def _permutation(size: int, seed: int, *key: int) -> list[int]:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key)).permutation(size).tolist()
