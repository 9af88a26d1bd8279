"""From records to batches of pixels; corrupt images are skipped, named and counted.

An image that cannot be decoded becomes an item with an `error`, which `collate` leaves out of the batch and `SkipCounter`
counts: one damaged file does not stop a long run, and too many do. The image processor decodes and fixes the size.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset
from numpy.typing import NDArray

from isic_vq.data.augmentation import random_views, view
from isic_vq.data.order import seeded_subset
from isic_vq.data.schema import DataError
from isic_vq.models.checks import expect
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor

logger = logging.getLogger(__name__)

NUM_NAMED_SKIPS = 5


class Batch(TypedDict):
    """A collated batch."""

    pixel_values: torch.Tensor  # float32 (batch, 3, height, width), RGB in [0, 1]; (0, 3, 0, 0) without any
    labels: torch.Tensor  # int64 (batch,); the unconditional id for a diagnosis that the model does not have
    indices: torch.Tensor  # int64 (batch,), rows of the data set
    skipped: list[str]  # "name: reason" of each corrupt image, which the tensors leave out
    isic_ids: NotRequired[list[str]]  # only from `iter_batches` and `decoded_batches`
    diagnoses: NotRequired[list[str]]  # as `isic_ids`


class Views(Protocol):
    """The dihedral view of each image, by its item's index."""

    def __getitem__(self, index: int, /) -> int:
        """The view of an image, 0 to 7."""


class DecodedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style torch data set that decodes images with the image processor.

    Args:
        records: has the columns of `FEATURES`.
        image_processor: fixes the size.
        label2id: class ids by diagnosis; other diagnoses get the unconditional id, `len(label2id)`.
        cache: keep decoded pixels in memory (48 KiB per image of 128 x 128 pixels, in each worker process).
        shard_sizes: rows of each file, for epochs that read few files at a time; None for any order.
    """

    def __init__(
        self,
        records: Dataset,
        image_processor: IsicVQImageProcessor,
        label2id: Mapping[str, int] | None = None,
        cache: bool = False,
        shard_sizes: Sequence[int] | None = None,
    ):
        self.shard_sizes = shard_sizes
        self.records = records.cast_column("image", Image(decode=False))
        self.image_processor = image_processor
        self.labels = [_label(diagnosis, label2id) for diagnosis in records["diagnosis"]]
        self.cache: dict[int, NDArray[np.uint8] | str] | None = {} if cache else None

    def __len__(self) -> int:
        """The number of images, corrupt ones included."""
        return len(self.records)

    @property
    def num_images(self) -> int:
        return len(self.records)

    def views(self, seed: int, epoch: int) -> list[int]:
        return random_views(len(self), seed, epoch).tolist()

    def sample(self, size: int, seed: int) -> torch.utils.data.Subset[dict[str, Any]]:
        """Draw at most `size` images at random, the same in every process."""
        return torch.utils.data.Subset(self, seeded_subset(len(self), size, seed).tolist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"pixels", "label", "index"}, or {"index", "error"} for a corrupt image.

        `pixels` is uint8 of shape (height, width, 3), RGB; `collate` converts whole batches to floats.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0 to {len(self) - 1}")
        pixels = self._decode(index) if self.cache is None else self.cache.get(index)
        if pixels is None:
            pixels = self.cache[index] = self._decode(index)  # type: ignore[index]
            if isinstance(pixels, np.ndarray):
                pixels.setflags(write=False)  # the next epoch reads the same memory
        return _item(pixels, self.labels[index], index)

    def _decode(self, index: int) -> NDArray[np.uint8] | str:
        return _decode(self.records[index], index, self.image_processor)


class SkipCounter:
    """Counts corrupt images over a run, logs each once by name, and raises when their share is above `max_share`.

    Until `finish`, the share is of at least `min_images`, so that one corrupt image among the first few does not stop the
    run.
    """

    def __init__(self, max_share: float = 0.01, min_images: int = 1000):
        expect(0 <= max_share <= 1, "max_share", max_share, "a share from 0 to 1 such as 0.01")
        self.max_share = max_share
        self.min_images = min_images
        self.num_images = 0  # of every epoch, corrupt ones included
        self.num_skipped = 0
        self._logged: dict[str, str] = {}

    def count(self, batch: Batch) -> None:
        """Add a batch; DataError if the share of corrupt images is above `max_share`."""
        self.num_skipped += len(batch["skipped"])
        self.num_images += len(batch["indices"]) + len(batch["skipped"])
        for skipped in batch["skipped"]:
            name = skipped.partition(": ")[0]
            if name not in self._logged:
                logger.warning("Skipped a corrupt image: %s", skipped)
                self._logged[name] = skipped
        self._check(max(self.num_images, self.min_images))

    def finish(self) -> None:
        """Check the share at the end of the data, without `min_images`; DataError if it is above `max_share`."""
        self._check(self.num_images)

    def _check(self, num_images: int) -> None:
        if self.num_skipped > self.max_share * num_images:
            check_share(list(self._logged.values()), self.num_skipped, self.num_images, self.max_share)


def check_share(
    reasons: Sequence[str], num_bad: int, num_images: int, max_share: float, word: str = "corrupt"
) -> None:
    """Raise DataError, with some of the reasons, if more than a share of the images cannot be used."""
    if num_bad > max_share * num_images:
        raise DataError(
            f"{num_bad} of {num_images} images are {word}, more than the allowed share of {max_share:g}, for example "
            f"{'; '.join(reasons[:NUM_NAMED_SKIPS])}. Replace or remove them, or allow a larger share."
        )


def collate(items: list[dict[str, Any]], views: Views | None = None) -> Batch:
    """Join items of `DecodedImages` or `StreamedImages`, each in its dihedral view, into a batch without the corrupt ones.

    `pixel_values` are channels last in memory, like decoded images, which is fast for convolutions.
    """
    sound = [item for item in items if "error" not in item]
    pixels = [
        item["pixels"] if views is None else view(item["pixels"], views[item["index"]]) for item in sound
    ]
    pixel_values = (
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() if sound else torch.empty(0, 3, 0, 0)
    )
    return {
        "pixel_values": pixel_values.div_(255),
        "labels": torch.tensor([item["label"] for item in sound], dtype=torch.int64),
        "indices": torch.tensor([item["index"] for item in sound], dtype=torch.int64),
        "skipped": [item["error"] for item in items if "error" in item],
    }


def iter_batches(
    dataset: Dataset | IterableDataset,
    image_processor: IsicVQImageProcessor,
    batch_size: int,
    label2id: Mapping[str, int] | None = None,
    max_corrupt_share: float = 0.01,
) -> Iterator[Batch]:
    """Yield the images of a data set or stream once, in order, in batches with `isic_ids` and `diagnoses`.

    Corrupt images make a batch smaller; more of them than `max_corrupt_share` are a DataError.
    """
    counter = SkipCounter(max_corrupt_share, len(dataset) if isinstance(dataset, Dataset) else 1000)
    for batch in decoded_batches(dataset, image_processor, batch_size, label2id):
        counter.count(batch)
        if batch["isic_ids"]:
            yield batch
    counter.finish()


def decoded_batches(
    dataset: Dataset | IterableDataset,
    image_processor: IsicVQImageProcessor,
    batch_size: int,
    label2id: Mapping[str, int] | None = None,
) -> Iterator[Batch]:
    """Yield batches like `iter_batches`, but also empty ones, and without a limit on corrupt images."""
    records = enumerate(dataset.cast_column("image", Image(decode=False)))
    while chunk := list(itertools.islice(records, batch_size)):
        batch = collate([decoded_item(record, image_processor, index, label2id) for index, record in chunk])
        by_index = dict(chunk)
        sound = batch["indices"].tolist()
        batch["isic_ids"] = [_name(by_index[index], index) for index in sound]
        batch["diagnoses"] = [by_index[index]["diagnosis"] for index in sound]
        yield batch


def decoded_item(
    record: Mapping[str, Any],
    image_processor: IsicVQImageProcessor,
    index: int = 0,
    label2id: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Decode a record into an item, as `DecodedImages` does; its image is {"bytes", "path"} or None."""
    return _item(_decode(record, index, image_processor), _label(record["diagnosis"], label2id), index)


def _label(diagnosis: str, label2id: Mapping[str, int] | None) -> int:
    return 0 if label2id is None else label2id.get(diagnosis, len(label2id))


def _name(record: Mapping[str, Any], index: int) -> str:
    return record["isic_id"] or f"image {index}"


def _decode(
    record: Mapping[str, Any], index: int, image_processor: IsicVQImageProcessor
) -> NDArray[np.uint8] | str:
    """A record's pixels, uint8 of shape (height, width, 3), or "name: reason" if it is corrupt."""
    image, name = record["image"], _name(record, index)
    if image is None or (image["bytes"] is None and image["path"] is None):
        return f"{name}: the record has no image"
    content, path = image["bytes"], image["path"] or ""
    try:
        return image_processor.to_square(path if content is None else content, name=name)
    except ImageError as error:
        return str(error).replace(path, os.path.basename(path))  # the reason may end up in a published report


def _item(square: NDArray[np.uint8] | str, label: int, index: int) -> dict[str, Any]:
    if isinstance(square, str):
        return {"index": index, "error": square}
    return {"pixels": square, "label": label, "index": index}
