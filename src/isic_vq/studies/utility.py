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

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from isic_vq.data.classes import Classes
from isic_vq.data.sources import find_source
from isic_vq.evaluation.images import MIN_GROUP
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import Measure, classifier_measures
from isic_vq.evaluation.report import Metric
from isic_vq.generation import generate_shards
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.studies.student import (
    ImageReader,
    LabelledImages,
    Statistic,
    Student,
    study_records,
    tested_logits,
    two_level_interval,
)
from isic_vq.work import begin

ARMS = ("real", "synthetic", "real+synthetic")


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
    auc_of: Sequence[str] | None = None,
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
        auc_of: classes whose AUC against all others is reported; None reports all of at least `MIN_GROUP` test images.

    Returns:
        For each arm (label `arm`) `balanced_accuracy` and, for each class of `auc_of` (label `positive`), `auc`, means over
        the seeds; how much more they are than with real images, `balanced_accuracy_gain` and so on, paired by seed and
        test image; and `sensitivity` of the diagnoses of at least `MIN_GROUP` test images. Intervals: `two_level_interval`.

    Raises:
        ValueError: fewer than two seeds, a class of `auc_of` that is not there, or the folder was begun with other
            settings or another model.
        DataError: the images cannot be used.
    """
    if seeds < 2:
        raise ValueError(f"seeds is {seeds}: expected at least 2, or nothing tells how much a seed decides")
    student = student or Student()
    generated = Classes.of_model(model.config.class_names.values())
    train_records, classes, train_about = study_records(train, None, limit, generated)
    test_records, _, test_about = study_records(test, classes, limit, generated)
    if missing := [name for name in auc_of or () if name not in classes]:
        raise ValueError(f"auc_of names {', '.join(missing)}: expected some of {', '.join(classes)}")
    settings = {"train": train_about, "test": test_about, "student": asdict(student)}
    begin(work_dir, settings)
    read = ImageReader(student.image_size, classes)
    real, tested = read(train_records), read(test_records)

    def training_images(arm: str, folder: Path) -> LabelledImages:
        if arm == "real":
            return real
        synthetic = read(find_source(f"parquet:{folder / 'images-*.parquet'}", generated).dataset())
        return synthetic if arm == "synthetic" else real + synthetic

    diagnoses = train_records["diagnosis"]
    logits: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        folder = work_dir / f"synthetic-seed{seed}"
        generate_shards(model, folder, len(diagnoses), diagnoses, seed=seed)  # only what is missing
        for arm in ARMS:
            path, images = work_dir / f"{arm}-seed{seed}.json", partial(training_images, arm, folder)
            logits[arm].append(tested_logits(path, images, classes, student, seed, tested.pixels))
    on = MeasuredOn(split, test_about["name"])
    return utility_metrics(logits, tested.labels, classes, on, resamples, auc_of)


def utility_metrics(
    logits: dict[str, list[Tensor]],
    test_labels: Tensor,
    classes: Sequence[str],
    on: MeasuredOn,
    resamples: int = 1000,
    auc_of: Sequence[str] | None = None,
) -> list[Metric]:
    """The lines of `evaluate_utility`.

    Args:
        logits: by arm, "real" first, `(N, C)` of the test images for each seed.
        test_labels: `(N,)` int64, theirs.
        classes: name of each class.
        on: split and data set of the test images.
        resamples: bootstrap draws.
        auc_of: as for `evaluate_utility`.
    """
    real, *others = logits
    metrics = []

    def add(name: str, statistic: Statistic, rows: Tensor, **labels: str) -> None:
        low, high, mean = two_level_interval(statistic, len(logits[real]), test_labels, rows, resamples)
        metrics.append(on.metric(name, mean, "1", len(rows), 0, [low, high], **labels))

    every, known = torch.arange(len(test_labels)), classifier_measures(classes, test_labels)
    members = {name: torch.nonzero(test_labels == index).flatten() for index, name in enumerate(classes)}
    large = [name for name in classes if len(members[name]) >= MIN_GROUP]
    for name, positive in known:
        if name == "accuracy" or not (positive is None or positive in (large if auc_of is None else auc_of)):
            continue
        shown = {} if positive is None else {"positive": positive}
        statistics = {arm: _of_images(known[name, positive], logits[arm], test_labels) for arm in logits}
        for arm, statistic in statistics.items():
            add(name, statistic, every, arm=arm, **shown)
        for arm in others:
            add(f"{name}_gain", _difference(statistics[arm], statistics[real]), every, arm=arm, **shown)
    for diagnosis in large:
        for arm in logits:
            sensitivity = _of_images(known["accuracy", None], logits[arm], test_labels)
            add("sensitivity", sensitivity, members[diagnosis], arm=arm, diagnosis=diagnosis)
    return metrics


def _of_images(measure: Measure, logits: Sequence[Tensor], labels: Tensor) -> Statistic:
    """A measure of one seed's logits at some test images."""
    return lambda seed, rows: measure(logits[seed][rows], labels[rows])


def _difference(one: Statistic, other: Statistic) -> Statistic:
    """One minus the other, of the same seed and images."""
    return lambda seed, rows: one(seed, rows) - other(seed, rows)
