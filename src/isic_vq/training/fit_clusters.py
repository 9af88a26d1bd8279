"""The clusters that a prior is conditioned on beside the class: k-means of the training images' mean code vectors.

The vectors are the tokenizer's own, never features that samples are judged by. All views of an image count.
"""

import torch
from torch import Tensor

from isic_vq.models.clusters import cluster_scores, code_frequencies
from isic_vq.models.modeling_prior import PriorModel
from isic_vq.models.vector_quantizer import kmeans

ITERATIONS = 50
PSEUDO_IMAGES = 8  # of all classes' frequencies, so that a class of few images draws others' clusters, too


@torch.no_grad()
def fit_clusters(prior: PriorModel, codebook: Tensor, codes: Tensor, labels: Tensor, seed: int) -> None:
    """Fit a prior's cluster scores, and the clusters' frequencies given each class and without one, if it has clusters.

    The codebook is `(K, D)`, the training images' codes `(N, views, ...)` and labels `(N,)` are int64, N is at least C.
    """
    config = prior.config
    if not config.num_clusters:
        return
    views = codes.shape[1]
    frequencies = code_frequencies(codes.flatten(0, 1), config.sizes, config.num_codes)
    means = frequencies @ codebook.double()
    generator = torch.Generator().manual_seed(seed)
    centres = kmeans(means, config.num_clusters, generator, ITERATIONS)
    prior.cluster_scores.copy_(cluster_scores(codebook.double(), centres))
    clusters = prior.clusters_of(codes.flatten(0, 1))
    labels, num_classes = labels.repeat_interleave(views), config.unconditional_id
    weights = cluster_frequencies(clusters, labels, num_classes, config.num_clusters, views)
    prior.cluster_weights.copy_(weights)


def cluster_frequencies(
    clusters: Tensor, labels: Tensor, num_classes: int, num_clusters: int, views: int
) -> Tensor:
    """Frequencies of clusters given each class, and last without one, `(num_classes + 1, C)` int64 of at least 1.

    In proportion to n(y, c) + PSEUDO_IMAGES n(c) / N within a row, in whole numbers, which a codec needs. Clusters and labels
    are `(N * views,)` int64; the label `num_classes` is unconditional.
    """
    pairs = labels * num_clusters + clusters
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_clusters).view(-1, num_clusters)
    total = counts.sum(0)
    counts[-1] = total
    return counts * len(clusters) + PSEUDO_IMAGES * views * total + 1
