"""Pictures of the closest pairs of an audit: a sample, and beside it the training image it is nearest to.

They may show patients' images. Write them where nothing is published from.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isic_vq.figures.grid import enlarge, image_grid
from isic_vq.figures.png import write_png

PAIRS_PER_ROW = 4


def write_pairs(
    samples: np.ndarray, training: np.ndarray, captions: Sequence[tuple[str, str]], path: Path, about: str
) -> None:
    """Write pairs side by side as one PNG.

    Args:
        samples: RGB of shape (pairs, height, width, 3), uint8.
        training: the same shape, uint8.
        captions: what stands under each sample and under its training image.
        path: the file.
        about: its `Comment`.

    Raises:
        ValueError: as `image_grid`.
    """
    both = np.stack([samples, training], axis=1).reshape(-1, *samples.shape[1:])
    labels = [caption for pair in captions for caption in pair]
    grid = image_grid(enlarge(both), columns=2 * PAIRS_PER_ROW, labels=labels)
    write_png(grid, path, {"Title": "samples and their nearest training images", "Comment": about})
