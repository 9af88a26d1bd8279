"""What the losses of spectra see, and what they do not."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from isic_vq.training.image_losses import grid_loss, spectrum_loss


@pytest.fixture
def images():
    """Smooth colour with noise of three grey levels."""
    noise = torch.randn(4, 3, 128, 128)
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise.numpy(), (0, 0, 8, 8)))
    return (0.5 + smooth + 3 / 255 * torch.randn(4, 3, 128, 128)).clamp(0, 1)


def test_equal_images_cost_nothing(images):
    assert spectrum_loss(images, images) == 0
    assert grid_loss(images, images, 8) == 0


def test_a_spectrum_has_no_phase(images):
    """A tile turned by 180 degrees has the same power; twice the contrast has four times the power in every ring."""
    tile = images[..., :32, :32]
    assert spectrum_loss(tile, tile.flip(2, 3).roll((1, 1), (2, 3))).item() == pytest.approx(0, abs=1e-3)
    louder = tile.mean((2, 3), keepdim=True) + 2 * (tile - tile.mean((2, 3), keepdim=True))
    assert spectrum_loss(tile, louder).item() == pytest.approx(torch.tensor(4.0).log().item(), abs=0.1)


def test_grain_of_one_direction_costs_more_than_grain_of_all():
    noise = 3 / 255 * torch.randn(4, 3, 128, 128)
    slanted = torch.from_numpy(ndimage.convolve(noise.numpy(), np.eye(3)[None, None] / 3**0.5))
    same, other = (
        spectrum_loss(0.5 + slanted, 0.5 + grain) for grain in (slanted.roll(40, 3), slanted.flip(3))
    )
    assert other > 1.5 * same


def test_other_noise_of_the_same_strength_costs_less_than_none(images):
    blurred = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 3, 3)))
    again = blurred + 3 / 255 * torch.randn_like(images)
    assert (blurred - images).square().mean() < (again - images).square().mean(), (
        "squared errors prefer the blur"
    )
    assert spectrum_loss(images, again) < 0.8 < 2 < spectrum_loss(images, blurred)


@pytest.mark.parametrize("period", [8, 4, 2])
def test_a_grid_costs_more_than_noise_of_its_variance(images, period):
    grid = torch.zeros(128, 128)
    grid[::period] = 1
    grid = (grid - grid.mean()) / 255
    noise = torch.randn_like(images) * grid.std()
    assert grid_loss(images, images + grid, 8) > 10 * grid_loss(images, images + noise, 8)


def test_a_grid_is_seen_at_its_own_periods_alone(images):
    """By hand: of 63 frequencies two hold a wave of period 8 along one axis, each with a quarter of its squared amplitude."""
    amplitude, rows = 1.0, torch.arange(128)
    wave = amplitude / 255 * torch.cos(2 * torch.pi * rows / 8)[:, None].expand(128, 128)
    window = torch.hann_window(128)
    line = (
        amplitude / 2 * window.sum() ** 2 / window.square().sum()
    ) ** 2  # power of white noise of variance 1 is 1
    flat = torch.full((1, 3, 128, 128), 0.5)
    expected = 2 / 63 * ((1 + line * 12).sqrt() - 1)
    assert grid_loss(flat, flat + wave, 8).item() == pytest.approx(expected.item(), rel=1e-3)
    other = amplitude / 255 * torch.cos(2 * torch.pi * rows / 6.4)[:, None].expand(128, 128)
    assert grid_loss(flat, flat + other, 8) < 1e-3 * expected


def test_both_give_finite_gradients_of_even_images():
    even = torch.full((1, 3, 32, 32), 0.5)
    decoded = even.clone().requires_grad_()
    (spectrum_loss(even, decoded) + grid_loss(even, decoded, 8)).backward()
    assert decoded.grad.isfinite().all()
