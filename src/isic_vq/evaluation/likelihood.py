"""How many bits a prior needs for the codes of images it has not seen.

Bits per code is the base-2 cross-entropy, averaged over the codes of an image and then over images: the
length an ideal entropy coder driven by the prior would reach. Its yardsticks are log2 K (codes stored flat) and
the unigram cross-entropy (an entropy coder that knows how often each code occurs in training, nothing else).
"""

import math

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from isic_vq.evaluation.report import Metric
from isic_vq.models.likelihood import BATCH_SIZE, score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel


def bits_per_code(
    prior: PreTrainedModel, codes: Tensor, labels: Tensor | None, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Mean bits per code of each image under the prior, whatever mode it is in.

    Args:
        prior: a prior.
        codes (`torch.LongTensor` of shape `(N, h, w)`): in [0, K).
        labels (`torch.LongTensor` of shape `(N,)`): class ids, or None for unconditional.
        batch_size: images per forward pass.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64.
    """
    return score_codes(prior, codes, labels, batch_size=batch_size).flatten(1).mean(1)


def unigram_bits(train_counts: Tensor, codes: Tensor) -> Tensor:
    """Bits of every code under the code frequencies of the training set, float64 of the shape of `codes`.

    Each code counts once more than it occurs, so that one never seen in training costs finitely many bits.

    Args:
        train_counts (`torch.Tensor` of shape `(K,)`): occurrences in the training set.
        codes (`torch.LongTensor` of any shape): in [0, K).
    """
    smoothed = train_counts.double() + 1
    return -(smoothed / smoothed.sum()).log2()[codes]


def unigram_bits_per_code(train_counts: Tensor, codes: Tensor) -> float:
    """Cross-entropy in bits per code of `codes` under the code frequencies of the training set."""
    return unigram_bits(train_counts, codes).mean().item()


def own_entropy(codes: Tensor) -> Tensor:
    """Entropy in bits per code of each image's own code frequencies: what its codes cost without their order.

    Args:
        codes (`torch.LongTensor` of shape `(N, h, w)`): in [0, K).

    Returns:
        `torch.Tensor` of shape `(N,)`, float64, in [0, log2 min(K, h w)].
    """
    flat = codes.flatten(1)
    counts = flat.new_zeros(len(flat), int(codes.max()) + 1).scatter_add(1, flat, torch.ones_like(flat))
    return torch.special.entr(counts.double() / flat.shape[1]).sum(1) / math.log(2)


def likelihood_metrics(
    model: IsicVQModel, train_counts: Tensor | None, codes: Tensor, labels: Tensor, split: str, dataset: str
) -> list[Metric]:
    """The report's lines for what the prior makes of unseen codes `(N, h, w)` with class ids `(N,)`."""
    config = model.config.vqvae_config
    conditional = bits_per_code(model.prior, codes, labels)
    unconditional = bits_per_code(model.prior, codes, None)
    pixels_per_code = config.downsampling**2
    values = {
        "bits_per_code": (conditional.mean().item(), "bits per code"),
        "bits_per_code_unconditional": (unconditional.mean().item(), "bits per code"),
        "bits_per_pixel": (conditional.mean().item() / pixels_per_code, "bits per pixel"),
        "bits_per_code_flat": (math.log2(config.num_codes), "bits per code"),
    }
    if train_counts is not None:
        values["bits_per_code_unigram"] = (unigram_bits_per_code(train_counts, codes), "bits per code")
    return [Metric(name, value, unit, len(codes), split, dataset) for name, (value, unit) in values.items()]
