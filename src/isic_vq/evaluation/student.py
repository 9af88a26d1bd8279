"""Small classifiers that measure generated images, trained with several seeds on images in memory.

`Student` holds the settings of a training, `train_student` trains one classifier, and `two_level_interval` is the interval of a
mean over several of them.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetForImageClassification

from isic_vq.data.augmentation import dihedral, random_views
from isic_vq.data.classes import Classes
from isic_vq.data.loading import iter_batches
from isic_vq.data.order import seeded_subset
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.sources.base import hash_ids
from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval
from isic_vq.evaluation.report import Metric, Report, environment
from isic_vq.files import write_atomically
from isic_vq.generate import generate_shards
from isic_vq.hub.pretrained import find_device
from isic_vq.models.checks import expect
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.training.classifier import (
    balanced_cross_entropy,
    build_classifier,
    class_log_shares,
    known_classes,
    labelled,
    normalised,
    predict,
    random_colours,
    recoloured,
)
from isic_vq.training.loop import learning_rate_scale
from isic_vq.work import begin

logger = logging.getLogger(__name__)

Statistic = Callable[[int, Tensor], float]  # of a seed's number and the rows of test images
SMALL_RESNET = {  # fields of `ResNetConfig`
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


@dataclass(frozen=True)
class Student:
    """Settings of a training."""

    steps: int = 1500
    passes: float | None = None  # how often each image is shown; it decides the number of steps
    batch_size: int = 32
    image_size: int = 64  # side in pixels
    learning_rate: float = 2e-3  # peak: after a warm-up of a tenth of the steps a cosine falls to zero
    weight_decay: float = 0.05
    augment: bool = True  # show each image in a random dihedral view, its colours changed at random
    colour_strength: float = 0.15  # see `random_colours`
    # Weigh each image's cross-entropy by one over its class's share, instead of the logit adjustment.
    class_weights: bool = False
    model: dict[str, Any] = field(default_factory=lambda: dict(SMALL_RESNET))


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory."""

    pixels: Tensor  # `(N, 3, H, W)` uint8
    labels: Tensor  # `(N,)` int64 class ids

    def __add__(self, other: "LabelledImages") -> "LabelledImages":
        return LabelledImages(torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels]))


def train_student(
    images: LabelledImages, classes: Sequence[str], student: Student, seed: int, device: str | None = None
) -> ResNetForImageClassification:
    """Train a new classifier, on the GPU if there is one or on `device`; a function of the arguments on one machine."""
    place = find_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_classifier(student.model, classes).to(place).train()
    log_shares = class_log_shares(images.labels, len(classes)).to(place)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=student.learning_rate, weight_decay=student.weight_decay, fused=True
    )
    number, size = len(images.labels), min(student.batch_size, len(images.labels))
    steps = student.steps if student.passes is None else max(1, round(student.passes * number / size))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_scale(step, max(1, steps // 10), steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        epoch, batch = divmod(step, number // size)
        if batch == 0:
            order = torch.randperm(number, generator=generator)
            views = random_views(number, seed, epoch)
            colours = random_colours(number, student.colour_strength, seed, epoch)
        rows = order[batch * size : (batch + 1) * size]
        pixels = dihedral(images.pixels[rows], views[rows]) if student.augment else images.pixels[rows]
        pixel_values = pixels.to(place).float() / 255
        if student.augment:
            pixel_values = recoloured(pixel_values, colours[rows].to(place))
        logits = model(normalised(pixel_values).contiguous(memory_format=torch.channels_last)).logits
        labels = images.labels[rows].to(place)
        optimizer.zero_grad(set_to_none=True)
        if student.class_weights:
            loss = F.cross_entropy(logits, labels, weight=(-log_shares).exp())
        else:
            loss = balanced_cross_entropy(logits, labels, log_shares)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


def training_operations(student: Student, num_classes: int) -> float:
    """Floating-point operations of a student's forward and backward pass, per image; a multiplication and an addition are two."""
    model = build_classifier(student.model, [str(index) for index in range(num_classes)])
    side = student.image_size
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, side, side)).logits.sum().backward()
    return float(counter.get_total_flops() / 2)


def two_level_interval(
    statistic: Statistic,
    num_seeds: int,
    labels: Tensor,
    rows: Tensor,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """Interval of a mean over seeds of a statistic of test images, for other seeds and other test images.

    `bootstrap_interval` draws seeds and, within each class, test images together: the seeds are one more stratum. All seeds are
    tested on the same images, so one draw of images serves all of them. Five seeds are few: where they decide more than the
    images do, the interval is somewhat too narrow.

    `labels` `(N,)` are the classes of all test images, `rows` `(M,)` those that the statistic is of.

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


class ClassifierStudy:
    """Real images, generated ones of the same diagnoses, and the classifiers trained on them with several seeds.

    The work folder holds `settings.json`, folders of shards of generated images, and for each classifier a JSON file of the test
    images' logits and of the processor seconds it took. Finished files are not made again, so the same call resumes a killed run.

    Args:
        model: generates images; in eval mode.
        train: URI of the real training images; those labelled `unknown` are left out.
        tests: URIs of other real images, which `model` was not trained on either, by what the report calls them; those of
            other diagnoses than the training images' are left out.
        work_dir: the study's folder.
        seeds: how often each classifier is trained, at least 2; seeds 0, 1, ...
        student: how each classifier is trained.
        limit: largest number of training images, and of test images, each a seeded subset; for a quick try.

    Attributes:
        records: of the real images: "train", and the tests by name.
        classes: the training images' diagnoses.
        on: split and data set of each test.

    Raises:
        ValueError: fewer than two seeds, or the folder was begun with other settings.
        DataError: the images cannot be used.
    """

    def __init__(
        self,
        model: IsicVQModel,
        train: str,
        tests: Mapping[str, str],
        work_dir: Path,
        *,
        seeds: int,
        student: Student,
        limit: int | None = None,
    ):
        if seeds < 2:
            raise ValueError(f"seeds is {seeds}: expected at least 2, to tell how much a seed decides")
        expect(student.steps >= 1, "steps", student.steps, "at least 1")
        self.model, self.work_dir, self.seeds, self.student = model, work_dir, range(seeds), student
        self.limit, self.labels = limit, Classes.of_model(model.config.class_names.values())
        records, self.classes, about = study_records(train, None, limit, self.labels)
        self.records, abouts = {"train": records}, {"train": about}
        for split, uri in tests.items():
            self.records[split], _, abouts[split] = study_records(uri, self.classes, limit, self.labels)
        self.on = {split: MeasuredOn(split, abouts[split]["name"]) for split in tests}
        begin(work_dir, {**abouts, "student": asdict(student)})

    def report(self, metrics: list[Metric]) -> Report:
        """A report of what was measured, which names the model and how the classifiers were trained."""
        description = {
            "name": Path(self.model.name_or_path).name,
            "classifier": asdict(self.student),
            "seeds": len(self.seeds),
            "limit": self.limit,
        }
        return Report(description, metrics, environment=environment(str(self.model.device)))

    def read(self, records: Any, size: int | None = None) -> LabelledImages:
        """Images of records in memory, by default at the size that classifiers see."""
        processor = IsicVQImageProcessor(size=size or self.student.image_size)
        label2id = {name: index for index, name in enumerate(self.classes)}
        batches = list(iter_batches(records, processor, 64, label2id))
        pixels = torch.cat([(batch["pixel_values"] * 255).round().to(torch.uint8) for batch in batches])
        return LabelledImages(pixels.contiguous(), torch.cat([batch["labels"] for batch in batches]))

    def generated(self, name: str, part: str, seed: int) -> Any:
        """Records of generated images, image i for the diagnosis of real image i of a part; missing ones are generated."""
        diagnoses, folder = self.records[part]["diagnosis"], self.work_dir / name
        generate_shards(self.model, folder, len(diagnoses), diagnoses, seed=seed)
        return find_source(f"parquet:{folder / 'images-*.parquet'}", self.labels).dataset()

    def logits(
        self,
        name: str,
        seed: int,
        images: Callable[[], LabelledImages],
        classes: Sequence[str],
        pixels: Tensor,
        student: Student | None = None,
    ) -> Tensor:
        """A classifier's logits `(N, C)` of test images `(N, 3, H, W)` uint8, from its file; if missing, it is trained first.

        `student` is how, by default as the study's.
        """
        path, student = self.work_dir / f"{name}-seed{seed}.json", student or self.student
        if not path.is_file():
            begun = time.process_time()
            classifier = train_student(images(), classes, student, seed, str(self.model.device))
            batches = (batch.float() / 255 for batch in pixels.split(student.batch_size))
            logits = predict(classifier, batches).tolist()
            seconds = time.process_time() - begun
            write_atomically(path, json.dumps({"seconds": seconds, "logits": logits}).encode())
            logger.info("trained %s in %.1f s", path.stem, seconds)
        return torch.tensor(json.loads(path.read_text(encoding="utf-8"))["logits"])


def study_records(
    uri: str, classes: list[str] | None, limit: int | None, labels: Classes | None = None
) -> tuple[Any, list[str], dict[str, Any]]:
    """Records of the classes, by default all that occur; the classes; and what identifies the records in settings."""
    source = find_source(uri, labels)
    if not source.has_random_access:
        raise DataError(f"{source.name} can only be streamed: write it to files with isic-vq data prepare")
    records = source.dataset()
    if limit is not None and limit < len(records):
        records = records.select(sorted(seeded_subset(len(records), limit, seed=0).tolist()))
    classes = classes or known_classes(records["diagnosis"], source.classes.names)
    records = labelled(records, classes, source.name)
    identity = {"name": source.name, "fingerprint": source.fingerprint(), "num_images": len(records)}
    return records, classes, {**identity, "ids_sha256": hash_ids(records["isic_id"]), "classes": classes}
