"""What are generated images worth to a classifier? Trained on real, on generated and on both, tested on real images.

Source: train-on-synthetic-test-on-real, Esteban et al., "Real-valued (Medical) Time Series Generation with Recurrent
Conditional GANs", arXiv 1706.02633, section 4.1, and "GAN-train", Shmelkov et al., arXiv 1807.09499. Differs: every
arm is repeated with several seeds, each of which draws new weights, a new order and, in the arms that have them, newly
generated images; and numbers have intervals over seeds and test images at once.

Generated images follow the real training images one for one: image i is asked for with the diagnosis of real image i,
so both sets have the same class counts. All arms take the same number of optimizer steps, in the same recipe, without
a look at the test images; the arm of both sets sees each image half as often.

In the work folder: `settings.json`, `synthetic-seedN/` (shards of generated images) and `ARM-seedN.json` (the logits
of the test images). What is there is not done again, so a killed run goes on where it was.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ResNetForImageClassification

from isic_vq.data.augmentation import dihedral, random_views
from isic_vq.data.loading import iter_batches
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.sources.base import hash_ids
from isic_vq.evaluation.images import MIN_GROUP
from isic_vq.evaluation.intervals import bootstrap_interval
from isic_vq.evaluation.report import Metric
from isic_vq.files import write_atomically
from isic_vq.generation import generate_shards
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.training.classifier import (
    Measure,
    balanced_cross_entropy,
    build_classifier,
    class_log_shares,
    known_classes,
    labelled,
    measures,
    normalised,
    predict,
    random_colours,
    recoloured,
)
from isic_vq.training.loop import learning_rate_scale

logger = logging.getLogger(__name__)

ARMS = ("real", "synthetic", "real+synthetic")
MEASURES = ("balanced_accuracy", "melanoma_auc")

Statistic = Callable[[int, Tensor], float]  # of a seed's number and the rows of test images


@dataclass(frozen=True)
class Student:
    """How every classifier of the study is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        image_size: side in pixels.
        learning_rate: peak of the schedule: a tenth of the steps up, then cosine to zero.
        weight_decay: AdamW's.
        colour_strength: as the classifier's recipe has it; views are dihedral.
        model: fields of `ResNetConfig`.
    """

    steps: int = 1500
    batch_size: int = 32
    image_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    colour_strength: float = 0.15
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64, 128],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
        }
    )


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory.

    Attributes:
        pixels: `(N, 3, H, W)` uint8.
        labels: `(N,)` int64 class ids.
    """

    pixels: Tensor
    labels: Tensor

    def __add__(self, other: "LabelledImages") -> "LabelledImages":
        return LabelledImages(torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels]))


def evaluate_utility(
    model: IsicVQModel,
    train: str,
    test: str,
    work_dir: Path,
    *,
    seeds: int = 5,
    student: Student | None = None,
    limit: int | None = None,
    split: str = "test",
    resamples: int = 1000,
) -> list[Metric]:
    """Train the classifiers that are not trained yet, and compare them on real images.

    Args:
        model: what generates, in eval mode.
        train: URI of the real training images; those labelled `unknown` are left out.
        test: URI of real images that neither `model` nor a classifier was trained on; those of other diagnoses than
            the training images' are left out.
        work_dir: the study's folder, see the module.
        seeds: how often each arm is trained, at least 2; seeds 0, 1, ...
        student: how each classifier is trained.
        limit: train and test on a seeded subset of at most so many images each; for a quick try.
        split: what the lines call the test images.
        resamples: bootstrap draws.

    Returns:
        For each arm "balanced_accuracy[ARM]" and, where there are melanomas and others, "melanoma_auc[ARM]", means over
        the seeds; how much more they are than with real images, "balanced_accuracy_gain[ARM]" and so on, paired by
        seed and test image; and "sensitivity[ARM, diagnosis=NAME]" of the diagnoses of at least `MIN_GROUP` test images.
        Intervals: `two_level_interval`.

    Raises:
        ValueError: fewer than two seeds, or the folder was begun with other settings or another model.
        DataError: the images cannot be used.
    """
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}: expected at least 2, or nothing tells how much a seed decides")
    student = student or Student()
    train_records, classes, train_about = _records(train, None, limit)
    test_records, _, test_about = _records(test, classes, limit)
    settings = {"train": train_about, "test": test_about, "student": asdict(student)}
    _check_settings(work_dir / "settings.json", settings)
    read = _Reader(student.image_size, classes)
    real, tested = read(train_records), read(test_records)
    diagnoses = train_records["diagnosis"]
    logits: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        folder = work_dir / f"synthetic-seed{seed}"
        generate_shards(model, folder, len(diagnoses), diagnoses, seed=seed)  # only what is missing
        for arm in ARMS:
            path = work_dir / f"{arm}-seed{seed}.json"
            if not path.is_file():
                images = real
                if arm != "real":
                    synthetic = read(find_source(f"parquet:{folder / 'images-*.parquet'}").dataset())
                    images = synthetic if arm == "synthetic" else real + synthetic
                classifier = train_student(images, classes, student, seed).to(model.device)
                found = predict(classifier, _float_batches(tested.pixels, student.batch_size))
                write_atomically(path, json.dumps({"logits": found.tolist()}).encode())
                logger.info("trained on %s with seed %d", arm, seed)
            logits[arm].append(torch.tensor(json.loads(path.read_text())["logits"]))
    return utility_metrics(logits, tested.labels, classes, split, test_about["name"], resamples)


def train_student(
    images: LabelledImages, classes: Sequence[str], student: Student, seed: int
) -> ResNetForImageClassification:
    """Train a new classifier, on the GPU if there is one; a function of the arguments on one machine.

    Args:
        images: at least one of each class.
        classes: name of each class.
        student: how.
        seed: of weights, order and augmentation.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier(student.model, classes).to(device).train()
    log_shares = class_log_shares(images.labels, len(classes)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=student.learning_rate, weight_decay=student.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_scale(step, max(1, student.steps // 10), student.steps)
    )
    number, size = len(images.labels), min(student.batch_size, len(images.labels))
    generator = torch.Generator().manual_seed(seed)
    for step in range(student.steps):
        epoch, batch = divmod(step, number // size)
        if batch == 0:
            order = torch.randperm(number, generator=generator)
            views = random_views(number, seed, epoch)
            colours = random_colours(number, student.colour_strength, seed, epoch)
        rows = order[batch * size : (batch + 1) * size]
        pixel_values = dihedral(images.pixels[rows], views[rows]).to(device).float() / 255
        pixel_values = recoloured(pixel_values, colours[rows].to(device))
        logits = model(normalised(pixel_values).contiguous(memory_format=torch.channels_last)).logits
        optimizer.zero_grad(set_to_none=True)
        balanced_cross_entropy(logits, images.labels[rows].to(device), log_shares).backward()
        optimizer.step()
        scheduler.step()
    return model


def utility_metrics(
    logits: dict[str, list[Tensor]],
    labels: Tensor,
    classes: Sequence[str],
    split: str,
    dataset: str,
    resamples: int = 1000,
) -> list[Metric]:
    """The lines of `evaluate_utility`.

    Args:
        logits: by arm, "real" first, `(N, C)` of the test images for each seed.
        labels: `(N,)` int64, theirs.
        classes: name of each class.
        split: of the test images.
        dataset: theirs.
        resamples: bootstrap draws.
    """
    real, *others = logits
    metrics = []

    def add(name: str, statistic: Statistic, rows: Tensor) -> None:
        low, high, mean = two_level_interval(statistic, len(logits[real]), labels, rows, resamples)
        metrics.append(Metric(name, mean, "1", len(rows), split, dataset, 0, [low, high]))

    every, known = torch.arange(len(labels)), measures(classes, labels)
    for name in MEASURES:
        if name in known:
            statistics = {arm: _of_images(known[name], logits[arm], labels) for arm in logits}
            for arm, statistic in statistics.items():
                add(f"{name}[{arm}]", statistic, every)
            for arm in others:
                add(f"{name}_gain[{arm}]", _difference(statistics[arm], statistics[real]), every)
    for index, diagnosis in enumerate(classes):
        members = torch.nonzero(labels == index).flatten()
        if len(members) >= MIN_GROUP:
            for arm in logits:
                sensitivity = _of_images(known["accuracy"], logits[arm], labels)
                add(f"sensitivity[{arm}, diagnosis={diagnosis}]", sensitivity, members)
    return metrics


def _of_images(measure: Measure, logits: Sequence[Tensor], labels: Tensor) -> Statistic:
    """A measure of one seed's logits at some test images."""
    return lambda seed, rows: measure(logits[seed][rows], labels[rows])


def _difference(one: Statistic, other: Statistic) -> Statistic:
    """One minus the other, of the same seed and images."""
    return lambda seed, rows: one(seed, rows) - other(seed, rows)


def two_level_interval(
    statistic: Statistic,
    num_seeds: int,
    labels: Tensor,
    rows: Tensor,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """Interval of a mean over seeds of a statistic of test images, where both could have been others.

    Seeds and, within each class, test images are drawn together by `bootstrap_interval`: the seeds are one more
    stratum. All seeds are tested on the same images, so one draw of images serves all of them. Five seeds are few:
    where they decide more than the images do, the interval is somewhat too narrow.

    Args:
        statistic: of a seed's number and of rows, which may occur twice.
        num_seeds: how many seeds there are.
        labels: `(N,)` int64, classes of all test images.
        rows: `(M,)` int64, the test images that the statistic is of.
        resamples: bootstrap draws.

    Returns:
        Low, high, and the mean over seeds of the statistic of `rows`.
    """
    strata = np.concatenate([np.full(num_seeds, -1), labels[rows].numpy()])

    def mean_over_seeds(drawn: NDArray[np.int64]) -> float:
        images = rows[torch.from_numpy(drawn[drawn >= num_seeds] - num_seeds)]
        numbers, counts = np.unique(drawn[drawn < num_seeds], return_counts=True)
        return float(np.average([statistic(int(seed), images) for seed in numbers], weights=counts))

    everything = np.arange(len(strata))
    low, high = bootstrap_interval(mean_over_seeds, everything, strata=strata, resamples=resamples)
    return low, high, mean_over_seeds(everything)


class _Reader:
    """Decodes records into memory."""

    def __init__(self, size: int, classes: Sequence[str]):
        self.processor = IsicVQImageProcessor(size=size)
        self.label2id = {name: index for index, name in enumerate(classes)}

    def __call__(self, records: Any) -> LabelledImages:
        batches = list(iter_batches(records, self.processor, 64, self.label2id))
        pixels = torch.cat([(batch["pixel_values"] * 255).round().to(torch.uint8) for batch in batches])
        return LabelledImages(pixels.contiguous(), torch.cat([batch["labels"] for batch in batches]))


def _records(uri: str, classes: list[str] | None, limit: int | None) -> tuple[Any, list[str], dict[str, Any]]:
    """Records of the classes, by default all that occur; the classes; and what settles which records these are."""
    source = find_source(uri)
    if not source.has_random_access:
        raise DataError(f"{source.name} can only be streamed: write it to files with isic-vq data prepare")
    records = source.dataset()
    if limit is not None and limit < len(records):
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
        records = records.select(sorted(order[:limit].tolist()))
    classes = classes or known_classes(records["diagnosis"])
    records = labelled(records, classes, source.name)
    about = {"name": source.name, "fingerprint": source.fingerprint(), "num_images": len(records)}
    return records, classes, {**about, "ids_sha256": hash_ids(records["isic_id"]), "classes": classes}


def _float_batches(pixels: Tensor, size: int) -> Any:
    """Batches of images in [0, 1] of images `(N, 3, H, W)` uint8."""
    return (batch.float() / 255 for batch in pixels.split(size))


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Note the settings in the folder, or compare them with those that it was begun with."""
    if path.is_file():
        begun = json.loads(path.read_text())
        for key, value in settings.items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{path.parent.name} was begun with other settings of {key}: choose another work folder, or remove "
                    "this one"
                )
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())
