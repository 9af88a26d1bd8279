"""Input codes of a prior, disturbed in training as its own mistakes disturb them in sampling; targets stay what they are.

Source: reAR, arXiv 2510.04450: of each image's input codes a share U(0, 1) r is replaced by uniform ones, and r falls to 0
before the end of training.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def annealed_share(start: float, until: float, progress: float) -> float:
    """The largest share r: `start` at progress 0, falling linearly to 0 at progress `until`, and 0 from there on."""
    return start * (1 - progress / until) if progress < until else 0.0


def disturb_context(
    codes: Tensor, num_codes: int, share: float, seed: int, step: int, indices: Sequence[int]
) -> Tensor:
    """Replace a random share of each image's codes by uniform ones.

    What happens to an image depends on (seed, step, its index) alone, not on the batch, the process or a resume.

    Args:
        codes: `(B, ...)` int64 in [0, K).
        num_codes: K.
        share: r in [0, 1]; each image draws its own probability of replacement from U(0, r).
        seed: of the run.
        step: of the training.
        indices: of the B images in the training set.

    Returns:
        Codes of the same shape.
    """
    replaced, uniform = torch.empty(codes.shape, dtype=torch.bool), torch.empty_like(codes, device="cpu")
    for row, index in enumerate(indices):
        state = np.random.SeedSequence(seed, spawn_key=(step, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        probability = share * torch.rand((), generator=generator)
        replaced[row] = torch.rand(codes.shape[1:], generator=generator) < probability
        uniform[row] = torch.randint(num_codes, codes.shape[1:], generator=generator)
    return torch.where(replaced.to(codes.device), uniform.to(codes.device), codes)
