"""Utility of generated images for a classifier, which is trained on real, on generated and on both, and tested on real images.

Source: train-on-synthetic-test-on-real, Esteban et al., "Real-valued (Medical) Time Series Generation with Recurrent
Conditional GANs", arXiv 1706.02633, section 4.1, and "GAN-train", Shmelkov et al., arXiv 1807.09499. Differs: every
arm is repeated with several seeds, each of which draws new weights, a new order and, in the arms that have them, newly
generated images; and numbers have intervals over seeds and test images at once.

Generated image i has the diagnosis of real training image i, so both sets have the same class counts. All arms take the same
number of optimizer steps, in the same recipe, and no choice depends on the test images; the arm of both sets sees each image half
as often. The work folder holds `synthetic-seedN/` and ARM-seedN.json; see `ClassifierStudy`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import MIN_GROUP
from isic_vq.evaluation.measures import Measure, classifier_measures
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.student import (
    ClassifierStudy,
    LabelledImages,
    Statistic,
    Student,
    two_level_interval,
)
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

ARMS = ("real", "synthetic", "real+synthetic")


def utility_report(
    model: str | None,
    train: str,
    test: str,
    work_dir: Path | None = None,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    limit: int | None = None,
    split: str = "test",
    auc_of: Sequence[str] | None = None,
    device: str | None = None,
) -> Report:
    """Open a checkpoint, train classifiers on real and on generated images, and test them on real ones.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        train: URI of real training images.
        test: URI of other real images, which the model was not trained on either.
        work_dir: folder of generated images and finished classifiers, by which a killed call is resumed; by default in runs/.
        seeds: how often each classifier is trained, at least 2; by default 3 for realism, 5 for utility.
        steps: optimizer steps of each classifier; by default 600 for realism, 1500 for utility.
        limit: largest number of images of each set, a seeded subset; by default all, for ood 300.
        split: what the report calls the test images.
        auc_of: classes whose AUC against all others is reported; by default all, see `evaluate_utility`.
        device: as `load_model` takes it.

    Raises:
        ModelError, ValueError, DataError: as `load_model`, `ClassifierStudy` and `evaluate_utility`.
    """
    generator = load_model(IsicVQModel, model, device)
    student, folder = Student() if steps is None else Student(steps=steps), work_dir or Path("runs/utility")
    study = ClassifierStudy(
        generator, train, test, folder, seeds=seeds or 5, student=student, limit=limit, split=split
    )
    return study.report(evaluate_utility(study, auc_of=auc_of))


def evaluate_utility(
    study: ClassifierStudy, resamples: int = 1000, auc_of: Sequence[str] | None = None
) -> list[Metric]:
    """Train the classifiers that are not trained yet, and compare them on real images.

    `auc_of` names the classes whose AUC against all others is reported: by default those of `MIN_GROUP` test images.

    Returns:
        For each arm (label `arm`) `balanced_accuracy` and, for each class of `auc_of` (label `positive`), `auc`, means over
        the seeds; their differences from the real arm, `balanced_accuracy_gain` and so on, paired by seed and test image; and
        `sensitivity` of the diagnoses of at least `MIN_GROUP` test images. Intervals: `two_level_interval`.

    Raises:
        ValueError: an unknown class in `auc_of`, or the folder holds images of another model.
        DataError: the images cannot be used.
    """
    classes = study.classes
    if missing := [name for name in auc_of or () if name not in classes]:
        raise ValueError(f"auc_of names {', '.join(missing)}: expected some of {', '.join(classes)}")
    real, tested = (study.read(study.records[part]) for part in ("train", "test"))

    def training_images(arm: str, generated: Any) -> LabelledImages:
        if arm == "real":
            return real
        synthetic = study.read(generated)
        return synthetic if arm == "synthetic" else real + synthetic

    logits: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for seed in study.seeds:
        generated = study.generated(f"synthetic-seed{seed}", "train", seed)
        for arm in ARMS:
            images = partial(training_images, arm, generated)
            logits[arm].append(study.logits(arm, seed, images, classes, tested.pixels))
    return utility_metrics(logits, tested.labels, classes, study.on, resamples, auc_of)


def utility_metrics(
    logits: dict[str, list[Tensor]],
    test_labels: Tensor,
    classes: Sequence[str],
    on: MeasuredOn,
    resamples: int = 1000,
    auc_of: Sequence[str] | None = None,
) -> list[Metric]:
    """The lines of `evaluate_utility`, from logits `(N, C)` of the test images for each seed, by arm, "real" first."""
    real, *others = logits
    metrics = []

    def add(name: str, statistic: Statistic, rows: Tensor, **labels: str) -> None:
        low, high, mean = two_level_interval(statistic, len(logits[real]), test_labels, rows, resamples)
        metrics.append(on.metric(name, mean, "1", len(rows), 0, [low, high], **labels))

    every, measures = torch.arange(len(test_labels)), classifier_measures(classes, test_labels)
    members = {name: torch.nonzero(test_labels == index).flatten() for index, name in enumerate(classes)}
    large = [name for name in classes if len(members[name]) >= MIN_GROUP]
    for (name, positive), measure in measures.items():
        if name == "accuracy" or not (positive is None or positive in (large if auc_of is None else auc_of)):
            continue
        shown = {} if positive is None else {"positive": positive}
        statistics = {arm: _of_images(measure, logits[arm], test_labels) for arm in logits}
        for arm, statistic in statistics.items():
            add(name, statistic, every, arm=arm, **shown)
        for arm in others:
            add(f"{name}_gain", _difference(statistics[arm], statistics[real]), every, arm=arm, **shown)
    for diagnosis in large:
        for arm in logits:
            sensitivity = _of_images(measures["accuracy", None], logits[arm], test_labels)
            add("sensitivity", sensitivity, members[diagnosis], arm=arm, diagnosis=diagnosis)
    return metrics


def _of_images(measure: Measure, logits: Sequence[Tensor], labels: Tensor) -> Statistic:
    return lambda seed, rows: measure(logits[seed][rows], labels[rows])


def _difference(a: Statistic, b: Statistic) -> Statistic:
    return lambda seed, rows: a(seed, rows) - b(seed, rows)
