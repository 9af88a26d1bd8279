"""95 % intervals of means, shares, statistics of rows, and distances between sets.

Choose by what the number is:

* a mean over images: `mean_interval` (Student 1908);
* a share of images, such as an accuracy: `share_interval` (Wilson 1927), which holds near 0 and 1, too;
* any other statistic that treats each row alike, such as a balanced accuracy or an AUC: `bootstrap_interval`, the
  expanded percentile bootstrap (Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279, section
  5.3) on bootknife draws (Hesterberg, "Unbiasing the Bootstrap: Bootknife Sampling vs. Smoothing", 2004), within
  strata where the rows were drawn so; a plain percentile interval holds the truth too rarely where rows are few;
* a distance between sets of images: `subsample_intervals`, from halves drawn *without* replacement (Politis and
  Romano, "Large Sample Confidence Regions Based on Subsamples under Minimal Assumptions", 1994; with halves it is
  McCarthy's half-sampling, "Pseudo-Replication", 1969). A bootstrap would draw rows twice: their kernel with
  themselves, their distance of zero to themselves and the lower rank of their covariance make a resampled set
  farther from the other one, and of smaller k-nearest-neighbour radii, than any real set is.

All are for independent rows: images of one lesion or patient are not, and make every interval too narrow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit
from scipy.stats import binomtest
from torch import Tensor

from isic_vq.evaluation.report import Metric

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """Student's interval of the mean of values `(N,)`, one per image: low and high, in their unit.

    Raises:
        ValueError: there are fewer than two numbers, or more than one axis.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"values have shape {numbers.shape}: expected at least two numbers, (N,)")
    half_width = stdtrit(len(numbers) - 1, TAILS[1]) * numbers.std(ddof=1) / len(numbers) ** 0.5
    return float(numbers.mean() - half_width), float(numbers.mean() + half_width)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's interval, within [0, 1], of the share `count / total`.

    Raises:
        ValueError: `count` is not in 0 to `total`, or `total` is not positive.
    """
    low, high = binomtest(count, total).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class MeasuredOn:
    """The images that metrics are measured on; its methods make a report's lines."""

    split: str
    dataset: str

    def metric(
        self,
        name: str,
        value: float,
        unit: str,
        n: int,
        seed: int | None = None,
        interval: Sequence[float] | None = None,
        **labels: str,
    ) -> Metric:
        """A line with these fields; see `Metric`."""
        bounds = None if interval is None else list(interval)
        return Metric(name, value, unit, n, self.split, self.dataset, seed, bounds, labels)

    def mean(self, name: str, values: Tensor, unit: str, seed: int | None = None, **labels: str) -> Metric:
        """The mean of values `(N,)` in `unit`, one per image, with Student's interval of two or more."""
        interval = mean_interval(values) if len(values) > 1 else None
        return self.metric(name, values.mean().item(), unit, len(values), seed, interval, **labels)

    def share(self, name: str, count: int, total: int, seed: int | None = None, **labels: str) -> Metric:
        """The share `count / total` with Wilson's interval."""
        return self.metric(name, count / total, "1", total, seed, share_interval(count, total), **labels)


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    strata: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentiles of a statistic of rows over bootstrap draws.

    Each draw leaves one row of every stratum out, at random, and takes as many rows as the stratum has from the
    others, with replacement: the variance of a mean is then s^2/n, where a draw from all rows falls short. The
    percentiles are those of a normal distribution at Student's quantile of (rows - strata) degrees of freedom.

    Not for distances between sets, see the module. Two independent groups are one set of rows whose strata are the
    groups: `bootstrap_interval(roc_auc_score, is_member, scores, strata=is_member)`. Where a stratum of fewer than
    ten rows decides the statistic the interval is too narrow: five rows bring 95 % down to about 90 %.

    Args:
        statistic: called with arrays of as many rows as `samples` have.
        samples: one or more columns of the same N rows, `(N, ...)`, tensors on the CPU or arrays; a row is drawn
            from all columns at once.
        strata: the group of each row, `(N,)`; each group keeps its size, and a row alone in its group is always
            drawn. None is one group.
        resamples: how often rows are drawn.
        seed: of the draws.

    Returns:
        Low and high, in the unit of the statistic.

    Raises:
        ValueError: columns that differ in length, or no stratum of two rows.
    """
    columns = [np.asarray(sample) for sample in samples]
    lengths = [len(column) for column in columns]
    if not lengths or len(set(lengths)) > 1:
        raise ValueError(
            f"the columns have {lengths} rows: expected at least one column, all of the same rows"
        )
    groups = np.zeros(lengths[0]) if strata is None else np.asarray(strata)
    if groups.shape != (lengths[0],):
        raise ValueError(f"strata have shape {groups.shape}: expected one per row, ({lengths[0]},)")
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    freedom = lengths[0] - len(members)
    if freedom == 0:
        raise ValueError(
            f"{lengths[0]} rows in {len(members)} strata: expected two rows in at least one of them"
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = np.concatenate([_bootknife(rows, generator) for rows in members])
        values.append(statistic(*(column[drawn] for column in columns)))
    tail = ndtr(stdtrit(freedom, TAILS[0]))
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def _bootknife(rows: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """As many rows as there are, with replacement, from all but one."""
    if len(rows) == 1:
        return rows
    left_out = generator.integers(len(rows))
    drawn = generator.integers(len(rows) - 1, size=len(rows))
    return rows[drawn + (drawn >= left_out)]


def subsample_intervals(
    statistics: Callable[..., dict[str, float]],
    *samples: ArrayLike,
    strata: Sequence[ArrayLike] | None = None,
    repeats: int = 100,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Intervals of statistics of whole sets, from random halves of every set.

    A statistic that is a mean has exactly the variance of a whole set's when it is taken of halves drawn without
    replacement, given the set: (1/(n/2) - 1/n) s^2 = s^2/n. So the interval is the statistic of the whole sets plus
    and minus Student's quantile, of (rows - strata) degrees of freedom in the smallest set, times the standard
    deviation over halves. For a mean it is `mean_interval`, up to the noise of `repeats` draws.

    It covers the statistic's expectation *at this n*: the Frechet distance has a bias that shrinks with n, which is why a
    distance is read beside that of real images at the same n. It is rather too wide: a distance between sets of one
    distribution is quadratic in their deviations, and neighbours are farther apart in halves. On 597 dermoscopy images and 256
    features, against sets that shared no image, the Frechet distance's deviation was right for sets that differ and twice too
    large for sets that do not, the other distances' 1.05 to 1.7 times too large. Without strata, sets that do have equal parts
    of each diagnosis get deviations up to 3.5 times too large.

    Args:
        statistics: called with one array per set; returns numbers by name.
        samples: sets of rows, `(N_i, ...)`, tensors on the CPU or arrays, drawn independently of each other.
        strata: for each set the group of each row, `(N_i,)`, where the sizes of groups were given and not drawn; a
            half has half of each group, up to one row. None is one group.
        repeats: how often halves are drawn.
        seed: of the draws.

    Returns:
        Low and high by name, in the statistics' units.

    Raises:
        ValueError: a set of fewer than four rows, or with fewer than two rows more than strata; strata of another
            number of rows.
    """
    sets = [np.asarray(sample) for sample in samples]
    groups = [np.zeros(len(rows)) for rows in sets] if strata is None else [np.asarray(g) for g in strata]
    sizes = [len(rows) for rows in sets]
    if not sizes or min(sizes) < 4:
        raise ValueError(f"the sets have {sizes} rows: expected at least four in each")
    if [group.shape for group in groups] != [(size,) for size in sizes]:
        raise ValueError(f"strata have shapes {[g.shape for g in groups]}: expected one per row of {sizes}")
    freedom = min(len(group) - len(np.unique(group)) for group in groups)
    if freedom < 2:
        raise ValueError("a set has hardly more rows than strata: expected at least two more")
    generator = np.random.default_rng(seed)
    halves = [
        statistics(*(rows[_half(group, generator)] for rows, group in zip(sets, groups, strict=True)))
        for _ in range(repeats)
    ]
    quantile = stdtrit(freedom, TAILS[1])
    intervals = {}
    for name, value in statistics(*sets).items():
        half_width = quantile * np.std([values[name] for values in halves], ddof=1)
        intervals[name] = float(value - half_width), float(value + half_width)
    return intervals


def _half(groups: NDArray[Any], generator: np.random.Generator) -> NDArray[np.int64]:
    """Every other row of a random order in which groups stay together, from the first or the second on."""
    order = np.lexsort((generator.random(len(groups)), groups))
    return order[generator.integers(2) :: 2]
