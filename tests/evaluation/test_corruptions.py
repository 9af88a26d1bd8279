"""What is done to images, against scipy and by hand; and that it depends on seed and index alone."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from isic_vq.evaluation.out_of_distribution import (
    CORRUPTIONS,
    add_noise,
    corrupt,
    gaussian_blur,
    shuffle_patches,
)
from isic_vq.models.sampling import image_generators


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_spoiled_images_differ_but_stay_in_range_and_leave_the_originals_alone(images, name):
    before = images.clone()
    spoiled = corrupt(name, images, seed=0)
    assert (spoiled.shape, spoiled.dtype) == (images.shape, images.dtype)
    assert 0 <= spoiled.min() <= spoiled.max() <= 1
    assert all(not torch.allclose(spoiled[index], images[index], atol=0.01) for index in range(5))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_seed_and_index_and_not_on_its_batch(images, name):
    whole = corrupt(name, images, seed=3)
    parts = [corrupt(name, images[:2], seed=3), corrupt(name, images[2:], seed=3, first_index=2)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["shuffled", "noise"])
def test_another_seed_or_index_spoils_an_image_otherwise(images, name):
    spoiled = corrupt(name, images[:1].expand(2, -1, -1, -1), seed=0)
    assert not torch.equal(spoiled[0], spoiled[1])
    assert not torch.equal(spoiled, corrupt(name, images[:1].expand(2, -1, -1, -1), seed=1))


def test_blur_is_scipys_gaussian_filter(images):
    blurred = gaussian_blur(images, sigma=2.0)
    expected = ndimage.gaussian_filter(
        images.double().numpy(), sigma=(0, 0, 2, 2), mode="mirror", truncate=3.0
    )
    np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-6)


def test_blur_of_an_image_smaller_than_its_kernel_keeps_flat_images_flat():
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, sigma=2.0), flat)


def test_inverting_twice_is_nothing(images):
    torch.testing.assert_close(corrupt("inverted", corrupt("inverted", images, seed=0), seed=0), images)


def patches_of(image, size):
    """Every patch as bytes, row by row."""
    pixels = image.permute(1, 2, 0).numpy()
    sides = range(0, len(pixels), size)
    return [pixels[top : top + size, left : left + size].tobytes() for top in sides for left in sides]


def test_shuffling_moves_whole_patches_and_loses_none(images):
    shuffled = shuffle_patches(images, image_generators(0, 5), patches_per_side=4)
    for before, after in zip(images, shuffled, strict=True):
        assert sorted(patches_of(before, 8)) == sorted(patches_of(after, 8))
        moved = [a != b for a, b in zip(patches_of(before, 8), patches_of(after, 8), strict=True)]
        assert sum(moved) > 8


def test_images_that_cannot_be_cut_into_patches_are_refused():
    with pytest.raises(ValueError, match="images of 20 x 20 px have no 8 patches per side"):
        corrupt("shuffled", torch.zeros(1, 3, 20, 20), seed=0)


def test_noise_has_the_stated_deviation():
    grey = torch.full((4, 3, 64, 64), 0.5)
    noise = add_noise(grey, image_generators(0, 4), std=0.1) - grey
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.002)
