"""The patch discriminator and its losses."""

import numpy as np
import pytest
import torch
from torch import nn

from isic_vq.training.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    expected = 0.5 * (np.mean([0, 0.5, 2]) + np.mean([0, 1, 2]))
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_a_score_sees_seventy_pixels():
    """The receptive field of the middle score, found by gradients."""
    discriminator = PatchDiscriminator()
    for layer in discriminator:  # GroupNorm sees the whole image; without it only the convolutions count
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda hidden: hidden
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    scores = discriminator(images)
    assert scores.shape == (1, 1, 14, 14)
    scores[0, 0, 7, 7].backward()
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


def test_adaptive_weight_balances_the_pulls_at_the_last_layer():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (3 * weight).sum(), (weight * torch.tensor([0.3, 0.4])).sum()
    expected = np.hypot(3, 3) / (0.5 + 1e-4)
    result = adaptive_weight(reconstruction, adversarial, weight)
    assert result.item() == pytest.approx(expected)
    assert not result.requires_grad
    assert weight.grad is None


def test_adaptive_weight_is_bounded():
    weight = nn.Parameter(torch.ones(1))
    assert adaptive_weight((1e9 * weight).sum(), (0 * weight).sum(), weight).item() == 1e4
