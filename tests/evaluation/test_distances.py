"""Distances between sets against torchmetrics, closed forms, enumeration and loops written out."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from isic_vq.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)

DISTANCES = [
    frechet_distance,
    kernel_distance,
    lambda a, b: np.array(list(precision_recall_density_coverage(a, b, k=2).values())),
]


class PixelsAsFeatures(nn.Module):
    """What torchmetrics takes for a feature model: the pixels themselves."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images.flatten(1)


@pytest.fixture
def sets():
    """Two sets of features of different size, mean and covariance."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(40, 12)), generator.normal(0.3, 1.2, size=(50, 12)) @ np.triu(
        np.ones(12)
    ) / 4


def update(metric, a, b):
    for rows, real in ((a, True), (b, False)):
        metric.update(torch.from_numpy(rows).reshape(-1, 3, 2, 2), real=real)
    return metric


def loops(real, generated, k):
    """Precision, recall, density and coverage as their definitions say, point by point."""

    def reach(points, i):
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(point, points, i):
        return np.linalg.norm(point - points[i]) <= reach(points, i)

    n, m = range(len(real)), range(len(generated))
    return {
        "precision": np.mean([any(inside(generated[j], real, i) for i in n) for j in m]),
        "recall": np.mean([any(inside(real[i], generated, j) for j in m) for i in n]),
        "density": sum(inside(generated[j], real, i) for i in n for j in m) / (k * len(generated)),
        "coverage": np.mean([any(inside(generated[j], real, i) for j in m) for i in n]),
    }


def test_frechet_distance_is_torchmetrics(sets):
    metric = FrechetInceptionDistance(PixelsAsFeatures(12), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    expected = update(metric, *sets).compute().item()
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.1


def test_frechet_distance_of_known_gaussians_is_the_closed_form():
    """Rows +-c e_i, whose covariance is diagonal and known: the root of the product is the product of roots."""
    variances = np.array([[1.0, 4.0, 0.25], [2.25, 0.0, 9.0]])
    a, b = (np.concatenate([np.diag(np.sqrt(2.5 * v)), -np.diag(np.sqrt(2.5 * v))]) for v in variances)
    np.testing.assert_allclose(np.cov(a, rowvar=False), np.diag(variances[0]))
    shift = np.array([3.0, -1.0, 2.0])
    expected = 14.0 + (1.0 - 1.5) ** 2 + (2.0 - 0.0) ** 2 + (0.5 - 3.0) ** 2
    assert frechet_distance(a, b + shift) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_holds_with_fewer_rows_than_features(sets):
    """Against the eigenvalues of the product of covariances, of which most are zero."""
    a, b = (rows[:6] for rows in sets)
    product = np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(product).real.clip(min=0)).sum()
    expected = (
        ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * root
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [5, 40])
def test_a_set_is_at_frechet_distance_zero_from_itself(rows):
    features = 100 + 10 * np.random.default_rng(1).normal(size=(rows, 12))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_does_not_see_a_rotation_or_a_shift_of_both_sets(sets):
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))
    moved = [rows @ rotation + 5 for rows in sets]
    assert frechet_distance(*moved) == pytest.approx(frechet_distance(*sets), rel=1e-9)


def test_frechet_distance_grows_with_the_square_of_the_features_scale(sets):
    assert frechet_distance(*(3 * rows for rows in sets)) == pytest.approx(
        9 * frechet_distance(*sets), rel=1e-9
    )


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all:UserWarning")
def test_kernel_distance_is_torchmetrics(sets):
    sets = [rows[:40] for rows in sets]
    metric = KernelInceptionDistance(PixelsAsFeatures(12), subsets=1, subset_size=40).set_dtype(torch.float64)
    expected, _ = update(metric, *sets).compute()
    assert kernel_distance(*sets) == pytest.approx(expected.item(), rel=1e-6)


def test_kernel_distance_is_the_double_loop(sets):
    a, b = sets[0][:7], sets[1][:9]

    def kernel(x, y):
        return (sum(u * v for u, v in zip(x, y, strict=True)) / 12 + 1) ** 3

    expected = (
        np.mean([kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
        + np.mean([kernel(b[i], b[j]) for i in range(9) for j in range(9) if i != j])
        - 2 * np.mean([kernel(x, y) for x in a for y in b])
    )
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_mean_kernel_distance_over_all_subsets_is_that_of_all_rows(sets):
    a, b = sets[0][:6], sets[1][:6]
    subsets = [list(rows) for rows in itertools.combinations(range(6), 3)]
    values = [kernel_distance(a[i], b[j]) for i in subsets for j in subsets]
    assert np.mean(values) == pytest.approx(kernel_distance(a, b), rel=1e-10)
    assert np.std(values) > 0.1 * abs(np.mean(values)), "single subsets do differ"


def test_kernel_distance_is_zero_on_average_for_one_distribution():
    generator = np.random.default_rng(3)
    values = [kernel_distance(*generator.normal(size=(2, 20, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert min(values) < 0, "an unbiased estimate of zero is below it half the time"


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_measures_are_the_definitions(k):
    generator = np.random.default_rng(k)
    real, generated = generator.normal(size=(25, 2)), generator.normal(0.7, 1.5, size=(20, 2))
    got = precision_recall_density_coverage(real, generated, k)
    assert got == pytest.approx(loops(real, generated, k), abs=1e-12)
    assert len(set(got.values())) == 4, "a case that tells them apart"


def test_sets_far_apart_share_nothing():
    real = np.random.default_rng(4).normal(size=(10, 3))
    got = precision_recall_density_coverage(real, real + 100)
    assert got == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_a_collapsed_generator_is_precise_and_covers_nothing_else():
    """Real points 0, 1, ..., 19; all generated ones near 10: k = 1, so balls of real points reach to 1."""
    real = np.arange(20.0)[:, None]
    generated = 10 + np.linspace(0.1, 0.2, 6)[:, None]
    got = precision_recall_density_coverage(real, generated, k=1)
    assert got == pytest.approx({"precision": 1, "recall": 0, "density": 2, "coverage": 2 / 20})


def test_a_generator_that_spreads_too_far_recalls_all_and_is_imprecise():
    """Real points 0 to 9; generated ones 30 apart, whose balls hold all real points, but only 0 is near them."""
    real = np.arange(10.0)[:, None]
    generated = np.array([[-30.0], [0.0], [30.0], [60.0]])
    got = precision_recall_density_coverage(real, generated, k=1)
    assert got == pytest.approx({"precision": 1 / 4, "recall": 1, "density": 2 / 4, "coverage": 2 / 10})


def test_a_copy_of_the_real_set_lies_within_it():
    real = np.random.default_rng(5).normal(size=(30, 4))
    got = precision_recall_density_coverage(real, real.copy())
    assert (got["precision"], got["recall"], got["coverage"]) == (1, 1, 1)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_do_not_see_the_order_of_images(distance, sets):
    generator = np.random.default_rng(6)
    shuffled = [generator.permutation(rows) for rows in sets]
    np.testing.assert_allclose(distance(*shuffled), distance(*sets), rtol=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_take_tensors(distance, sets):
    np.testing.assert_array_equal(distance(*map(torch.from_numpy, sets)), distance(*sets))


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_refuse_what_has_no_distance(distance):
    rows = np.ones((6, 3))
    with pytest.raises(ValueError, match=r"shapes \(6, 3\) and \(6, 2\): expected"):
        distance(rows, rows[:, :2])
    with pytest.raises(ValueError, match="6 and 1 images: expected at least"):
        distance(rows, rows[:1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        distance(rows, np.where(np.eye(6, 3), np.nan, rows))


def test_neighbours_are_at_least_one():
    with pytest.raises(ValueError, match="k is 0: expected at least 1"):
        precision_recall_density_coverage(np.ones((6, 3)), np.ones((6, 3)), k=0)
