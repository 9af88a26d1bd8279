"""The eight symmetries of the square as augmentation: a lesion has no upright orientation.

View v rotates by v mod 4 quarter turns counter-clockwise; views 4 to 7 mirror left and right first:

    0 identity       1 quarter turn      2 half turn        3 three quarter turns
    4 mirror         5 mirror, then 1    6 mirror, then 2   7 mirror, then 3

Nothing is interpolated, so that values of pixels and code grids stay the same.
"""

import numpy as np
import torch
from numpy.typing import NDArray

NUM_VIEWS = 8


def dihedral(pixel_values: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Apply to each image of a batch `(B, ..., side, side)` its symmetry `(B,)`, int64 in 0 to 7; returns a new tensor."""
    if pixel_values.ndim < 3 or pixel_values.shape[-1] != pixel_values.shape[-2]:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, ..., side, side)."
        )
    if views.dtype != torch.int64 or views.shape != pixel_values.shape[:1]:
        raise ValueError(
            f"views has shape {tuple(views.shape)} and type {views.dtype}, expected ({len(pixel_values)},) and int64."
        )
    present = views.unique().tolist()
    if any(view not in range(NUM_VIEWS) for view in present):
        raise ValueError(f"views holds {present}, expected values from 0 to {NUM_VIEWS - 1}.")
    result = torch.empty_like(pixel_values, memory_format=torch.contiguous_format)
    for view in present:
        chosen = views == view
        images = pixel_values[chosen]
        result[chosen] = torch.rot90(images.flip(-1) if view >= 4 else images, view % 4, (-2, -1))
    return result


def view(pixels: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """Apply symmetry `number` to one image (side, side, channels); the result shares its memory."""
    return np.rot90(pixels[:, ::-1] if number >= 4 else pixels, number % 4)


def random_views(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """Draw a view, int64 in 0 to 7, for each image of an epoch; the same after any resume, and in any process."""
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.randint(NUM_VIEWS, (num_images,), generator=generator)
