import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isic_vq.models.sampling import (
    Sampling,
    draw,
    exclude_unlikely,
    guided_logits,
    image_generators,
    position_uniforms,
)

ALMOST_ONE = 1 - 2**-53  # the largest float64 below 1
CELLS = 1000
MIDPOINTS = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS


def log(*probabilities):
    return torch.tensor([probabilities]).log()


def kept(logits, **filters):
    """Indices that a filter leaves possible in the only row."""
    return (
        exclude_unlikely(logits, **{"top_k": None, "top_p": None, **filters})[0]
        .isfinite()
        .nonzero()
        .flatten()
        .tolist()
    )


# --- draw ----------------------------------------------------------------------------------------------------------


def test_a_fine_grid_of_uniforms_is_cut_by_the_cdf():
    codes = draw(log(0.5, 0.25, 0.125, 0.125).expand(CELLS, -1), MIDPOINTS)
    assert codes.tolist() == [0] * 500 + [1] * 250 + [2] * 125 + [3] * 125


@settings(max_examples=20, deadline=None)
@given(num_codes=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_each_code_gets_its_share_of_the_uniforms(num_codes, seed):
    logits = np.random.default_rng(seed).normal(size=num_codes) * 2
    codes = draw(torch.from_numpy(logits).expand(CELLS, -1), MIDPOINTS)
    share = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(codes.numpy(), minlength=num_codes)
    assert np.abs(counts - share * CELLS).max() <= 1, "a share is off by more than one cell of the grid"


def test_draw_ignores_a_constant_added_to_the_logits():
    logits = torch.randn(CELLS, 5, dtype=torch.float64)
    assert torch.equal(draw(logits, MIDPOINTS), draw(logits + 7, MIDPOINTS))


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, ALMOST_ONE])
def test_an_excluded_code_is_never_drawn(uniform):
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 2:4] = 0
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() in (2, 3)


def test_every_row_uses_its_own_uniform_and_logits():
    logits = torch.stack([log(0.9, 0.1)[0], log(0.1, 0.9)[0]])
    assert draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist() == [0, 1]
    assert draw(logits, torch.tensor([0.95, 0.05], dtype=torch.float64)).tolist() == [1, 0]


# --- filters -------------------------------------------------------------------------------------------------------


def test_top_k_keeps_the_k_most_likely():
    filtered = exclude_unlikely(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2, None)
    assert filtered.tolist() == [[-math.inf, 3.0, 2.0, -math.inf]]


def test_top_k_keeps_what_is_tied_with_the_kth():
    assert kept(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), top_k=1) == [1, 2]


@pytest.mark.parametrize("top_k", [4, 9])
def test_top_k_of_all_codes_changes_nothing(top_k):
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert torch.equal(exclude_unlikely(logits, top_k, None), logits)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [0]),  # never less than one code
        (0.48, [0]),  # 0.49 reaches 0.48
        (0.5, [0, 2]),  # 0.49 does not reach 0.5
        (0.78, [0, 2]),
        (0.8, [0, 2, 3]),  # 0.79 does not reach 0.8
        (0.96, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, expected):
    assert kept(log(0.49, 0.05, 0.30, 0.16), top_p=top_p) == expected


def test_top_p_keeps_enough_of_tied_codes_and_no_more():
    assert len(kept(log(0.25, 0.25, 0.25, 0.25), top_p=0.3)) == 2


def test_top_p_counts_probability_after_top_k():
    logits = log(0.4, 0.3, 0.2, 0.1)
    assert kept(logits, top_p=0.5) == [0, 1]
    assert kept(logits, top_k=2, top_p=0.5) == [0], "0.4 / (0.4 + 0.3) reaches 0.5 alone"


def test_top_p_counts_probability_after_the_temperature():
    logits = log(0.49, 0.05, 0.30, 0.16)
    assert kept(logits / 0.5, top_p=0.6) == [0], "0.49^2 is 0.67 of the sum of squares"


def test_filters_leave_kept_logits_as_they_are():
    logits = log(0.49, 0.05, 0.30, 0.16)
    filtered = exclude_unlikely(logits, 3, 0.6)
    assert torch.equal(filtered[0, [0, 2]], logits[0, [0, 2]])


def test_filters_treat_each_row_by_itself():
    logits = torch.randn(5, 8)
    together = exclude_unlikely(logits / 0.8, 5, 0.7)
    alone = [exclude_unlikely(row[None] / 0.8, 5, 0.7) for row in logits]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature):
    probabilities = np.array([0.5, 0.3, 0.2])
    powered = probabilities ** (1 / temperature)
    drawn = Sampling(temperature=temperature).draw(log(*probabilities).expand(CELLS, -1), MIDPOINTS)
    shares = drawn.bincount(minlength=3) / CELLS
    np.testing.assert_allclose(shares.numpy(), powered / powered.sum(), atol=1 / CELLS)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, [1.0, 2.0]), (0.0, [0.0, 4.0]), (2.0, [2.0, 0.0]), (1.5, [1.5, 1.0])],
)
def test_guidance_goes_from_the_unconditional_through_the_conditional(scale, expected):
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert guided_logits(conditional, unconditional, scale).tolist() == expected


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"temperature": 0}, "temperature is 0: expected more than 0.*top_k=1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0: expected at least 1, or None"),
        ({"top_p": 0}, r"top_p is 0: expected a probability in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"guidance_scale": -1}, "guidance_scale is -1: expected at least 0; 1 is off"),
        ({"guidance_power": 0}, "guidance_power is 0: expected more than 0, or None for the prior's default"),
    ],
)
def test_settings_without_a_meaning_are_refused(argument, text):
    with pytest.raises(ValueError, match=text):
        Sampling(**argument)


# --- noise ---------------------------------------------------------------------------------------------------------


def noise(seed, num_images, first_index=0, num_positions=6):
    return position_uniforms(image_generators(seed, num_images, first_index), num_positions)


def test_noise_is_float64_in_the_unit_interval():
    uniforms = noise(0, 50, num_positions=100)
    assert uniforms.shape == (50, 100)
    assert uniforms.dtype == torch.float64
    assert 0 <= uniforms.min() < 0.01 < 0.99 < uniforms.max() < 1


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**40), first=st.integers(0, 10**6), count=st.integers(1, 5), cut=st.integers(0, 5)
)
def test_noise_of_an_image_is_the_same_whatever_the_batch(seed, first, count, cut):
    cut = min(cut, count)
    whole = noise(seed, count, first)
    rows = [noise(seed, size, first + start) for start, size in ((0, cut), (cut, count - cut)) if size]
    assert torch.equal(whole, torch.cat(rows))


def test_noise_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = noise(0, 2)
    torch.manual_seed(2)
    assert torch.equal(noise(0, 2), first)


def test_first_positions_do_not_depend_on_the_size_of_the_grid():
    assert torch.equal(noise(3, 2, num_positions=4), noise(3, 2, num_positions=9)[:, :4])


def test_every_seed_and_index_has_its_own_noise():
    rows = torch.cat([noise(seed, 10) for seed in range(10)])
    assert len({tuple(row.tolist()) for row in rows}) == 100, (
        "two images of the grid (seed, index) share noise"
    )


def test_noise_is_what_numpy_and_torch_make_of_seed_and_index():
    states = [
        np.random.SeedSequence(5, spawn_key=(index,)).generate_state(1, np.uint64)[0] for index in (8, 9)
    ]
    generators = [torch.Generator().manual_seed(int(state)) for state in states]
    expected = torch.stack([torch.rand(3, generator=g, dtype=torch.float64) for g in generators])
    assert torch.equal(noise(5, 2, 8, 3), expected)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1: expected 0 or more"):
        image_generators(-1, 1)
