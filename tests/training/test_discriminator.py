"""The patch discriminator and its losses."""

import numpy as np
import pytest
import torch
from torch import nn

from isic_vq.training.discriminator import LeCam, PatchDiscriminator, discriminator_loss


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    expected = 0.5 * (np.mean([0, 0.5, 2]) + np.mean([0, 1, 2]))
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_the_pixels_that_the_recipe_names(layers, field):
    """The receptive field of the middle score, found by gradients."""
    discriminator = PatchDiscriminator(num_layers=layers)
    for layer in discriminator:  # GroupNorm sees the whole image; without it only the convolutions count
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda hidden: hidden
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    scores = discriminator(images)
    assert scores.shape[:2] == (1, 1)
    middle = scores.shape[2] // 2
    scores[0, 0, middle, middle].backward()
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == field


def test_lecam_by_hand():
    """The first batch is measured from its own means, later ones from moving means of those before them."""
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    assert lecam(real, fake).item() == pytest.approx((4 + 16) / 2 + (16 + 4) / 2)
    assert lecam.means.tolist() == [2, -1]
    real, fake = torch.tensor([4.0]), torch.tensor([1.0])
    assert lecam(real, fake).item() == pytest.approx((4 + 1) ** 2 + (1 - 2) ** 2)
    assert lecam.means.tolist() == pytest.approx([0.9 * 2 + 0.1 * 4, 0.9 * -1 + 0.1 * 1])


def test_lecam_pulls_both_kinds_of_scores_to_the_others_mean():
    lecam = LeCam()
    lecam(torch.tensor([1.0]), torch.tensor([-1.0]))
    real, fake = (torch.tensor([value], requires_grad=True) for value in (2.0, -3.0))
    lecam(real, fake).backward()
    assert real.grad.item() == pytest.approx(2 * (2 + 1))
    assert fake.grad.item() == pytest.approx(2 * (-3 - 1))
