"""The eight symmetries of the square, applied to batches: a lesion has no upright.

View v rotates by v mod 4 quarter turns counter-clockwise; views 4 to 7 mirror left and right first:

    0 identity       1 quarter turn      2 half turn        3 three quarter turns
    4 mirror         5 mirror, then 1    6 mirror, then 2   7 mirror, then 3

Nothing is interpolated, so pixels and code grids pass through unchanged in value. There is no other
augmentation here.
"""

import numpy as np
import torch
from numpy.typing import NDArray

NUM_VIEWS = 8


def dihedral(pixel_values: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Apply to each image of a batch its own symmetry.

    Args:
        pixel_values (torch.Tensor of shape (batch, ..., side, side)): any dtype and range.
        views (torch.Tensor of shape (batch,), int64, values in 0 to 7): numbered as in the module's
            docstring.

    Returns:
        torch.Tensor of the same shape and dtype; a new tensor.

    Raises:
        ValueError: the images are not square, or the views do not fit.
    """
    if pixel_values.ndim < 3 or pixel_values.shape[-1] != pixel_values.shape[-2]:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, ..., side, side)."
        )
    if views.dtype != torch.int64 or views.shape != pixel_values.shape[:1]:
        raise ValueError(
            f"views has shape {tuple(views.shape)} and type {views.dtype}, "
            f"expected ({pixel_values.shape[0]},) and int64."
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
    """Show one image, of shape (side, side, channels), in the view of that number; a view of the same memory."""
    return np.rot90(pixels[:, ::-1] if number >= 4 else pixels, number % 4)


def random_views(num_images: int, seed: int, epoch: int) -> torch.Tensor:
    """Draw the view in which each image of a data set is shown in an epoch.

    The same arguments give the same views on any machine, after any resume, and however the epoch is cut into
    batches, micro-batches and processes.

    Args:
        num_images: number of images of the data set.
        seed: seed of the run, not negative.
        epoch: number of the epoch, not negative; every epoch draws its own views.

    Returns:
        torch.Tensor of shape (num_images,), int64, uniform in 0 to 7.
    """
    state = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.randint(NUM_VIEWS, (num_images,), generator=generator)
