"""The base of stages that train on images: batches without corrupt images, views, example pictures."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isic_vq.data.classes import UNKNOWN, Classes, counted, new_classes
from isic_vq.data.loading import Batch, DecodedImages, SkipCounter, collate
from isic_vq.data.order import epoch_order
from isic_vq.data.parts import SelectedSource, licensed, split_source
from isic_vq.data.provenance import TrainingData
from isic_vq.data.schema import DataError
from isic_vq.data.sources import Source, SourceInfo, find_source
from isic_vq.data.sources.prepared import PreparedSource
from isic_vq.data.splits import GROUP_COLUMNS, warn_of_shared
from isic_vq.data.streaming import StreamedImages, read_into_memory
from isic_vq.files import write_tensors
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.feed import Feed, RowFeed, StreamFeed
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import DataRecipe, LoopRecipe
from isic_vq.training.run import save_model
from isic_vq.training.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 12  # validation images kept for the reconstruction figure


class ImageTask(Task):
    """A stage that trains on images; the processor decodes them, and is saved beside the weights."""

    def __init__(
        self,
        model: nn.Module,
        processor: IsicVQImageProcessor,
        train_set: DecodedImages | StreamedImages,
        validation_set: DecodedImages,
        recipe: Any,
    ):
        self.model, self.processor, self.recipe = model, processor, recipe
        self.train_set, self.validation_set = train_set, validation_set
        self.data, self.loop, self.augment = recipe.data, recipe.loop, recipe.augment

    def begin(self, processes: Processes) -> None:
        super().begin(processes)
        num_images = (self.train_set.num_images + len(self.validation_set)) // processes.world
        self.skipped = SkipCounter(self.data.max_corrupt_share, num_images)

    def feed(self, recipe: LoopRecipe, processes: Processes) -> Feed:
        images = self.train_set
        if isinstance(images, StreamedImages):
            return StreamFeed(images, self.collate, recipe, processes)
        order = None if images.shard_sizes is None else partial(epoch_order, images.shard_sizes, recipe.seed)
        return RowFeed(images, self.collate, recipe, processes, order)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Join decoded images, each in its view of this epoch, without the corrupt ones."""
        batch = collate(items, self.views if self.augment else None)
        return {**batch, "size": len(batch["indices"])}

    def check(self, batch: dict[str, Any]) -> None:
        """Count corrupt images; DataError if too many are, or all of this batch."""
        self.skipped.count(cast(Batch, batch))
        if not batch["size"]:
            raise DataError(
                f"every image of a batch is corrupt ({batch['skipped'][0]}): replace them, or raise loop.batch_size"
            )

    def before_epoch(self, epoch: int) -> None:
        self.views = self.train_set.views(self.loop.seed, epoch)

    def pixel_values(self, batch: dict[str, Any]) -> Tensor:
        return batch["pixel_values"].to(self.processes.device, non_blocking=True)

    def batches(self, dataset: torch.utils.data.Dataset, batch_size: int | None = None) -> Iterator[Batch]:
        """A data set in order, in batches, without its corrupt images, which are counted."""
        batch_size = batch_size or self.loop.batch_size // self.loop.accumulation_steps
        loader = torch.utils.data.DataLoader(
            dataset, batch_size, collate_fn=collate, generator=torch.Generator()
        )
        for batch in loader:
            self.skipped.count(batch)
            if len(batch["indices"]):
                yield batch

    def images(self, dataset: torch.utils.data.Dataset, batch_size: int | None = None) -> Iterator[Tensor]:
        return (batch["pixel_values"] for batch in self.batches(dataset, batch_size))

    def pairs(self, tokenizer: VQVAEModel, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (validation images, their reconstructions) on the device."""
        number = len(self.validation_set) if limit is None else min(limit, len(self.validation_set))
        for batch in self.images(torch.utils.data.Subset(self.validation_set, range(number))):
            originals = batch.to(tokenizer.device)
            yield originals, tokenizer.decode(tokenizer.encode(originals))

    def shown_pairs(self, tokenizer: VQVAEModel) -> dict[str, NDArray[np.uint8]]:
        """The first validation images, `originals`, and their `reconstructions`, `(n, H, W, 3)`."""
        originals, reconstructions = zip(*self.pairs(tokenizer, SHOWN_IMAGES), strict=True)
        pairs = {"originals": torch.cat(originals), "reconstructions": torch.cat(reconstructions)}
        return {name: self.processor.postprocess(value, output_type="np") for name, value in pairs.items()}

    def save(self, folder: Path, training_data: TrainingData | None = None) -> None:
        save_model(folder, self.model, self.processor, training_data=training_data)

    def write_shown_pairs(self, tokenizer: VQVAEModel, folder: Path) -> None:
        arrays = {name: torch.from_numpy(pixels) for name, pixels in self.shown_pairs(tokenizer).items()}
        write_tensors(folder / "arrays" / "reconstructions.safetensors", arrays)


def open_images(
    recipe: DataRecipe, processor: IsicVQImageProcessor
) -> tuple[DecodedImages | StreamedImages, DecodedImages, dict[str, SourceInfo]]:
    """Training and validation images, and the public descriptions of their sources; DataError if they cannot be used."""
    source, train, validation, infos = open_data(recipe)
    validation_set = DecodedImages(validation, processor, cache=recipe.cache)
    if train is None:
        return StreamedImages(source, processor, infos["train"].num_images), validation_set, infos
    whole, shard_sizes = source.source if isinstance(source, SelectedSource) else source, None
    if isinstance(whole, PreparedSource) and len(train) == sum(whole.shard_sizes):  # all rows, not a part
        shard_sizes = whole.shard_sizes
    train_set = DecodedImages(train, processor, cache=recipe.cache, shard_sizes=shard_sizes)
    return train_set, validation_set, infos


def open_data(recipe: DataRecipe) -> "tuple[Source, Dataset | None, Dataset, dict[str, SourceInfo]]":
    """Training source and, unless it is streamed, its records; validation records; public descriptions of both."""
    if not recipe.train:
        raise DataError("data.train is not set: name your images, for example data.train=folder:my_images")
    whole = find_source(recipe.train, recipe.declared_classes)
    is_streamed = recipe.stream or not whole.has_random_access
    if is_streamed and not recipe.validation:
        raise DataError(
            f"data.train={whole.name} is streamed, so no part of it can be split off for validation: name "
            "data.validation, or write the images to files first, with isic-vq data prepare"
        )
    if not recipe.validation:
        parts = split_source(whole, recipe.validation_share, recipe.licenses)
        infos = {"train": parts[0].describe(), "validation": parts[1].info}
        everything = whole.dataset()
        return parts[0], parts[0].dataset(everything), parts[1].dataset(everything), infos
    train = licensed(whole, recipe.licenses)
    infos = {"train": train.describe()}
    validation, infos["validation"] = open_validation(recipe, infos["train"])
    records = validation.dataset() if validation.has_random_access else read_into_memory(validation)
    if is_streamed:
        return train, None, records, infos
    rows = train.dataset()
    warn_of_shared(*({name: part[name] for name in GROUP_COLUMNS} for part in (rows, records)))
    return train, rows, records, infos


def open_validation(recipe: DataRecipe, train: SourceInfo) -> tuple[Source, SourceInfo]:
    """Open the validation images that a recipe names; DataError for a declared class without a training image."""
    classes, declared = recipe.declared_classes, recipe.classes is not None
    if declared and recipe.drop_other_classes:
        classes = Classes(tuple(train.classes or ()), "drop")
    source = find_source(str(recipe.validation), classes)
    info = source.describe()
    new = {name: number for name, number in info.diagnoses.items() if name not in {*train.diagnoses, UNKNOWN}}
    if new and declared:
        raise new_classes(new, "data.drop_other_classes=true")
    if new:
        logger.warning("validation images of classes that no training image has: %s", counted(new))
    return source, info
