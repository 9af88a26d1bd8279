"""Accuracy of a small classifier that tells generated images from real ones; 0.5 is a perfect generator.

Source: the classifier two-sample test, Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests", arXiv 1610.06545,
with a convolutional network on pixels; differs: it is trained with several seeds, and numbers have intervals over
seeds and test images at once.

Three pairs are told apart, which separate the tokenizer's faults (real images and their reconstructions), the prior's
(reconstructions and samples) and both (real images and samples). Sample i has the diagnosis of real image i. All images are
rounded to 8 bits first. The work folder holds `samples-train/`, `samples-test/` and PAIR-seedN.json; see `ClassifierStudy`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import auroc
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.student import (
    ClassifierStudy,
    LabelledImages,
    Student,
    two_level_interval,
)
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

PAIRS = (("real", "reconstructions"), ("reconstructions", "samples"), ("real", "samples"))


def realism_report(
    model: str | None,
    train: str,
    test: str,
    work_dir: Path | None = None,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    limit: int | None = None,
    split: str = "test",
    device: str | None = None,
) -> Report:
    """Open a checkpoint, and train classifiers to tell its images from real ones; see `evaluate_realism`.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        train: URI of real training images.
        test: URI of other real images, which the model was not trained on either.
        work_dir: folder of generated images and finished classifiers, by which a killed call is resumed; by default
            in runs/.
        seeds: how often each classifier is trained, at least 2; by default 3 for realism, for utility 10 up to 100 real
            images, 5 up to 1,000 and 3 above.
        steps: optimizer steps of each classifier; by default 600.
        limit: largest number of images of each set, a seeded subset; by default all, for ood 300.
        split: what the report calls the test images.
        device: as `load_model` takes it.

    Raises:
        ModelError, ValueError, DataError: as `load_model`, `ClassifierStudy` and `evaluate_realism`.
    """
    generator = load_model(IsicVQModel, model, device)
    student = default_student(generator)
    student = student if steps is None else replace(student, steps=steps)
    folder = work_dir or Path("runs/realism")
    study = ClassifierStudy(
        generator, train, {split: test}, folder, seeds=seeds or 3, student=student, limit=limit
    )
    return study.report(evaluate_realism(study))


def evaluate_realism(study: ClassifierStudy, resamples: int = 1000) -> list[Metric]:
    """Train the classifiers that are not trained yet, and test them on images they have not seen.

    Returns:
        For each of `PAIRS` (labels `images` and `others`) `two_sample_accuracy` and `two_sample_auc`, means over the seeds;
        0.5 where the two cannot be told apart. Intervals: `two_level_interval` of `resamples` bootstrap draws.

    Raises:
        ValueError: the folder holds images of another model.
        DataError: the images cannot be used.
    """
    sets: dict[str, dict[str, Tensor]] = {}
    model, size = study.model, study.student.image_size
    for seed, (part, (name, records)) in enumerate(
        zip(("train", "test"), study.records.items(), strict=True)
    ):
        originals = study.read(records, model.config.vqvae_config.image_size).pixels
        sets[part] = {
            "real": study.read(records).pixels,
            "reconstructions": reconstructed(model, originals, size),
            "samples": study.read(study.generated(f"samples-{part}", name, seed)).pixels,
        }
    metrics, (on,) = [], study.on.values()
    for pair in PAIRS:
        tested, images = _labelled_pair(sets["test"], pair), partial(_labelled_pair, sets["train"], pair)
        logits = [study.logits("-".join(pair), seed, images, pair, tested.pixels) for seed in study.seeds]
        metrics += realism_metrics(pair, logits, tested.labels, on, resamples)
    return metrics


def default_student(model: IsicVQModel) -> Student:
    """Settings without loss of pixels or changes of colour."""
    return Student(steps=600, image_size=model.config.vqvae_config.image_size, colour_strength=0.0)


@torch.inference_mode()
def reconstructed(model: IsicVQModel, pixels: Tensor, size: int) -> Tensor:
    """Reconstructions of images `(N, 3, H, W)` uint8, resized to `(N, 3, size, size)` uint8."""
    processor, parts = IsicVQImageProcessor(size=size), []
    for batch in pixels.split(32):
        decoded = model.decode(model.encode(batch.to(model.device).float() / 255))
        pictures = processor.postprocess(decoded, output_type="pil")
        values: Any = processor(pictures, return_tensors="pt")["pixel_values"]
        parts.append((values * 255).round().to(torch.uint8))
    return torch.cat(parts)


def realism_metrics(
    pair: tuple[str, str],
    logits: list[Tensor],
    labels: Tensor,
    on: MeasuredOn,
    resamples: int = 1000,
) -> list[Metric]:
    """The two lines of a pair of sets, from logits `(N, 2)` of the test images for each seed; labels `(N,)` number their set."""

    def accuracy(seed: int, rows: Tensor) -> float:
        return (logits[seed][rows].argmax(1) == labels[rows]).double().mean().item()

    def auc(seed: int, rows: Tensor) -> float:
        scores, second = logits[seed][rows].diff(dim=1)[:, 0], labels[rows] == 1
        return auroc(scores[~second], scores[second])

    metrics = []
    for name, statistic in (("two_sample_accuracy", accuracy), ("two_sample_auc", auc)):
        rows = torch.arange(len(labels))
        low, high, mean = two_level_interval(statistic, len(logits), labels, rows, resamples)
        shown = dict(zip(("images", "others"), pair, strict=True))
        metrics.append(on.metric(name, mean, "1", len(labels), 0, [low, high], **shown))
    return metrics


def _labelled_pair(sets: dict[str, Tensor], pair: tuple[str, str]) -> LabelledImages:
    first, second = (sets[name] for name in pair)
    labels = torch.cat([torch.zeros(len(first)), torch.ones(len(second))]).long()
    return LabelledImages(torch.cat([first, second]), labels)
