"""Images that are wrong in a known way: what a score of unusual images is measured against.

Each corruption is a function of the pixels and of one random generator per image, so that what happens to an image
depends on the seed and its index alone, not on the batch it comes in. Strengths are those of 128 x 128 images:
blur and patches are as many pixels there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_vq.models.sampling import image_generators

PATCHES_PER_SIDE = 8


def gaussian_blur(pixel_values: Tensor, sigma: float) -> Tensor:
    """Convolve images `(B, 3, H, W)` with a Gaussian of `sigma` pixels, cut off at 3 sigma, borders mirrored."""
    reach = min(math.ceil(3 * sigma), min(pixel_values.shape[2:]) - 1)  # as far as a border can be mirrored
    offsets = torch.arange(-reach, reach + 1, dtype=pixel_values.dtype, device=pixel_values.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixel_values, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)


def shuffle_patches(
    pixel_values: Tensor, generators: Sequence[torch.Generator], patches_per_side: int = PATCHES_PER_SIDE
) -> Tensor:
    """Cut each image `(B, 3, H, W)` into equal squares and put them back in a random order.

    Raises:
        ValueError: the side is not a multiple of `patches_per_side`.
    """
    batch, _, height, width = pixel_values.shape
    if height % patches_per_side or width % patches_per_side:
        raise ValueError(
            f"images of {height} x {width} px have no {patches_per_side} patches per side: expected a multiple"
        )
    size = (height // patches_per_side, width // patches_per_side)
    patches = F.unfold(pixel_values, size, stride=size)  # (B, 3 * patch height * patch width, number)
    orders = torch.stack([torch.randperm(patches.shape[2], generator=g) for g in generators])
    index = orders.to(patches.device)[:, None, :].expand_as(patches)
    return F.fold(patches.gather(2, index), (height, width), size, stride=size)


def add_noise(pixel_values: Tensor, generators: Sequence[torch.Generator], std: float) -> Tensor:
    """Add Gaussian noise of standard deviation `std` to images `(B, 3, H, W)` in [0, 1], and clamp."""
    noise = torch.stack([torch.randn(pixel_values.shape[1:], generator=g) for g in generators])
    return (pixel_values + std * noise.to(pixel_values)).clamp(0, 1)


@dataclass(frozen=True)
class Corruption:
    """A way to spoil images.

    Attributes:
        apply: from images `(B, 3, H, W)` in [0, 1] and B generators to images of the same shape and range.
    """

    description: str
    apply: Callable[[Tensor, Sequence[torch.Generator]], Tensor]


CORRUPTIONS = {
    "blur": Corruption("Gaussian blur, sigma 2 px", lambda images, _: gaussian_blur(images, sigma=2.0)),
    "inverted": Corruption("1 - pixel value", lambda images, _: 1 - images),
    "shuffled": Corruption("8 x 8 patches in random order", shuffle_patches),
    "noise": Corruption(
        "Gaussian noise, standard deviation 0.1",
        lambda images, generators: add_noise(images, generators, std=0.1),
    ),
}


def corrupt(name: str, pixel_values: Tensor, seed: int, first_index: int = 0) -> Tensor:
    """Spoil images `(B, 3, H, W)` in [0, 1] in a way of `CORRUPTIONS`; image i is a function of its pixels and (seed, first_index + i).

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`, RGB in [0, 1].
    """
    generators = image_generators(seed, len(pixel_values), first_index)
    return CORRUPTIONS[name].apply(pixel_values, generators)
