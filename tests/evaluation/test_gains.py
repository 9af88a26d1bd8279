"""Differences of AUC over seeds and test images: against scikit-learn, DeLong's variance, simulation and Holm's definition."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from isic_vq.evaluation.gains import bootstrap_counts, estimate, expected_half_width, holm, wins


def drawn(seeds, positive, shift, generator):
    return [torch.randn(len(positive), generator=generator) + shift * positive for _ in range(seeds)]


def test_wins_average_to_the_area_under_the_curve_with_ties_at_half():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (60,), generator=generator).float()
    positive = torch.arange(60) % 3 == 0
    assert wins(scores, positive).mean().item() == pytest.approx(
        roc_auc_score(positive.numpy(), scores.numpy())
    )


def delong_variance(differences):
    """Of a difference of two AUCs on the same images: DeLong et al. 1988, from the means of pairs by image."""
    rows, columns = differences.mean(dim=1), differences.mean(dim=0)
    return (rows.var() / len(rows) + columns.var() / len(columns)).item()


def test_where_seeds_agree_the_interval_is_delongs():
    generator = torch.Generator().manual_seed(1)
    positive = torch.arange(400) < 150
    better, worse = (drawn(1, positive, shift, generator)[0] for shift in (1.5, 0.8))
    gain = estimate([better] * 3, positive, [worse] * 3, resamples=4000)
    error = delong_variance(wins(better, positive) - wins(worse, positive)) ** 0.5
    assert gain.value == pytest.approx(
        roc_auc_score(positive, better.numpy()) - roc_auc_score(positive, worse.numpy())
    )
    assert (gain.interval[1] - gain.interval[0]) / 2 == pytest.approx(1.976 * error, rel=0.05)
    assert gain.seeds == pytest.approx([gain.value] * 3)


def test_where_seeds_decide_the_interval_is_students_of_the_seeds():
    positive = torch.arange(4000) % 2 == 0
    shares = (0.2, 0.5, 0.6, 0.9)  # of positive images above all others; the rest are below all
    scores = []
    for share in shares:
        each = torch.zeros(4000)
        each[torch.nonzero(positive).flatten()] = torch.where(torch.arange(2000) < share * 2000, 1.0, -1.0)
        scores.append(each)
    found = estimate(scores, positive)
    spread = np.std(shares, ddof=1) / 2
    assert found.value == pytest.approx(np.mean(shares))
    assert found.interval == pytest.approx(
        (found.value - 3.182 * spread, found.value + 3.182 * spread), rel=0.01
    )


@pytest.mark.slow
def test_intervals_cover_the_true_difference_and_p_values_are_not_too_small():
    """600 studies of five seeds without a difference: seed effects and image effects are shared as in a real one."""
    generator = torch.Generator().manual_seed(2)
    positive, covered, rejected = torch.arange(120) < 30, 0, 0
    for study in range(600):
        images = torch.randn(120, generator=generator) + positive
        arms = [
            [images + 0.7 * torch.randn(120, generator=generator) for _ in range(5)]
            for _ in ("arm", "reference")
        ]
        gain = estimate(arms[0], positive, arms[1], resamples=200, seed=study)
        covered += gain.interval[0] <= 0 <= gain.interval[1]
        rejected += gain.p_value < 0.05
    assert covered == 600 - rejected
    assert covered / 600 > 0.94


def test_draws_of_images_have_their_number_and_leave_one_out():
    counts = bootstrap_counts(7, 3000, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 7).all()
    assert (counts.min(axis=1) == 0).all()
    values = np.arange(7.0)
    assert (counts @ values / 7).var() == pytest.approx(values.var(ddof=1) / 7, rel=0.08)


def test_what_is_always_the_same_has_no_width():
    positive = torch.arange(10) < 4
    same = [torch.arange(10.0)] * 2
    gain = estimate(same, positive, same)
    assert (gain.value, gain.interval, gain.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_single_seeds_and_single_images_are_refused():
    positive = torch.arange(10) < 4
    with pytest.raises(ValueError, match="1 seeds"):
        estimate([torch.arange(10.0)], positive)
    with pytest.raises(ValueError, match="1 positive"):
        estimate([torch.arange(10.0)] * 2, torch.arange(10) < 1)


def test_holm_is_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_expected_half_width_is_hanley_and_mcneils():
    """Their table of 1982: 51 abnormal and 58 normal images and an area of .893 have a standard error of .032."""
    assert expected_half_width(0.893, 51, 58) / 1.95996 == pytest.approx(0.032, abs=1e-3)
