"""Codes disturbed as a prior disturbs them: replaced by near ones for a decoder, by any for the prior's own context.

Sources: near codes, Qiu et al., "Image Tokenizer Needs Post-Training", arXiv 2509.12474, which disturbs latents in training and
measures tokenizers by the Frechet distance of their reconstructions; context, reAR, arXiv 2510.04450: of each image's input
codes a share U(0, 1) r is replaced by uniform ones, targets stay, and r falls to 0 before the end of training.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isic_vq.models.checks import expect


def disturb_codes(
    codes: Tensor,
    codebook: Tensor,
    image_share: float,
    code_share: float,
    num_nearest: int,
    generator: torch.Generator,
) -> Tensor:
    """Replace some codes `(B, ...)` by a random one of the `num_nearest` (1 to K - 1) nearest codes of a codebook `(K, D)`.

    Each image is disturbed with probability `image_share`; the share of its codes that is replaced is drawn evenly from
    [0, code_share]. All draws come from a generator on the CPU.

    Raises:
        ValueError: a share or a number outside its range.
    """
    if not (0 <= image_share <= 1 and 0 <= code_share <= 1):
        raise ValueError(f"image_share is {image_share} and code_share {code_share}: expected both in [0, 1]")
    others = len(codebook) - 1
    expected = f"1 to {others}, the other codes of the codebook"
    expect(1 <= num_nearest <= others, "num_nearest", num_nearest, expected)
    distances = torch.cdist(codebook, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.fill_diagonal_(torch.inf).topk(num_nearest, largest=False).indices
    disturbed = torch.rand(len(codes), generator=generator) < image_share
    share = disturbed * code_share * torch.rand(len(codes), generator=generator)
    replaced = torch.rand(codes.shape, generator=generator) < share.view(-1, *[1] * (codes.ndim - 1))
    choice = torch.randint(num_nearest, codes.shape, generator=generator)
    return torch.where(replaced.to(codes.device), nearest[codes, choice.to(codes.device)], codes)


def annealed_share(start: float, until: float, progress: float) -> float:
    """The largest share r: `start` at progress 0, falling linearly to 0 at progress `until`, and 0 from there on."""
    return start * (1 - progress / until) if progress < until else 0.0


def disturb_context(
    codes: Tensor, num_codes: int, share: float, seed: int, step: int, indices: Sequence[int]
) -> Tensor:
    """Replace codes `(B, ...)` by uniform ones in [0, num_codes), in each image a share drawn from U(0, `share`).

    An image's result depends on (seed, step, its index in the training set) alone, not on the batch, the process or a resume.
    """
    replaced, uniform = torch.empty(codes.shape, dtype=torch.bool), torch.empty_like(codes, device="cpu")
    for row, index in enumerate(indices):
        state = np.random.SeedSequence(seed, spawn_key=(step, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        probability = share * torch.rand((), generator=generator)
        replaced[row] = torch.rand(codes.shape[1:], generator=generator) < probability
        uniform[row] = torch.randint(num_codes, codes.shape[1:], generator=generator)
    return torch.where(replaced.to(codes.device), uniform.to(codes.device), codes)
