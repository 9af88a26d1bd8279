"""Bits that a prior needs for the codes of images it has not seen.

Bits per code is the base-2 cross-entropy, averaged over the codes of an image and then over images: the
length an ideal entropy coder driven by the prior would reach. Compare it with log2 K (codes stored flat) and with
the unigram cross-entropy (an entropy coder that knows how often each code occurs in training, nothing else).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from isic_vq.evaluation.intervals import MeasuredOn, bootstrap_interval
from isic_vq.evaluation.measures import balanced_accuracy, code_counts
from isic_vq.evaluation.report import Metric
from isic_vq.models.likelihood import BATCH_SIZE, score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel


def bits_per_code(
    model: IsicVQModel, codes: Tensor, labels: Tensor | None, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Mean bits per code of each image, `(N,)` float64, under a model's prior; arguments are those of `score_codes`."""
    return score_codes(model, codes, labels, batch_size=batch_size).flatten(1).mean(1)


def unigram_bits(train_counts: Tensor, codes: Tensor) -> Tensor:
    """Bits of every code, float64 of the shape of `codes`, under its occurrences `(K,)` in the training set.

    Each code counts once more than it occurs, so that one never seen in training costs finitely many bits.
    """
    smoothed = train_counts.double() + 1
    return -(smoothed / smoothed.sum()).log2()[codes]


def own_entropy(codes: Tensor) -> Tensor:
    """Entropy `(N,)` float64 in bits per code of each image's own code frequencies, from codes `(N, ...)`."""
    counts = code_counts(codes, int(codes.max()) + 1)
    return torch.special.entr(counts.double() / codes[0].numel()).sum(1) / math.log(2)


def likelihood_metrics(
    model: IsicVQModel, train_counts: Tensor | None, codes: Tensor, labels: Tensor, on: MeasuredOn
) -> list[Metric]:
    """The report's lines for the likelihood of unseen codes `(N, ...)` with class ids `(N,)`."""
    bits = {
        "bits_per_code": bits_per_code(model, codes, labels),
        "bits_per_code_unconditional": bits_per_code(model, codes, None),
    }
    if train_counts is not None:
        bits["bits_per_code_unigram"] = unigram_bits(train_counts, codes).flatten(1).mean(1)
    return bits_metrics(model, bits, on)


def bits_metrics(model: IsicVQModel, bits: dict[str, Tensor], on: MeasuredOn) -> list[Metric]:
    """The report's lines for bits per code of each image, `(N,)` by name, and for bits per pixel and of flat codes."""
    config = model.config.vqvae_config
    num_images = len(bits["bits_per_code"])
    per_pixel = bits["bits_per_code"] * config.num_positions / config.image_size**2
    return [
        *(on.mean(name, values, "bits per code") for name, values in bits.items()),
        on.mean("bits_per_pixel", per_pixel, "bits per pixel"),
        on.metric("bits_per_code_flat", math.log2(config.num_codes), "bits per code", num_images),
    ]


def class_bits(model: IsicVQModel, codes: Tensor, on_class: Callable[[], object] | None = None) -> Tensor:
    """Bits per code `(N, num_classes)` float64 of codes `(N, h, w)` or `(N, L)` given each class."""
    columns = []
    for class_id in range(len(model.config.class_names)):
        columns.append(bits_per_code(model, codes, torch.full((len(codes),), class_id)))
        if on_class is not None:
            on_class()
    return torch.stack(columns, dim=1)


def conditioning_metrics(
    by_class: Tensor,
    unconditional: Tensor,
    labels: Tensor,
    num_positions: int,
    on: MeasuredOn,
    seed: int = 0,
) -> list[Metric]:
    """The report's lines for the gain from the diagnosis, over images whose diagnosis the model has.

    * `conditioning_gain`: bits per *image* that the codes cost less given the right diagnosis than without one, paired
      by image; below 0 the diagnosis misleads.
    * `likelihood_balanced_accuracy`: mean over the diagnoses that occur of how often argmax_y p(codes | y) is right;
      chance is one over the number of the model's diagnoses.

    They are computed from bits per code `by_class` `(N, num_classes)`, as `class_bits` gives them, and `unconditional` `(N,)`.
    Images whose label `(N,)` is no class are left out; if that leaves none, there are no lines. `seed` is of the accuracy's
    bootstrap, within diagnoses.
    """
    known = labels < by_class.shape[1]
    if not known.any():
        return []
    by_class, unconditional, labels = by_class[known], unconditional[known], labels[known]
    gain = (unconditional - by_class.gather(1, labels[:, None])[:, 0]) * num_positions
    predicted = by_class.argmin(1)
    interval = None  # unknown where no diagnosis has two images
    if len(labels) > len(labels.unique()):
        interval = bootstrap_interval(balanced_accuracy, labels, predicted, strata=labels, seed=seed)
    accuracy = balanced_accuracy(labels.numpy(), predicted.numpy())
    return [
        on.mean("conditioning_gain", gain, "bits per image"),
        on.metric("likelihood_balanced_accuracy", accuracy, "1", len(labels), seed, interval),
    ]
