"""Codebook use counted by numpy and scipy, and what each code draws."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from isic_vq.evaluation.codebook import (
    ATLAS_CONTEXT,
    code_atlas,
    codebook_metrics,
    counts_by_diagnosis,
)
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measured_images import MIN_GROUP
from isic_vq.evaluation.measures import code_counts
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.modeling_vqvae import VQVAEModel

CODES = torch.randint(2, 11, (30, 4, 4), generator=torch.Generator().manual_seed(0))
NUM_CODES = 12


def test_counts_are_numpys_of_each_image():
    counts = code_counts(CODES, NUM_CODES)
    expected = [np.bincount(image.flatten().numpy(), minlength=NUM_CODES) for image in CODES]
    assert np.array_equal(counts.numpy(), expected)


def test_usage_perplexity_and_dead_codes_are_of_all_images_together():
    found = {m.text: m for m in codebook_metrics(code_counts(CODES, NUM_CODES), MeasuredOn("test", "x"))}
    total = np.bincount(CODES.flatten().numpy(), minlength=NUM_CODES)
    assert found["usage"].value == pytest.approx((total > 0).mean())
    assert found["perplexity"].value == pytest.approx(np.exp(scipy.stats.entropy(total)), rel=1e-5)
    assert found["dead_codes"].value == (total == 0).sum() == 3
    assert {m.n for m in found.values()} == {30}


def test_intervals_hold_the_value_and_end_where_values_do():
    same = torch.full((20, 4), 5)
    for counts in (code_counts(CODES, NUM_CODES), same, torch.eye(20, dtype=torch.int64)):
        for metric in codebook_metrics(counts, MeasuredOn("test", "x")):
            low, high = metric.interval
            most = 1 if metric.text == "usage" else counts.shape[1]
            assert 0 <= low <= metric.value <= high <= most, metric.text


def test_few_images_have_no_interval():
    assert all(
        m.interval is None
        for m in codebook_metrics(code_counts(CODES[:3], NUM_CODES), MeasuredOn("test", "x"))
    )


def test_diagnoses_are_counted_apart_and_rare_ones_not_at_all():
    rows = (
        [{"diagnosis": "nevus"}] * MIN_GROUP
        + [{"diagnosis": None}] * (MIN_GROUP + 1)
        + [{"diagnosis": "melanoma"}] * 9
    )
    counts = code_counts(CODES, NUM_CODES)
    found = counts_by_diagnosis(SimpleNamespace(rows=rows), counts)
    assert found == {
        "nevus": counts[:MIN_GROUP].sum(0).tolist(),
        "unknown": counts[MIN_GROUP : 2 * MIN_GROUP + 1].sum(0).tolist(),
    }


def test_the_atlas_shows_the_middle_of_a_grid_of_one_code():
    torch.manual_seed(0)
    model = VQVAEModel(
        VQVAEConfig(image_size=32, hidden_sizes=(4, 4), residual_size=4, num_codes=70, code_dim=4)
    ).eval()
    atlas, cell = code_atlas(model), model.config.downsampling
    assert atlas.shape == (70, 3, 2 * cell, 2 * cell)
    side = 2 + 2 * ATLAS_CONTEXT
    for code in (0, 69):
        image = model.decode(torch.full((1, side, side), code))[0]
        inner = slice(ATLAS_CONTEXT * cell, -ATLAS_CONTEXT * cell)
        torch.testing.assert_close(atlas[code], image[:, inner, inner])
