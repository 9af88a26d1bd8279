"""From records to batches of pixels, with corrupt images skipped, named and counted.

An image that cannot be decoded becomes an item with an `error`, leaves its batch at `collate`, and is counted
by a `SkipCounter`, which raises once too many are corrupt: a damaged file never stops a run of hours, and
damaged data never passes for sound data. Sizes and pixel range belong to the image processor, which decodes.
It does not shuffle or augment.
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
from isic_vq.data.schema import DataError
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor

logger = logging.getLogger(__name__)

NUM_NAMED_SKIPS = 5


class Batch(TypedDict):
    """A collated batch.

    Attributes:
        pixel_values: float32 of shape (batch, 3, height, width), RGB in [0, 1]; (0, 3, 0, 0) if every image
            is corrupt.
        labels: int64 of shape (batch,); the unconditional id for a diagnosis that the model does not have.
        indices: int64 of shape (batch,), rows of the data set.
        skipped: one "name: reason" per corrupt image, which the tensors leave out.
        isic_ids: the images' ids; only from `iter_batches` and `decoded_batches`.
        diagnoses: their canonical diagnoses; likewise.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    skipped: list[str]
    isic_ids: NotRequired[list[str]]
    diagnoses: NotRequired[list[str]]


class Views(Protocol):
    """The dihedral view of each image, by its item's index."""

    def __getitem__(self, index: int, /) -> int:
        """Return the view of an image, 0 to 7."""


class DecodedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style torch data set that decodes images through the image processor.

    Args:
        records: has the columns of `FEATURES`.
        image_processor: fixes the size.
        label2id: class ids by canonical diagnosis; a diagnosis that is not in it, or any without `label2id`,
            gets the unconditional id, `len(label2id)`.
        cache: keep decoded pixels in memory (about 48 KiB per image of 128 x 128 pixels, in each worker
            process).
        shard_sizes: rows of each file that `records` are read from, where an epoch should read one file after
            the other; None if any order is as good.
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
        """Return the number of images, corrupt ones included."""
        return len(self.records)

    @property
    def num_images(self) -> int:
        """The number of images, corrupt ones included."""
        return len(self.records)

    def views(self, seed: int, epoch: int) -> list[int]:
        """The view in which each image is shown in an epoch."""
        return random_views(len(self), seed, epoch).tolist()

    def sample(self, size: int, seed: int) -> torch.utils.data.Subset[dict[str, Any]]:
        """The first images of a random order, up to `size`; the same in every process."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return torch.utils.data.Subset(self, order[:size].tolist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {"pixels", "label", "index"}, or {"index", "error"} for a corrupt image.

        `pixels` is uint8 of shape (height, width, 3), RGB: `collate` makes a whole batch floating-point at once.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0 to {len(self) - 1}")
        if self.cache is None:
            return _item(self._decode(index), self.labels[index], index)
        if index not in self.cache:
            self.cache[index] = self._decode(index)
            if isinstance(pixels := self.cache[index], np.ndarray):
                pixels.setflags(write=False)  # the next epoch reads them, too
        return _item(self.cache[index], self.labels[index], index)

    def _decode(self, index: int) -> NDArray[np.uint8] | str:
        """Return the pixels of a row, or its error."""
        return _decode(self.records[index], index, self.image_processor)


class SkipCounter:
    """Count corrupt images over a run, log each once by name, and raise once they are too many.

    Args:
        max_share: allowed share of corrupt images, 0 to 1.
        min_images: the share is taken of at least this many images, so that one corrupt image among the first
            few stops nothing; the size of the data set where it is known.

    Attributes:
        num_images: images counted so far, corrupt ones included; an image seen in two epochs counts twice.
        num_skipped: corrupt images among them.
    """

    def __init__(self, max_share: float = 0.01, min_images: int = 1000):
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share is {max_share}, expected a share from 0 to 1 such as 0.01.")
        self.max_share = max_share
        self.min_images = min_images
        self.num_images = 0
        self.num_skipped = 0
        self._logged: dict[str, str] = {}

    def count(self, batch: Batch) -> None:
        """Add a batch.

        Raises:
            DataError: the share of corrupt images is above `max_share`.
        """
        self.num_skipped += len(batch["skipped"])
        self.num_images += len(batch["indices"]) + len(batch["skipped"])
        for skipped in batch["skipped"]:
            name = skipped.partition(": ")[0]
            if name not in self._logged:
                logger.warning("Skipped a corrupt image: %s", skipped)
                self._logged[name] = skipped
        self._check(max(self.num_images, self.min_images))

    def finish(self) -> None:
        """Check the share once more when the data has ended, whatever `min_images` is.

        Raises:
            DataError: the share of corrupt images is above `max_share`.
        """
        self._check(self.num_images)

    def _check(self, num_images: int) -> None:
        if self.num_skipped > self.max_share * num_images:
            check_share(list(self._logged.values()), self.num_skipped, self.num_images, self.max_share)


def check_share(
    reasons: Sequence[str], num_bad: int, num_images: int, max_share: float, word: str = "corrupt"
) -> None:
    """Raise DataError if more than a share of images cannot be used; some of the reasons are named."""
    if num_bad > max_share * num_images:
        raise DataError(
            f"{num_bad} of {num_images} images are {word}, more than the allowed share of {max_share:g}, for example "
            f"{'; '.join(reasons[:NUM_NAMED_SKIPS])}. Replace or remove them, or allow a larger share."
        )


def collate(items: list[dict[str, Any]], views: Views | None = None) -> Batch:
    """Join items of `DecodedImages` or `StreamedImages` into a batch that leaves out the corrupt ones; use it as `collate_fn`.

    `pixel_values` lies in memory channels last, as decoded images do and as convolutions like it.

    Args:
        items: decoded images.
        views: the dihedral view each is shown in, by its index; None shows all as they are.
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
    """Yield the images of a data set or stream once, in order, in batches that also carry `isic_ids` and `diagnoses`.

    A corrupt image makes its batch smaller; a batch without a sound image is left out.

    Args:
        dataset: has the columns of `FEATURES`.
        image_processor: fixes the size.
        batch_size: number of records per batch.
        label2id: as for `DecodedImages`.
        max_corrupt_share: as for `SkipCounter`.

    Raises:
        DataError: too many images are corrupt.
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
    """Yield batches as `iter_batches` does, without judging how many images are corrupt; a batch may be empty."""
    records = enumerate(dataset.cast_column("image", Image(decode=False)))
    while chunk := list(itertools.islice(records, batch_size)):
        about = {index: (_name(record, index), record["diagnosis"]) for index, record in chunk}
        batch = collate([decoded_item(record, image_processor, index, label2id) for index, record in chunk])
        sound = [about[index] for index in batch["indices"].tolist()]
        batch["isic_ids"] = [name for name, _ in sound]
        batch["diagnoses"] = [diagnosis for _, diagnosis in sound]
        yield batch


def decoded_item(
    record: Mapping[str, Any],
    image_processor: IsicVQImageProcessor,
    index: int = 0,
    label2id: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Decode a record: {"pixels", "label", "index"}, or {"index", "error"} for a corrupt image.

    Args:
        record: has the columns of `FEATURES`, its image as {"bytes", "path"} or None.
        image_processor: fixes the size.
        index: what the item is called by.
        label2id: as for `DecodedImages`.
    """
    return _item(_decode(record, index, image_processor), _label(record["diagnosis"], label2id), index)


def _label(diagnosis: str, label2id: Mapping[str, int] | None) -> int:
    return 0 if label2id is None else label2id.get(diagnosis, len(label2id))


def _name(record: Mapping[str, Any], index: int) -> str:
    return record["isic_id"] or f"image {index}"


def _decode(
    record: Mapping[str, Any], index: int, image_processor: IsicVQImageProcessor
) -> NDArray[np.uint8] | str:
    """Return a record's pixels, uint8 of shape (height, width, 3), or "name: reason" if it is corrupt."""
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
