"""Intervals against scipy, closed forms, and simulation: a 95 % interval holds the truth in 95 of 100 worlds."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from isic_vq.evaluation.distances import frechet_distance
from isic_vq.evaluation.intervals import (
    bootstrap_interval,
    mean_interval,
    share_interval,
    subsample_intervals,
)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


def mean_of_rows(rows):
    return float(rows.mean())


def means(*sets):
    """A statistic of one or two sets that is linear in their rows."""
    return {"difference": sum(sign * rows.mean() for sign, rows in zip((1, -1), sets, strict=False))}


def frechet(a, b):
    return {"frechet_distance": frechet_distance(a, b)}


def test_mean_interval_is_scipys_t_interval():
    values = np.random.default_rng(0).gamma(2.0, size=17)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean_interval(torch.from_numpy(values)) == mean_interval(values)


def test_interval_of_equal_values_is_that_value():
    assert mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert bootstrap_interval(mean_of_rows, [3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert subsample_intervals(means, np.full(8, 3.0))["difference"] == (3.0, 3.0)


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0], [3.0, 4.0]]])
def test_mean_interval_needs_two_numbers_on_one_axis(values):
    with pytest.raises(ValueError, match="expected at least two numbers"):
        mean_interval(values)


@pytest.mark.parametrize(("count", "total"), [(0, 9), (3, 9), (9, 9), (1, 1), (480, 597)])
def test_share_interval_is_wilsons(count, total):
    """Its ends are the shares p that are just not refused: (share - p)^2 = z^2 p (1 - p) / n."""
    low, high = share_interval(count, total)
    square = stats.norm.ppf(0.975) ** 2 / total
    share = count / total
    expected = np.roots([1 + square, -(2 * share + square), share**2])
    assert (low, high) == pytest.approx(sorted(expected), abs=1e-12)
    assert 0 <= low <= count / total <= high <= 1


@pytest.mark.parametrize(("count", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_share_interval_refuses_what_is_no_share(count, total):
    with pytest.raises(ValueError, match="must"):
        share_interval(count, total)


def test_bootstrap_interval_of_a_mean_is_students_where_rows_are_few_and_symmetric():
    half = np.random.default_rng(1).normal(size=6)
    values = np.concatenate([half, -half])
    low, high = mean_interval(values)
    got = bootstrap_interval(mean_of_rows, values, resamples=20000)
    assert got == pytest.approx((low, high), abs=0.05 * (high - low))


def test_bootstrap_interval_is_scipys_percentile_interval_where_rows_are_many():
    values = np.random.default_rng(1).exponential(size=1000)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0)
    got = bootstrap_interval(mean_of_rows, values, resamples=4000)
    assert got == pytest.approx(tuple(expected.confidence_interval), abs=0.05 * (got[1] - got[0]))


def test_every_bootstrap_draw_leaves_a_row_out():
    drawn = []
    bootstrap_interval(lambda rows: drawn.append(set(rows)) or 0.0, np.arange(2), resamples=100)
    assert drawn.count({0}) + drawn.count({1}) == 100, "of two rows, one is left, twice"
    assert min(drawn.count({0}), drawn.count({1})) > 25


def test_bootstrap_draws_a_row_from_all_columns_at_once():
    ids = np.arange(30)

    def rows_stay_whole(a, b):
        np.testing.assert_array_equal(2 * a, b)
        return float(len(set(a)))

    low, high = bootstrap_interval(rows_stay_whole, ids, torch.from_numpy(2 * ids), resamples=200)
    assert 10 < low < high < 27, "about (1 - 1/e) of the rows are in a draw"


def test_bootstrap_keeps_the_size_of_every_stratum():
    groups = np.array([0] * 20 + [1] * 5 + [7])

    def group_sizes_are_kept(rows):
        assert [int((rows == group).sum()) for group in (0, 1, 7)] == [20, 5, 1]
        return 0.0

    bootstrap_interval(group_sizes_are_kept, groups, strata=groups, resamples=50)
    with pytest.raises(AssertionError):
        bootstrap_interval(group_sizes_are_kept, groups, resamples=50)


def test_strata_take_the_difference_between_groups_out():
    groups = np.repeat([0, 1], 50)
    values = 10.0 * groups + np.random.default_rng(2).normal(size=100)
    low, high = bootstrap_interval(mean_of_rows, values, strata=groups)
    loose = bootstrap_interval(mean_of_rows, values)
    assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.25), "the noise within groups alone"
    assert loose[1] - loose[0] > 3 * (high - low)


@pytest.mark.parametrize("columns", [(), ([1.0, 2.0], [1.0])])
def test_bootstrap_needs_columns_of_the_same_rows(columns):
    with pytest.raises(ValueError, match="expected at least one column, all of the same rows"):
        bootstrap_interval(lambda *_: 0.0, *columns)


@pytest.mark.parametrize(("values", "strata"), [([1.0], None), ([1.0, 2.0], [0, 1])])
def test_bootstrap_needs_two_rows_in_a_stratum(values, strata):
    with pytest.raises(ValueError, match="expected two rows in at least one of them"):
        bootstrap_interval(mean_of_rows, values, strata=strata)


def test_strata_must_be_given_for_every_row():
    with pytest.raises(ValueError, match=r"strata have shape \(1,\): expected one per row, \(2,\)"):
        bootstrap_interval(mean_of_rows, [1.0, 2.0], strata=[0])


def test_a_seed_repeats_an_interval_and_another_one_moves_it():
    values = np.random.default_rng(3).normal(size=40)
    for interval in (
        lambda seed: bootstrap_interval(mean_of_rows, values, resamples=50, seed=seed),
        lambda seed: subsample_intervals(means, values, seed=seed)["difference"],
    ):
        assert interval(0) == interval(0) != interval(1)


def test_mean_interval_covers():
    generator = np.random.default_rng(4)
    worlds = generator.normal(1.0, 2.0, size=(2000, 6))
    assert coverage(map(mean_interval, worlds), 1.0) == pytest.approx(0.95, abs=0.02)


def test_share_interval_covers():
    counts = np.random.default_rng(5).binomial(40, 0.9, size=2000)
    intervals = [share_interval(int(count), 40) for count in counts]
    assert coverage(intervals, 0.9) == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
def test_bootstrap_interval_covers():
    worlds = np.random.default_rng(6).gamma(4.0, size=(500, 80))
    intervals = [bootstrap_interval(mean_of_rows, w, resamples=200, seed=s) for s, w in enumerate(worlds)]
    assert coverage(intervals, 4.0) == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
def test_stratified_bootstrap_of_few_rows_covers_as_often_as_the_exact_interval():
    """On the same worlds, so that luck cancels; a plain percentile interval covers four points less."""
    groups = np.repeat([0, 1], [12, 8])
    worlds = groups * 5.0 + np.random.default_rng(7).normal(size=(500, 20))

    weights = 0.5 / np.where(groups == 0, 12, 8)  # the mean of both groups' means

    intervals = [
        bootstrap_interval(np.dot, world, weights, strata=groups, resamples=300, seed=seed)
        for seed, world in enumerate(worlds)
    ]
    exact = []
    for world in worlds:
        tests = stats.ttest_ind(world[groups == 1], -world[groups == 0], equal_var=True)
        sums = tests.confidence_interval(0.95)
        exact.append((sums.low / 2, sums.high / 2))
    assert coverage(intervals, 2.5) == pytest.approx(coverage(exact, 2.5), abs=0.025)


def test_subsample_interval_of_a_mean_is_students():
    values = np.random.default_rng(8).normal(size=40)
    got = subsample_intervals(means, values, repeats=4000)["difference"]
    low, high = mean_interval(values)
    assert got == pytest.approx((low, high), abs=0.05 * (high - low))


def test_halves_are_drawn_without_replacement():
    def no_row_twice(a, b):
        assert len(set(a.tolist())) == len(a)
        assert len(set(b.tolist())) == len(b)
        return {"rows": float(len(a) + len(b))}

    intervals = subsample_intervals(no_row_twice, np.arange(8), torch.arange(4), repeats=20)
    assert intervals == {"rows": (12.0, 12.0)}, "the value is that of the whole sets: 8 + 4 rows"


def test_halves_have_half_of_each_stratum_and_every_row_as_often():
    groups = np.array([2] * 6 + [0] * 5 + [1] * 1)
    drawn = []
    subsample_intervals(
        lambda rows: drawn.append(rows) or {"rows": 0.0}, np.arange(12), strata=[groups], repeats=600
    )
    halves = drawn[:-1] if len(drawn[-1]) == 12 else drawn
    for rows in halves:
        assert len(rows) == 6
        assert [abs(np.sum(groups[rows] == g) - np.sum(groups == g) / 2) <= 0.5 for g in (0, 1, 2)] == [
            True
        ] * 3
    times = np.bincount(np.concatenate(halves), minlength=12)
    assert times == pytest.approx(np.full(12, 300), abs=60), "each in half of the halves"


def test_strata_take_the_difference_between_groups_out_of_halves():
    groups = np.repeat([0, 1], 40)
    values = 10.0 * groups + np.random.default_rng(14).normal(size=80)
    low, high = subsample_intervals(means, values, strata=[groups], repeats=1000)["difference"]
    within = np.sqrt((values[:40].var(ddof=1) + values[40:].var(ddof=1)) / 2 / 80)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 78) * within, rel=0.1)
    loose = subsample_intervals(means, values)["difference"]
    assert loose[1] - loose[0] > 3 * (high - low)


@pytest.mark.parametrize(
    ("strata", "message"),
    [([[0, 1, 2]], "strata have shapes"), ([range(8)], "hardly more rows than strata")],
)
def test_strata_of_halves_must_leave_something_to_draw(strata, message):
    with pytest.raises(ValueError, match=message):
        subsample_intervals(means, np.arange(8.0), strata=strata)


def test_a_set_without_halves_is_refused():
    with pytest.raises(ValueError, match=r"the sets have \[10, 3\] rows: expected at least four"):
        subsample_intervals(means, np.zeros(10), np.zeros(3))


@pytest.mark.slow
def test_subsample_interval_of_a_difference_of_means_covers():
    generator = np.random.default_rng(9)
    intervals = [
        subsample_intervals(means, generator.normal(1, 1, 50), generator.normal(0, 2, 50))["difference"]
        for _ in range(500)
    ]
    assert coverage(intervals, 1.0) == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
def test_subsample_interval_of_a_frechet_distance_covers_its_expectation_at_that_size():
    generator = np.random.default_rng(10)

    def sets():
        return generator.normal(size=(80, 3)), generator.normal(0.8, 1.4, size=(80, 3))

    expectation = np.mean([frechet_distance(*sets()) for _ in range(4000)])
    intervals = [subsample_intervals(frechet, *sets(), repeats=40)["frechet_distance"] for _ in range(300)]
    assert coverage(intervals, expectation) == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
def test_subsample_interval_at_the_floor_is_cautious_by_less_than_twice():
    generator = np.random.default_rng(11)

    def sets():
        return generator.normal(size=(2, 80, 3))

    values = [frechet_distance(*sets()) for _ in range(1000)]
    intervals = [subsample_intervals(frechet, *sets(), repeats=40)["frechet_distance"] for _ in range(200)]
    assert coverage(intervals, np.mean(values)) >= 0.95
    width = np.mean([high - low for low, high in intervals])
    assert 1 < width / (2 * 1.99 * np.std(values)) < 2


def test_a_bootstrap_would_move_the_frechet_distance_itself():
    """Why sets are halved and not resampled: the value lies below nearly all values of a bootstrap."""
    generator = np.random.default_rng(12)
    a, b = generator.normal(size=(2, 60, 10))
    drawn = [frechet_distance(*(rows[generator.integers(0, 60, 60)] for rows in (a, b))) for _ in range(200)]
    assert np.mean(np.array(drawn) > frechet_distance(a, b)) > 0.97


def test_intervals_of_all_subsamples_of_a_small_set_have_students_variance():
    """The formula behind the halves, by enumeration: variance over all halves of n rows is s^2 / n."""
    values = np.random.default_rng(13).normal(size=8)
    halves = [values[list(rows)].mean() for rows in itertools.combinations(range(8), 4)]
    assert np.var(halves) == pytest.approx(values.var(ddof=1) / 8, rel=1e-12)
