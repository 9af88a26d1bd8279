"""Disturbed codes: how many, by which, and from the generator alone."""

import pytest
import torch

from isic_vq.evaluation.code_noise import disturb_codes


def disturbed(codes, codebook, image_share=1.0, code_share=1.0, num_nearest=4, seed=0):
    return disturb_codes(
        codes, codebook, image_share, code_share, num_nearest, torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def codes():
    return torch.randint(32, (2000, 4, 4), generator=torch.Generator().manual_seed(1))


def test_replacements_are_among_the_nearest_other_codes(codes):
    codebook = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    order = (codebook[:, None] - codebook).square().sum(-1).argsort(1)
    result = disturbed(codes, codebook)
    changed = result != codes
    rank = (order[codes[changed]] == result[changed][:, None]).int().argmax(1)
    counts = torch.bincount(rank, minlength=6)
    assert counts.tolist()[::5] == [0, 0], "neither the code itself nor one beyond the nearest"
    assert (counts[1:5] / counts.sum() - 1 / 4).abs().max() < 0.02, "each alike"


def test_shares_of_images_and_codes(codes):
    codebook = torch.arange(32.0)[:, None]
    changed = (disturbed(codes, codebook, 0.3, 0.6) != codes).flatten(1).float().mean(1)
    # P(an image keeps all of 16 codes), its share of replaced ones even in [0, .6]
    kept = 0.7 + 0.3 * (1 - 0.4**17) / (17 * 0.6)
    assert (changed == 0).float().mean().item() == pytest.approx(kept, abs=0.02)
    assert changed.mean().item() == pytest.approx(0.3 * 0.3, abs=0.01)
    assert torch.equal(disturbed(codes, codebook, 0.0), codes)
    assert torch.equal(disturbed(codes, codebook, 1.0, 0.0), codes)


def test_draws_come_from_the_generator_and_any_shape_will_do(codes):
    codebook = torch.arange(32.0)[:, None]
    assert torch.equal(disturbed(codes, codebook), disturbed(codes, codebook))
    assert not torch.equal(disturbed(codes, codebook), disturbed(codes, codebook, seed=1))
    assert torch.equal(disturbed(codes.flatten(1), codebook), disturbed(codes, codebook).flatten(1))


def test_shares_and_numbers_outside_their_range_are_refused(codes):
    for image_share, code_share, number in (
        (1.1, 1, 4),
        (1, -0.1, 4),
        (float("nan"), 1, 4),
        (1, 1, 0),
        (1, 1, 32),
    ):
        with pytest.raises(ValueError, match="expected"):
            disturbed(codes, torch.arange(32.0)[:, None], image_share, code_share, number)
