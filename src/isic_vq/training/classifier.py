"""Train a small image classifier of diagnoses: a feature space for distances, and the student of the utility study.

Source: ResNet, He et al., arXiv 1512.03385, as transformers has it; logit-adjusted cross-entropy, Menon et al., "Long-Tail
Learning via Logit Adjustment", arXiv 2007.07314, eq. 10 with tau = 1. A nevus is seventy times as common as a
dermatofibroma: the adjustment takes how common classes are out of the logits, so that their argmax is the best guess
where all diagnoses are equally likely, and it needs no resampling.

Images labelled `unknown` are left out, and so are those of diagnoses that no training image has; the report counts
them. As in the tokenizer's stage, the better of the best raw model and the averaged one becomes `model/`.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from isic_vq.data.classes import ordered_classes
from isic_vq.data.loading import DecodedImages
from isic_vq.data.provenance import TrainingData
from isic_vq.data.schema import DataError
from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval
from isic_vq.evaluation.measured_images import MIN_GROUP
from isic_vq.evaluation.measures import classifier_measures
from isic_vq.evaluation.report import Metric, Report
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.training.image_task import ImageTask, open_data
from isic_vq.training.loop import Trainer, run_stage
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import ClassifierRecipe
from isic_vq.training.run import build_config, save_model

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MEAN = STD = 0.5  # of each channel, as preprocessor_config.json has them
REFIT_BATCHES = 64  # batches that re-estimate BatchNorm's statistics under averaged parameters


def build_classifier(fields: dict[str, Any], classes: Sequence[str]) -> ResNetForImageClassification:
    """Make a ResNet with new weights; RecipeError for a field that `ResNetConfig` does not have, or a wrong value."""
    config = build_config(ResNetConfig, fields)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def normalised(pixel_values: Tensor) -> Tensor:
    """What the network takes of images `(B, 3, H, W)` in [0, 1]."""
    return (pixel_values - MEAN) / STD


def class_log_shares(labels: Tensor, num_classes: int) -> Tensor:
    """Logarithm of each class's share `(num_classes,)` of `labels` `(N,)`, which hold each class at least once."""
    return (torch.bincount(labels, minlength=num_classes) / len(labels)).log()


def balanced_cross_entropy(logits: Tensor, labels: Tensor, log_shares: Tensor) -> Tensor:
    """Logit-adjusted cross-entropy in nats per image: -log softmax(logits + log_shares)[label], mean over the batch.

    Logits are `(B, C)`, labels `(B,)` int64, the logarithms of `class_log_shares` `(C,)`.
    """
    return F.cross_entropy(logits.float() + log_shares, labels)


def random_colours(num_images: int, strength: float, seed: int, epoch: int) -> Tensor:
    """Draw how the colours of each image of a data set change in an epoch: a function of the arguments alone.

    `(num_images, 2, 3)` float32: by image, a factor for each channel, uniform in 1 +- strength, and an offset, uniform in
    +- strength / 2, strength in [0, 1); see `recoloured`.
    """
    state = np.random.SeedSequence(seed, spawn_key=(epoch, 1)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    changes = strength * (2 * torch.rand(num_images, 2, 3, generator=generator) - 1)
    return changes * torch.tensor([1.0, 0.5])[:, None] + torch.tensor([1.0, 0.0])[:, None]


def recoloured(pixel_values: Tensor, colours: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1] times factors and plus offsets `(B, 2, 3)` of `random_colours`, clamped to [0, 1]."""
    factors, offsets = colours[..., None, None].unbind(1)
    return (pixel_values * factors + offsets).clamp(0, 1)


class ClassifierTask(ImageTask):
    """The classifier stage: `model` is a `ResNetForImageClassification`, and every image has a class."""

    left_out: dict[str, int]  # number of images without a class, by split

    def begin(self, processes: Processes) -> None:
        super().begin(processes)
        self.log_shares = class_log_shares(torch.tensor(self.train_set.labels), self.model.config.num_labels)

    def before_epoch(self, epoch: int) -> None:
        super().before_epoch(epoch)
        strength = self.recipe.colour_strength
        self.colours = random_colours(self.train_set.num_images, strength, self.loop.seed, epoch)

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        pixel_values = self.pixel_values(batch)
        labels = batch["labels"].to(pixel_values.device)
        if self.augment:
            pixel_values = recoloured(pixel_values, self.colours[batch["indices"]].to(pixel_values.device))
        logits = model(normalised(pixel_values)).logits
        return {
            "loss": balanced_cross_entropy(logits, labels, self.log_shares.to(logits.device)),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }

    def predict(self) -> tuple[Tensor, Tensor]:
        """Logits `(N, C)` and labels `(N,)` of the validation images, on the CPU."""
        batches = list(self.batches(self.validation_set))
        images = (batch["pixel_values"] for batch in batches)
        return predict(self.model, images), torch.cat([batch["labels"] for batch in batches])

    def validate(self) -> dict[str, float]:
        logits, labels = self.validated = self.predict()
        loss = balanced_cross_entropy(logits, labels, self.log_shares).item()
        classes = list(self.model.config.id2label.values())
        measures = classifier_measures(classes, labels)
        values = {name: measures[name, None](logits, labels) for name in ("accuracy", "balanced_accuracy")}
        return {"loss": loss, **values}

    def save(self, folder: Path, training_data: TrainingData | None = None) -> None:
        save_model(folder, self.model, preprocessor(self.recipe.image_size), training_data=training_data)

    def refit_statistics(self) -> None:
        chosen = self.train_set.sample(REFIT_BATCHES * self.loop.batch_size, self.loop.seed + 1)
        update_bn(map(normalised, self.images(chosen)), self.model, self.model.device)

    def conclude(self, trainer: Trainer) -> Report:
        variant = self.choose_best(trainer, "loss", "classifier")
        logits, labels = self.validated
        classes = list(self.model.config.id2label.values())
        pairs = torch.bincount(labels * len(classes) + logits.argmax(1), minlength=len(classes) ** 2)
        return self.write_report(
            trainer.run.folder,
            {
                "type": self.model.config.model_type,
                "weights": variant,
                "num_parameters": self.model.num_parameters(),
            },
            classifier_metrics(logits, labels, classes, self.log_shares, self.validation),
            classes=classes,
            confusion=pairs.view(
                len(classes), -1
            ).tolist(),  # images by class, and by the one they were given
            left_out=self.left_out,
        )


@torch.no_grad()
def predict(model: ResNetForImageClassification, batches: Iterable[Tensor]) -> Tensor:
    """Logits `(N, C)` on the CPU of batches of images `(B, 3, H, W)` in [0, 1]."""
    model.eval()
    return torch.cat([model(normalised(images.to(model.device))).logits.float().cpu() for images in batches])


def classifier_metrics(
    logits: Tensor, labels: Tensor, classes: Sequence[str], log_shares: Tensor, on: MeasuredOn
) -> list[Metric]:
    """Compute the report's lines: `classifier_measures`, cross-entropy, and recall and AUC of classes of `MIN_GROUP` images.

    Logits are `(N, C)`, labels `(N,)` int64, the logarithms of `class_log_shares` `(C,)`.
    """
    right = logits.argmax(1) == labels
    can_be_resampled = bool((labels.bincount() > 1).any())  # else every draw would be the images themselves
    members = {name: labels == index for index, name in enumerate(classes)}
    large = [name for name in classes if members[name].sum() >= MIN_GROUP]
    metrics = [on.share("accuracy", int(right.sum()), len(right))]
    for (name, positive), measure in classifier_measures(classes, labels).items():
        if name != "accuracy" and (positive is None or positive in large):
            interval = None
            if can_be_resampled:
                interval = bootstrap_interval(
                    lambda rows, measure=measure: measure(logits[rows], labels[rows]),
                    np.arange(len(labels)),
                    strata=labels,
                )
            shown = {} if positive is None else {"positive": positive}
            value = measure(logits, labels)
            metrics.append(on.metric(name, value, "1", len(labels), None, interval, **shown))
    losses = F.cross_entropy(logits + log_shares, labels, reduction="none").double()
    metrics.append(on.mean("cross_entropy", losses, "nats per image"))
    for name in large:
        hits = right[members[name]]
        metrics.append(on.share("recall", int(hits.sum()), len(hits), diagnosis=name))
    return metrics


def preprocessor(image_size: int) -> ConvNextImageProcessorPil:
    """Image processor of transformers for the network, from images of any size."""
    return ConvNextImageProcessorPil(
        size={"shortest_edge": image_size}, crop_pct=1.0, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


def known_classes(diagnoses: Sequence[str], declared: Sequence[str] | None = None) -> list[str]:
    """The classes that occur, in the order of `ordered_classes`; DataError for fewer than two."""
    classes = ordered_classes(diagnoses, declared)
    if len(classes) < 2:
        raise DataError(f"the training images have {classes or 'no class'}: expected at least two classes")
    return classes


def labelled(records: "Dataset", classes: Sequence[str], name: str) -> "Dataset":
    """The records of these classes; DataError if there are none."""
    rows = [row for row, diagnosis in enumerate(records["diagnosis"]) if diagnosis in classes]
    if not rows:
        raise DataError(f"no image of {name} has one of the diagnoses {', '.join(classes)}")
    if len(rows) < len(records):
        logger.info(
            "%d of %d images of %s have none of the classes' diagnoses and are left out",
            len(records) - len(rows),
            len(records),
            name,
        )
    return records.select(rows)


def open_task(recipe: ClassifierRecipe) -> ClassifierTask:
    """Open the images of a recipe, without those of no class, and create a classifier."""
    source, train, validation, sources = open_data(recipe.data)
    if train is None:
        raise DataError(f"data.train={source.name} is streamed: write it to files with isic-vq data prepare")
    classes = known_classes(train["diagnosis"], sources["train"].classes)
    parts = {"train": train, "validation": validation}
    kept = {name: labelled(records, classes, sources[name].name) for name, records in parts.items()}
    processor = IsicVQImageProcessor(size=recipe.image_size)
    label2id = {name: index for index, name in enumerate(classes)}
    train_set, validation_set = (
        DecodedImages(kept[name], processor, label2id, cache=recipe.data.cache) for name in parts
    )
    torch.manual_seed(recipe.loop.seed)
    model = build_classifier(recipe.model, classes)
    task = ClassifierTask(model, processor, train_set, validation_set, recipe)
    task.left_out = {name: len(parts[name]) - len(kept[name]) for name in parts}
    task.sources, task.settings = sources, recipe.model
    return task


def train_classifier(recipe: ClassifierRecipe, resume: bool = False) -> Report | None:
    """Train a classifier: writes `model/` and `report.json`, which the main process returns; see `train_vqvae`."""
    return run_stage(open_task, recipe, resume)
