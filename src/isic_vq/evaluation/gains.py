"""Differences of AUC between classifiers trained with several seeds and tested on the same images.

The variance of a mean over seeds has two parts, as in a mixed model with random seeds and random test images: that of the
seeds' differences, over their number, and that of the test images, from a stratified bootstrap of the mean over seeds. The
interval is Student's with Satterthwaite's degrees of freedom ("An Approximate Distribution of Estimates of Variance Components",
1946), so that few seeds make it wide only where seeds decide. What a seed and the images do together is in both parts: the
interval errs to the wide side.

Comparisons are corrected by Holm ("A Simple Sequentially Rejective Multiple Test Procedure", 1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit
from torch import Tensor

from isic_vq.evaluation.intervals import LEVEL, TAILS


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds of an AUC, or of a difference of two."""

    value: float
    interval: tuple[float, float]
    p_value: float  # two-sided, of a difference of 0
    seeds: list[float]  # of each seed


def wins(scores: Tensor, positive: Tensor) -> Tensor:
    """Whether each positive image scores higher than each other one, `(P, Q)` float64, ties 0.5: the mean is the AUC.

    Args:
        scores: `(N,)`, higher for the positive class.
        positive: `(N,)` bool.
    """
    differences = scores[positive][:, None].double() - scores[~positive]
    return (differences.sign() + 1) / 2


def estimate(
    scores: Sequence[Tensor],
    positive: Tensor,
    reference: Sequence[Tensor] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean over seeds of the AUC, or of its difference from a reference's, with an interval for other seeds and other images.

    Args:
        scores: of each seed, `(N,)`, higher for the positive class.
        positive: `(N,)` bool, at least two of each kind.
        reference: scores that each seed's are compared with, of the same images.
        resamples: bootstrap draws of the images, within each class; one is left out of each (see `bootstrap_interval`).
        seed: of the draws.

    Raises:
        ValueError: fewer than two seeds, or fewer than two images of a class.
    """
    number, counts = len(scores), [int(positive.sum()), int((~positive).sum())]
    if number < 2 or min(counts) < 2:
        raise ValueError(
            f"{number} seeds, {counts[0]} positive and {counts[1]} other images: expected at least two of each"
        )
    pairs = torch.stack([wins(each, positive) for each in scores])
    if reference is not None:
        pairs -= torch.stack([wins(each, positive) for each in reference])
    seeds = pairs.mean(dim=(1, 2))
    generator = np.random.default_rng(seed)
    rows, columns = (torch.from_numpy(bootstrap_counts(count, resamples, generator)) for count in counts)
    draws = ((rows @ pairs.mean(dim=0)) * columns).sum(dim=1) / (counts[0] * counts[1])
    variances = np.array([seeds.var().item() / number, draws.var().item()])
    value, variance = seeds.mean().item(), float(variances.sum())
    freedoms = np.array([number - 1, min(counts) - 1])
    if variance == 0:  # every seed decides every pair alike
        return Estimate(value, (value, value), float(value == 0), seeds.tolist())
    freedom, error = variance**2 / (variances**2 / freedoms).sum(), variance**0.5
    half = float(stdtrit(freedom, TAILS[1])) * error
    lowest, highest = (0.0, 1.0) if reference is None else (-1.0, 1.0)
    interval = max(value - half, lowest), min(value + half, highest)
    return Estimate(value, interval, float(2 * stdtr(freedom, -abs(value) / error)), seeds.tolist())


def bootstrap_counts(number: int, resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """How often each of some images is drawn, `(resamples, number)`: as many as there are, with replacement, from all but one.

    The variance of a mean of the draws is s^2/n, where a draw from all images would fall short (Hesterberg's bootknife).
    """
    shares = np.full((resamples, number), 1 / (number - 1))
    shares[np.arange(resamples), generator.integers(number, size=resamples)] = 0
    return generator.multinomial(number, shares).astype(np.float64)


def holm(p_values: ArrayLike) -> list[float]:
    """P-values corrected for their number: that of rank i (from 0) of m is the largest of (m - j) p_j of ranks j up to i, at most 1."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(
        1, np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    )
    return [float(value) for value in corrected]


def expected_half_width(auc: float, num_positive: int, num_other: int) -> float:
    """Half-width of the 95 % interval of one classifier's AUC, before anything is measured.

    Source: Hanley and McNeil, "The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC) Curve", 1982,
    with exponential scores. That of a difference on the same images is smaller the more the classifiers agree.
    """
    both, others = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (num_positive - 1) * (both - auc**2) + (num_other - 1) * (others - auc**2)
    return float(stdtrit(np.inf, (1 + LEVEL) / 2) * (variance / (num_positive * num_other)) ** 0.5)
