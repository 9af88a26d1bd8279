"""Search for the training images whose codes are nearest to an image's.

The distance of two images is the root of the mean, over the positions of the grid, of the squared Euclidean distance
between their quantized latents; of a training image in several dihedral views, the nearest counts. Only codes are needed:
a training image is shown decoded from its codes, not as its pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isic_vq.data.code_cache import CodeCache, check_tokenizer, read_code_cache
from isic_vq.hub.card import as_text
from isic_vq.models.modeling_vqvae import VQVAEModel

CHUNK = 2048  # grids compared at once


@dataclass(frozen=True)
class Neighbour:
    """A training image near another image.

    Attributes:
        distance: at least 0; see the module.
        num_equal: number of positions with the same code.
        codes: `(h, w)` int64 in [0, K), in its nearest view.
    """

    isic_id: str
    diagnosis: str
    distance: float
    num_equal: int
    codes: Tensor


def grid_distances(codes: Tensor, grids: Tensor, codebook: Tensor) -> Tensor:
    """Distances of one grid of codes to others.

    Args:
        codes (`torch.LongTensor` of shape `(h, w)`): in [0, K).
        grids (`torch.Tensor` of shape `(N, h, w)`): integers in [0, K), of any integer type.
        codebook (`torch.Tensor` of shape `(K, D)`): on the same device.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: the root of the mean over positions of ||e_a - e_b||^2.
    """
    codebook = codebook.double()
    # Without matrix products, whose rounding would give equal codes a distance above 0.
    exact = "donot_use_mm_for_euclid_dist"
    squared = torch.cdist(codebook[codes.flatten()], codebook, compute_mode=exact).square()
    positions = torch.arange(codes.numel(), device=codebook.device)
    parts = [
        squared[positions, part.flatten(1).to(codebook.device, torch.long)].mean(1)
        for part in grids.split(CHUNK)
    ]
    return torch.cat(parts).sqrt()


class TrainingIndex:
    """Codes of training images for nearest-neighbour search; DataError if another tokenizer encoded them."""

    def __init__(self, cache: CodeCache, tokenizer: VQVAEModel, name: str = "the code cache"):
        check_tokenizer(cache, tokenizer, name)
        self.cache = cache
        self.grids = torch.tensor(cache.codes)  # a copy: arrays read from parquet are read-only
        self.codebook = tokenizer.quantizer.codebook.detach()

    @classmethod
    def open(cls, path: Path, tokenizer: VQVAEModel) -> "TrainingIndex":
        """Read a code cache; DataError if it is missing, damaged or another tokenizer's."""
        return cls(read_code_cache(path), tokenizer, path.name)

    def nearest(self, codes: Tensor, count: int) -> list[Neighbour]:
        """Find the `count` images nearest to a grid of codes `(h, w)`, nearest first; ValueError for another shape."""
        num_images, num_views, *shape = self.grids.shape
        if list(codes.shape) != shape:
            raise ValueError(
                f"codes are of shape {tuple(codes.shape)}: expected {tuple(shape)}, as in the index"
            )
        distances = grid_distances(codes.to(self.codebook.device), self.grids.flatten(0, 1), self.codebook)
        nearest = distances.view(num_images, num_views).min(dim=1)
        neighbours = []
        for row in nearest.values.argsort(stable=True)[:count].tolist():
            grid = self.grids[row, int(nearest.indices[row])].long()
            num_equal = int((grid == codes.cpu()).sum())
            isic_id, diagnosis = self.cache.isic_ids[row], self.cache.diagnoses[row]
            neighbours.append(Neighbour(isic_id, diagnosis, nearest.values[row].item(), num_equal, grid))
        return neighbours

    def attribution(self) -> str:
        """Licences and attributions of the images, as Markdown."""
        source = self.cache.source
        licenses = ", ".join(f"{name} ({count:,} images)" for name, count in source.licenses.items())
        lines = [f"{len(self.cache.isic_ids):,} training images. Licence: {licenses}."]
        return "\n\n".join([*lines, *(f"Attribution: {as_text(line)}" for line in source.attributions)])
