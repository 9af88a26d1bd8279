"""A global condition beside the class: the cluster that an image's codes fall into as a whole.

The prior is told of an image's light and tint before its first code. A cluster is a k-means cluster of mean code vectors;
the mean is linear in how often each code occurs, and so is the distance to a centre, but for a term that all centres share:
a table with a score per code and cluster finds the nearest centre from codes alone. For several grids it is the mean of
their means. The idea is that of Li et al., "Return of Unconditional Generation", arXiv 2312.03701, who draw a
representation first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_prior import PriorConfig


class ConditionEmbedding(nn.Embedding):
    """A vector of `size` channels for each class, plus that of the cluster where the prior has clusters."""

    def __init__(self, config: PriorConfig, size: int):
        super().__init__(config.unconditional_id + 1, size)
        self.num_clusters = config.num_clusters
        if config.num_clusters:
            self.clusters = nn.Embedding(config.num_clusters, size)

    def forward(self, conditions: Tensor) -> Tensor:
        """Vectors `(B, size)` of conditions `(B,)`, see `PriorModel.conditions`."""
        if not self.num_clusters:
            return super().forward(conditions)
        classes, clusters = conditions // self.num_clusters, conditions % self.num_clusters
        return super().forward(classes) + self.clusters(clusters)


def code_frequencies(codes: Tensor, sizes: Sequence[int], num_codes: int) -> Tensor:
    """Each code's share of images `(B, ...)` of codes in [0, K): `(B, K)` float64, the mean over grids of `sizes` codes."""
    flat = codes.flatten(1)
    where: Any = {"dtype": torch.float64, "device": codes.device}
    shares = torch.tensor([1 / (len(sizes) * size) for size in sizes for _ in range(size)], **where)
    frequencies = torch.zeros(len(codes), num_codes, **where)
    return frequencies.scatter_add_(1, flat, shares.expand(flat.shape))


def cluster_scores(codebook: Tensor, centres: Tensor) -> Tensor:
    """Scores `(K, C)` of codes: the centre nearest to an image's mean code vector has the highest mean score.

    |m - c|^2 = |m|^2 - 2 m c + |c|^2, m the mean of its codes' vectors. `codebook` is `(K, D)`, `centres` `(C, D)`.
    """
    return codebook @ centres.T - centres.square().sum(1) / 2
