"""How far a set of images is from another one, as points in a feature space; pure functions on arrays.

Sources: Frechet distance, Heusel et al., arXiv 1706.08500, eq. 6; kernel distance (KID), Binkowski et al., arXiv
1801.01401, section 4, with the estimator of Gretton et al., JMLR 13 (2012), eq. 3; precision and recall, Kynkäänniemi
et al., arXiv 1904.06991, eq. 1 to 3; density and coverage, Naeem et al., arXiv 2002.09797, eq. 4 and 6.

Differs: the kernel distance is taken of all rows at once. It is a U-statistic, so the mean over *all* subsets of some
size, drawn without replacement, is this very number; the usual mean over some random ones only adds noise to it.
Points at exactly a neighbour's distance count as inside, as in Kynkäänniemi's eq. 1 (Naeem's code leaves them out).

All depend on the features and, but for the kernel distance, on the number of rows: compare them at one n. The Frechet
distance of two samples of one distribution is not 0 but grows like D / n.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from isic_vq.models.checks import expect

NUM_NEIGHBOURS = 5


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), m the mean and S the covariance of a set's rows.

    With centred rows A and B, tr (S_a S_b)^1/2 is the nuclear norm of A B^T over the root of both degrees of freedom:
    no root of a matrix is taken, and covariances of less than full rank are no special case.

    Args:
        a: features `(N, D)`, a tensor on the CPU or an array.
        b: features `(M, D)`.

    Returns:
        In squared units of the features, at least 0.

    Raises:
        ValueError: fewer than two rows in a set, another number of features, or numbers that are not finite.
    """
    sets = _checked(a, b, min_rows=2)
    means = [rows.mean(axis=0) for rows in sets]
    # R of A = QR stands for A: it has the same R^T R, and at most D rows.
    roots = [
        np.linalg.qr(rows - mean, mode="r") / (len(rows) - 1) ** 0.5
        for rows, mean in zip(sets, means, strict=True)
    ]
    traces = sum(float((root**2).sum()) for root in roots)
    overlap = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return max(0.0, float(((means[0] - means[1]) ** 2).sum()) + traces - 2 * overlap)


def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, over all pairs of different rows.

    Arguments are those of `frechet_distance`. The expectation is 0 for sets of one distribution, whatever their sizes; a
    value may be below 0.
    """
    x, y = _checked(a, b, min_rows=2)

    def kernel(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def mean_of_pairs(u: NDArray[np.float64]) -> float:
        products = kernel(u, u)
        return float((products.sum() - np.trace(products)) / (len(u) * (len(u) - 1)))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * float(kernel(x, y).mean())


def precision_recall_density_coverage(
    real: ArrayLike, generated: ArrayLike, k: int = NUM_NEIGHBOURS
) -> dict[str, float]:
    """Compare sets by balls that reach from each point to its k-th nearest neighbour within its own set.

    Args:
        real: features `(N, D)`, a tensor on the CPU or an array.
        generated: features `(M, D)`.
        k: neighbours.

    Returns:
        `precision`: share of generated points inside a real point's ball. `recall`: share of real points inside a
        generated point's ball. `density`: in how many real balls a generated point lies on average, over k; about 1
        for sets of one distribution, and not bounded by 1. `coverage`: share of real points whose ball holds a
        generated point.

    Raises:
        ValueError: no more than k rows in a set, another number of features, or numbers that are not finite.
    """
    expect(k >= 1, "k", k, "at least 1")
    x, y = map(torch.from_numpy, _checked(real, generated, min_rows=k + 1))
    between = torch.cdist(x, y)
    in_real_ball = between <= _reach(x, k)[:, None]
    in_generated_ball = between <= _reach(y, k)
    return {
        "precision": in_real_ball.any(0).double().mean().item(),
        "recall": in_generated_ball.any(1).double().mean().item(),
        "density": in_real_ball.sum(0).double().mean().item() / k,
        "coverage": in_real_ball.any(1).double().mean().item(),
    }


def _reach(points: torch.Tensor, k: int) -> torch.Tensor:
    """Distance `(N,)` of each point to its k-th nearest neighbour, itself not counted."""
    distances = torch.cdist(points, points).fill_diagonal_(0)
    return distances.kthvalue(k + 1).values  # the nearest is the point itself


def _checked(a: ArrayLike, b: ArrayLike, min_rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features have shapes {x.shape} and {y.shape}: expected (N, D) and (M, D)")
    if min(len(x), len(y)) < min_rows:
        raise ValueError(f"there are {len(x)} and {len(y)} images: expected at least {min_rows} in each set")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features hold NaN or infinity: the feature model does not suit these images")
    return x, y
