"""Codes as a prior draws them, imitated: some replaced by others that are near in the codebook.

Source: Qiu et al., "Image Tokenizer Needs Post-Training", arXiv 2509.12474, which disturbs latents so in training and measures
tokenizers by the Frechet distance of what comes back.
"""

import torch
from torch import Tensor


def disturb_codes(
    codes: Tensor,
    codebook: Tensor,
    image_share: float,
    code_share: float,
    num_nearest: int,
    generator: torch.Generator,
) -> Tensor:
    """Replace some codes of some images by a random one of the nearest codes.

    Args:
        codes: `(B, ...)` int64 in [0, K).
        codebook: `(K, D)`.
        image_share: probability in [0, 1] that an image is disturbed.
        code_share: of a disturbed image, the probability that a code is replaced is drawn evenly from [0, code_share].
        num_nearest: codes to draw from, the code itself not among them, 1 to K - 1.
        generator: on the CPU; every draw comes from it.

    Returns:
        Codes of the same shape; images that are not disturbed keep theirs.

    Raises:
        ValueError: a share or a number outside its range.
    """
    if not (0 <= image_share <= 1 and 0 <= code_share <= 1):
        raise ValueError(f"image_share is {image_share} and code_share {code_share}: expected both in [0, 1]")
    if not 1 <= num_nearest < len(codebook):
        raise ValueError(
            f"num_nearest is {num_nearest}: expected 1 to {len(codebook) - 1}, the other codes of the codebook"
        )
    distances = torch.cdist(codebook, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.fill_diagonal_(torch.inf).topk(num_nearest, largest=False).indices
    disturbed = torch.rand(len(codes), generator=generator) < image_share
    share = disturbed * code_share * torch.rand(len(codes), generator=generator)
    replaced = torch.rand(codes.shape, generator=generator) < share.view(-1, *[1] * (codes.ndim - 1))
    choice = torch.randint(num_nearest, codes.shape, generator=generator)
    return torch.where(replaced.to(codes.device), nearest[codes, choice.to(codes.device)], codes)
