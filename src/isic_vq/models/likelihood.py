"""How likely a prior finds grids of codes: the bits of every position, given a class or over all classes.

The chain rule in the order of the codes, log p(x | y) = sum_t log p(x_t | x_<t, y), shares an image's bits out among its
positions: a map of where the image surprises the prior. It holds for the mixture p(x) = sum_y pi_y p(x | y), too:
log p(x_<=t) is the log-sum-exp over classes of log pi_y + log p(x_<=t | y), and what it falls by from one position
to the next is -log p(x_t | x_<t). Within a scale, whose codes are independent of each other given the coarser ones and
the class, any order will do. Either way the bits of an image's positions sum to -log2 p(x).

Of a prior with clusters p(x | y) = sum_c p(c | y) p(x | c, y); what is measured is the term of the image's own cluster, an
upper bound on its bits. -log2 p(c | y) is shared out evenly among the positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from .checks import check_finite, damaged_or_overflow
from .modes import evaluating

if TYPE_CHECKING:
    from .modeling_isic_vq import IsicVQModel

BATCH_SIZE = 32


@dataclass
class IsicVQScoreOutput(ModelOutput):
    """Output of `IsicVQModel.score`.

    Args:
        bits_per_code: `(B,)` float64, mean over an image's codes.
        bits: float64 of the shape of `codes`, the bits of every one; under a prior with clusters an upper bound, with
            those of the image's cluster.
        bits_map: `(B, h, w)` float64, where they lie: those of coarser scales are shared out over their area.
        codes: int64 in [0, K), `(B, h, w)` or, of several scales, `(B, L)`.
    """

    bits_per_code: Tensor | None = None
    bits: Tensor | None = None
    bits_map: Tensor | None = None
    codes: Tensor | None = None


@torch.no_grad()
def score_codes(
    model: "IsicVQModel",
    codes: Tensor,
    labels: Tensor | None = None,
    marginalize: bool = False,
    class_weights: Tensor | None = None,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Bits of every position under a model's prior, in either mode: float64 of the shape of `codes`, on the CPU.

    Args:
        model: the whole model.
        codes (`torch.LongTensor` of shape `(N, h, w)` or `(N, L)`): in [0, K).
        labels (`torch.LongTensor` of shape `(N,)`): class ids, or None for unconditional.
        marginalize: the bits of the mixture over classes instead; the positions of an image still sum to its
            -log2 p(x), and each is -log2 p(code | earlier codes).
        class_weights (`torch.Tensor` of shape `(num_classes,)`): of the mixture, in proportion: at least 0, such
            as counts of training images; None weighs all classes alike.
        batch_size: grids per forward pass; of a mixture, pairs of a grid and a class.

    Raises:
        ValueError: arguments that exclude each other, a mixture of no classes, wrong weights, or logits that are not finite.
    """
    if class_weights is not None and not marginalize:
        raise ValueError("class_weights are given without marginalize: they weigh the classes of a mixture")
    if labels is not None and marginalize:
        raise ValueError("labels and marginalize are both given: a mixture is over all classes, give one")
    if not len(codes):
        return torch.zeros(codes.shape, dtype=torch.float64)
    with evaluating(model):
        if not marginalize:
            return _nats(model, codes, labels, batch_size) / math.log(2)
        log_weights = mixture_log_weights(class_weights, len(model.config.class_names))
        parts = [_mixture_nats(model, part, log_weights, batch_size) for part in codes.split(batch_size)]
    return torch.cat(parts) / math.log(2)


def mixture_log_weights(class_weights: Tensor | None, num_classes: int) -> Tensor:
    """Log of the weights over their sum, `(num_classes,)` float64 on the CPU; None weighs all classes alike.

    Raises:
        ValueError: there are no classes, or the weights are not one per class, finite, at least 0 and some above 0.
    """
    if num_classes == 0:
        raise ValueError("the prior has no classes to marginalize over: score it unconditionally")
    weights = torch.ones(num_classes) if class_weights is None else class_weights.cpu()
    total = weights.double().sum()
    if weights.shape != (num_classes,) or weights.min() < 0 or not 0 < total < math.inf:
        raise ValueError(
            f"class_weights are {weights.tolist()}: expected {num_classes} finite numbers of at least 0, one per "
            "class, not all 0"
        )
    return (weights.double() / total).log()


def _nats(model: "IsicVQModel", codes: Tensor, labels: Tensor | None, batch_size: int) -> Tensor:
    """-log p(code | earlier codes, label) of every position, and its share of -log p(cluster | label), if any."""
    nats = []
    for first in range(0, len(codes), batch_size):
        part = codes[first : first + batch_size].to(model.device)
        part_labels = None if labels is None else labels[first : first + batch_size]
        logits = model.predict(part, part_labels)
        check_finite(logits, "logits", damaged_or_overflow(logits.dtype))
        nats.append(F.cross_entropy(logits.float(), part, reduction="none").cpu().double())
        clusters = model.prior.clusters_of(part)
        if clusters is not None:
            log_probabilities = model.prior.cluster_log_probabilities(part_labels, len(part))
            cluster_nats = -log_probabilities.gather(1, clusters[:, None]).cpu() / part[0].numel()
            nats[-1] += cluster_nats.view(-1, *[1] * (part.ndim - 1))
    return torch.cat(nats)


def _mixture_nats(model: "IsicVQModel", codes: Tensor, log_weights: Tensor, batch_size: int) -> Tensor:
    num_classes, num_images = len(log_weights), len(codes)
    labels = torch.arange(num_classes).repeat_interleave(num_images)
    nats = _nats(model, torch.cat([codes] * num_classes), labels, batch_size)
    running = nats.view(num_classes, num_images, -1).cumsum(-1)  # -log p(x_<=t | y)
    joint = -torch.logsumexp(log_weights[:, None, None] - running, dim=0)  # -log p(x_<=t)
    return joint.diff(dim=-1, prepend=joint.new_zeros(num_images, 1)).view_as(codes)


def spread_over_grid(values: Tensor, sides: Sequence[int]) -> Tensor:
    """Spread a number per code, `(B, h, w)` or `(B, L)`, evenly over the code's area: `(B, h, w)` of the same sum per image.

    `sides` are those of the grids, coarse to fine; h = w is the last.
    """
    places = torch.arange(sides[-1], dtype=values.dtype, device=values.device)
    total = values.new_zeros(len(values), sides[-1], sides[-1])
    for grid, side in zip(values.flatten(1).split([side**2 for side in sides], dim=1), sides, strict=True):
        width = sides[-1] / side  # of a code, in places
        starts = torch.arange(side, dtype=values.dtype, device=values.device)[:, None] * width
        overlap = torch.minimum(starts + width, places + 1) - torch.maximum(starts, places)
        shares = overlap.clamp(min=0) / width  # of each code that falls on each place, (side, h)
        total += shares.T @ grid.unflatten(1, (side, side)) @ shares
    return total
