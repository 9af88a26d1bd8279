"""Texture, grids, spectrum and coherence: against images whose values are known."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.ndimage import convolve

from isic_vq.evaluation.appearance import (
    coherence,
    grid_power,
    octave_power,
    octaves,
    power_spectrum,
    texture,
    third_colours,
)

SIDE = 64


@pytest.fixture(scope="module")
def noise():
    generator = torch.Generator().manual_seed(0)
    return 0.5 + 0.05 * torch.randn(200, 1, SIDE, SIDE, generator=generator).expand(-1, 3, -1, -1)


def stripes(period, amplitude, axis):
    """Cosines `(1, 3, SIDE, SIDE)` around 1/2 along an axis."""
    wave = 0.5 + amplitude * torch.cos(2 * math.pi * torch.arange(SIDE) / period)
    return (wave[:, None] if axis == 0 else wave).expand(1, 3, SIDE, SIDE)


def test_texture_is_the_mean_absolute_laplacian(noise):
    kernel = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    images = torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    wanted = [
        np.mean([abs(convolve(255 * channel.numpy(), kernel))[1:-1, 1:-1] for channel in image])
        for image in images
    ]
    assert_allclose(texture(images).numpy(), wanted, rtol=1e-5)
    # Laplacian of noise of deviation s: deviation s * sqrt(20), mean absolute value sqrt(2 / pi) of that
    assert texture(noise).mean().item() == pytest.approx(255 * 0.05 * math.sqrt(20 * 2 / math.pi), rel=0.01)
    ramp = torch.linspace(0, 1, SIDE).expand(1, 3, SIDE, SIDE)
    assert texture(ramp).item() == pytest.approx(0, abs=1e-4)


def test_spectrum_of_white_noise_is_flat_and_its_octaves_add_up_to_the_variance(noise):
    variance = (255 * 0.05) ** 2
    power = power_spectrum(noise).mean(0)
    assert power[4:-4, 4:-4].mean().item() == pytest.approx(variance, rel=0.01)
    assert power[0, 0].item() == pytest.approx(0, abs=1e-3)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    wanted = [
        variance * np.mean((frequency > 1 / high) & (frequency <= (1 / low if low > 2 else 1)))
        for low, high in octaves(SIDE)
    ]
    assert octaves(SIDE) == [(2, 4), (4, 8), (8, 16), (16, 32)]
    assert_allclose(octave_power(noise).mean(0).numpy(), wanted, rtol=0.05)


def test_power_of_a_sine_lies_in_the_octave_of_its_period():
    """Half of the squared amplitude, 2 per pixel of the checkerboard, whose periods are 2 along both axes."""
    for period, octave, error in ((3, 0, 0.01), (5.5, 1, 0.01), (12, 2, 0.05), (20, 3, 0.25)):
        power = octave_power(stripes(period, 0.1, axis=1))[0]
        assert power.argmax().item() == octave, period  # the window moves some of it by one frequency
        assert power[octave].item() == pytest.approx(25.5**2 / 2, rel=error), period
    board = 0.5 + 0.1 * (-1.0) ** (torch.arange(SIDE)[:, None] + torch.arange(SIDE)).expand(1, 3, -1, -1)
    assert octave_power(board)[0, 0].item() == pytest.approx(25.5**2, rel=0.01)


def test_grid_power_sees_a_planted_grid_at_its_period_alone(noise):
    clean = grid_power(noise, (8, 4, 2))
    assert_allclose(clean.mean(0).numpy(), 1, atol=0.15)
    # Power of a line: amplitude^2 / 4 times (sum of window)^2 over the sum of its squares, (2/3)^2 SIDE^2 of Hann.
    lines = {8: SIDE**2 / 4, 4: SIDE**2 / 4, 2: SIDE**2}  # at period 2 both signs of the frequency coincide
    for index, (period, gain) in enumerate(lines.items()):
        for axis in (0, 1):
            planted = noise + stripes(period, 0.01, axis) - 0.5
            more = (grid_power(planted, (8, 4, 2)) - clean).mean(0)
            wanted = (2 / 3) ** 2 * gain * 0.01**2 / 0.05**2 / 2  # mean of both axes
            assert more[index].item() == pytest.approx(wanted, rel=0.15), (period, axis)
            assert more.abs().sort().values[:2].max() < 0.05, "other periods see nothing"
    assert grid_power(torch.full((1, 3, SIDE, SIDE), 0.3), (8, 4, 2)).abs().max() < 1e-3, "an even image"


def test_grid_power_refuses_periods_that_do_not_divide_the_side():
    for size, periods in (((64, 64), (3,)), ((64, 32), (2,)), ((64, 64), (1,))):
        with pytest.raises(ValueError, match="every period divides"):
            grid_power(torch.rand(1, 3, *size), periods)


def test_coherence_is_the_correlation_of_upper_and_lower_third():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 3, 12, 12, generator=generator)
    images[:, :, :4] += torch.randn(50, 3, 1, 1, generator=generator)
    images[:, 0, -4:] += 2 * images[:, 0, :4]
    colours = third_colours(images)
    above, below = images[:, :, :4].mean((2, 3)).numpy(), images[:, :, 8:].mean((2, 3)).numpy()
    assert_allclose(colours.numpy(), np.stack([above, below], 1), rtol=1e-5)
    wanted = [np.corrcoef(above[:, c], below[:, c])[0, 1] for c in range(3)]
    assert wanted[0] > 0.9 > abs(wanted[1])
    assert_allclose(coherence(colours).numpy(), wanted, rtol=1e-4)
    assert coherence(torch.full((4, 2, 3), 0.5)).tolist() == [0, 0, 0]
