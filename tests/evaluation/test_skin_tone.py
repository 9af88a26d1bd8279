"""The typology angle: against scikit-image, by hand, and of frames that show no skin."""

import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from isic_vq.evaluation.skin_tone import cielab, typology_angles


def test_cielab_is_scikit_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 9, 7, generator=generator)
    images[0, :, 0] = torch.tensor([0.0, 0.01, 1.0])[:, None]  # the linear part, too
    expected = rgb2lab(images.permute(0, 2, 3, 1).double().numpy())
    np.testing.assert_allclose(cielab(images).permute(0, 2, 3, 1).numpy(), expected, atol=5e-3)


def test_the_angle_is_the_frames_whatever_the_lesion():
    skin, image = (0.86, 0.70, 0.60), torch.zeros(1, 3, 48, 48)
    image[:] = torch.tensor(skin)[:, None, None]
    lightness, _, yellow = rgb2lab(np.array(skin)[None, None])[0, 0]
    expected = math.degrees(math.atan((lightness - 50) / yellow))
    assert typology_angles(image).item() == pytest.approx(expected, abs=0.01)
    image[:, :, 6:42, 6:42] = 0.2  # the lesion
    image[:, :, :4, :4] = 0.0  # a dark corner
    assert typology_angles(image).item() == pytest.approx(expected, abs=0.01)
    darker = typology_angles(0.6 * image).item()
    assert darker < expected - 20


def test_an_image_whose_frame_shows_no_skin_has_no_angle():
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.full((3, 32, 32), 0.6)])
    assert typology_angles(images).isnan().tolist() == [True, True, False]
