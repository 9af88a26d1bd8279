"""Tests of whether samples are nearer to training images than held-out images are.

They compare with the distance of held-out images to *their* nearest training image. If samples are as far from the training
images as these, samples and held-out images are exchangeable: all tests but one assume nothing else. Source of the idea:
Meehan et al., "A Non-Parametric Test to Detect Data-Copying in Generative Models", arXiv 2004.05675 (theirs compares the two
sets of distances by their ranks, within cells).

* `empirical_p_values`: p = (1 + held-out distances <= d) / (1 + n), for every sample and its nearest training image.
  Source: conformal p-values, Bates et al., "Testing for Outliers with Conformal p-values", arXiv 2104.08279. They
  are exact, but never below 1 / (n + 1): of 500 samples and n = 597, Benjamini-Hochberg at 5 % would find nothing
  unless 17 samples were nearer than every held-out image, and with n = 117 unless 85 were.
* `tail_p_values`: the same p, but below the nearest tenth of the held-out distances it extrapolates their tail. The
  probability that a point lies within d of its nearest neighbour goes, as d shrinks, with a power of d (the local
  dimension: Levina and Bickel, "Maximum Likelihood Estimation of Intrinsic Dimension", 2004), so that the logs of
  the tail's distances are exponential. The power need not be known: the p-value is that of a ratio of exponential
  variables, which is exact for any power and any n. Benjamini-Hochberg decides by these which pairs are copies. This is the
  one test that assumes something; without it no single copy could be found.
* `excess_of_near_samples`: the verdict. How many samples are nearer than the r-th nearest held-out image, r being one
  in a hundred? Of m samples and n held-out images that are exchangeable, the number is beta-binomial(m, r, n + 1 - r),
  whatever the distances are. A binomial or Poisson-binomial test of the same count takes the m p-values for
  independent, while they share one set of held-out images: it is wrong far more often than its level.

Samples can be nearer without being copied: a model that draws plain images only is near to everything. So read a
verdict with `held_out_neighbours`, which tests whether samples avoid held-out images as neighbours. It compares
training images with held-out ones, not samples with either, and does not depend on how plain the samples are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import betabinom, false_discovery_control

LEVEL = 0.05  # of wrong verdicts, and of wrong pairs among those found
NEAR_SHARE = 0.01  # a sample is near if it is nearer than this share of the held-out images
TAIL_SHARE = 0.1  # of the held-out distances, what the tail is known by
MIN_TAIL = 5  # held-out distances, below which the tail is not known


def empirical_p_values(distances: ArrayLike, held_out: ArrayLike) -> NDArray[np.float64]:
    """The p-value of each sample's distance, `(S,)` in [1 / (n + 1), 1].

    Args:
        distances: `(S,)`, of each sample to its nearest training image.
        held_out: `(n,)`, of each held-out image to its nearest training image.

    Raises:
        ValueError: there are no held-out distances, or negative or infinite ones.
    """
    samples, ordered = _checked(distances), np.sort(_checked(held_out))
    if len(ordered) == 0:
        raise ValueError("there are no held-out distances: expected at least one to compare samples with")
    return (1 + ordered.searchsorted(samples, side="right")) / (1 + len(ordered))


def tail_p_values(distances: ArrayLike, held_out: ArrayLike) -> NDArray[np.float64]:
    """Empirical p-values, extrapolated for distances within the tail of the held-out ones, `(S,)` in [0, 1].

    With u the (k + 1)-th smallest held-out distance, k a tenth of them, x_1 to x_k the smaller ones and
    s = sum log(u / x_i): p(d) = (k + 1) / (n + 1) (1 + log(u / d) / s)^-k for d < u.

    All p-values stay empirical where s is 0 or infinite (equal distances; a held-out image that is a training image), or k
    is below `MIN_TAIL`.
    """
    samples, ordered = _checked(distances), np.sort(_checked(held_out))
    empirical = empirical_p_values(samples, ordered)
    size = int(TAIL_SHARE * len(ordered))
    if size < MIN_TAIL or ordered[0] == 0 or ordered[0] == ordered[size]:
        return empirical
    start = ordered[size]
    spread = np.log(start / ordered[:size]).sum()
    with np.errstate(divide="ignore"):  # a distance of 0 has p = 0
        beyond = np.log(start / np.minimum(samples, start))
    tail = (size + 1) / (len(ordered) + 1) * (1 + beyond / spread) ** -size
    return np.where(samples < start, tail, empirical)


def found_pairs(p_values: ArrayLike) -> NDArray[np.bool_]:
    """Which p-values, of any shape, Benjamini-Hochberg finds at `LEVEL`, all of them taken together.

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995, computed by scipy.
    """
    values = np.asarray(p_values, dtype=np.float64)
    return (false_discovery_control(values.ravel()) <= LEVEL).reshape(values.shape)


@dataclass(frozen=True)
class Excess:
    """How many samples are near to training images, beside how many would be by chance."""

    radius: float  # a sample is near if its distance is below this
    count: int
    expected: float
    threshold: int | None  # fewest near samples that are a verdict at `level`; None if no number of them is
    p_value: float  # of at least `count` by chance
    level: float

    @property
    def verdict(self) -> bool:
        """Whether more samples are near than chance explains."""
        return self.p_value <= self.level


def excess_of_near_samples(distances: ArrayLike, held_out: ArrayLike, level: float = LEVEL) -> Excess:
    """Test whether more samples are near to training images than chance explains.

    Near is nearer than the r-th nearest of the n held-out images, r = max(1, floor(`NEAR_SHARE` (n + 1))). Equal
    distances make the test miss copies rather than report false ones. Where several channels are tested, `level` is a share
    of the common level; distances are as for `empirical_p_values`.
    """
    samples, ordered = _checked(distances), np.sort(_checked(held_out))
    if len(samples) == 0 or len(ordered) == 0:
        raise ValueError(
            f"{len(samples)} samples and {len(ordered)} held-out images: expected at least one each"
        )
    rank = max(1, int(NEAR_SHARE * (len(ordered) + 1)))
    chance = betabinom(len(samples), rank, len(ordered) + 1 - rank)
    radius = float(ordered[rank - 1])
    count = int((samples < radius).sum())
    # P(number >= 0), P(number >= 1), ...: scipy's survival function repeats the sum for each.
    at_least = chance.pmf(np.arange(len(samples) + 1))[::-1].cumsum()[::-1]
    enough = np.flatnonzero(at_least <= level)
    return Excess(
        radius=radius,
        count=count,
        expected=len(samples) * rank / (len(ordered) + 1),
        threshold=int(enough[0]) if len(enough) else None,
        p_value=min(1.0, float(at_least[count])),  # sums of many terms round
        level=level,
    )


@dataclass(frozen=True)
class HeldOutNeighbours:
    """Share of the samples whose nearest image is a held-out one, beside the share by chance."""

    share: float
    expected: float  # n / (N + n), for N training and n held-out images
    p_value: float  # of at most so many by chance


def held_out_neighbours(
    rows: Sequence[int] | NDArray[np.int64],
    num_train: int,
    num_held_out: int,
    draws: int = 10000,
    seed: int = 0,
) -> HeldOutNeighbours:
    """Test whether the nearest image of samples is a held-out one more rarely than chance explains.

    If training left no trace, which n of the N + n images are the held-out ones is a random draw, given the samples and all
    images. The p-value is that of this permutation test with `draws` draws, with the +1 of Phipson and Smyth, "Permutation
    P-values Should Never Be Zero", 2010. `rows` `(S,)` are the nearest images of the samples, training images numbered first.
    """
    total = num_train + num_held_out
    popularity = np.bincount(rows, minlength=total)
    count = int(popularity[num_train:].sum())
    generator = np.random.default_rng(seed)
    # Only images that are some sample's nearest matter: draw how many of the n are among them, and then which.
    popular = popularity[popularity > 0]
    sizes = generator.hypergeometric(len(popular), total - len(popular), num_held_out, draws)
    drawn = np.array([generator.permutation(popular)[:size].sum() for size in sizes])
    p_value = (1 + int((drawn <= count).sum())) / (1 + draws)
    return HeldOutNeighbours(count / len(rows), num_held_out / total, p_value)


def _checked(distances: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(distances, dtype=np.float64)
    if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(
            f"distances have shape {values.shape}, from {values.min(initial=np.inf)}: expected finite numbers of at "
            "least 0, one per image"
        )
    return values
