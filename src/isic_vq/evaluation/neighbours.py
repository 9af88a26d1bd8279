"""The training image nearest to each image, by codes and by features, in whichever of the eight dihedral views.

Both searches are exact. Codes are compared by Hamming distance, the share of the grid's positions that differ, through
an inverted index: for every position and code the training grids that have that code there. A grid's equal positions
are then counted over its own lists alone, a few hundredths of all comparisons. Features are compared by cosine distance,
1 - cos, in [0, 2].

A copy may be flipped or turned. Codes of training images are indexed in all views of their cache; features of training
images are of their first view, and compared with those of all eight views of the other image.
"""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# What undoes each view: a turn is undone by the opposite turn, a mirrored view by itself.
INVERSE_VIEWS = (0, 3, 2, 1, 4, 5, 6, 7)


@dataclass(frozen=True)
class Nearest:
    """The nearest of N training images to each of S images."""

    distances: NDArray[np.float64]  # `(S,)`; see the module
    rows: NDArray[np.int64]  # `(S,)` training images; of several equally near ones the first
    views: NDArray[np.int64]  # `(S,)` dihedral views of the training images that are nearest


class CodeIndex:
    """An inverted index of codes `(N, views, h, w)` in [0, num_codes), for exact nearest neighbours in Hamming distance."""

    def __init__(self, codes: NDArray[np.uint16], num_codes: int):
        num_images, self.num_views, *self.shape = codes.shape
        columns = codes.reshape(num_images * self.num_views, -1).T
        self.num_grids = num_images * self.num_views
        self.members = np.stack([column.argsort(kind="stable").astype(np.int32) for column in columns])
        counts = np.stack([np.bincount(column, minlength=num_codes) for column in columns])
        self.starts = np.pad(counts.cumsum(axis=1), ((0, 0), (1, 0)))

    def nearest(self, codes: NDArray[np.integer]) -> Nearest:
        """The nearest image to each grid of codes `(S, h, w)` in [0, num_codes).

        Raises:
            ValueError: the grids have another shape than those of the index, or hold other codes.
        """
        if list(codes.shape[1:]) != self.shape:
            raise ValueError(
                f"codes have grids of {tuple(codes.shape[1:])}: expected {tuple(self.shape)}, as in the index"
            )
        num_codes = self.starts.shape[1] - 1
        if codes.size and not 0 <= codes.min() <= codes.max() < num_codes:
            raise ValueError(f"codes run from {codes.min()} to {codes.max()}: expected 0 to {num_codes - 1}")
        flat = codes.reshape(len(codes), -1).astype(np.int64)
        equal, grids = np.empty(len(flat), np.int64), np.empty(len(flat), np.int64)
        for index, grid in enumerate(flat):
            lists = [
                self.members[position, self.starts[position, code] : self.starts[position, code + 1]]
                for position, code in enumerate(grid)
            ]
            counts = np.bincount(np.concatenate(lists), minlength=self.num_grids)
            grids[index] = counts.argmax()
            equal[index] = counts[grids[index]]
        return Nearest(1 - equal / flat.shape[1], grids // self.num_views, grids % self.num_views)


def nearest_by_features(features: Tensor, others: Tensor) -> Nearest:
    """The training image, of features `others` `(N, D)`, nearest to any view of each image, of features `(S, views, D)`."""
    directions = F.normalize(others.double(), dim=1)
    distances, rows, views = [], [], []
    for image in F.normalize(features.double(), dim=2):
        best = (image @ directions.T).max(dim=1)
        view = int(best.values.argmax())
        row = int(best.indices[view])
        # Half the squared difference is 1 - cos, without its loss of digits where features nearly agree.
        distances.append((image[view] - directions[row]).square().sum().item() / 2)
        rows.append(row)
        views.append(INVERSE_VIEWS[view])
    return Nearest(np.array(distances), np.array(rows, np.int64), np.array(views, np.int64))
