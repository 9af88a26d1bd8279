"""Losses that several stages share."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def ssim_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """1 - SSIM, mean over the batch, of images `(B, 3, H, W)` in [0, 1]; in float32 whatever autocast says.

    Variances are small differences of large means: bfloat16 would leave noise.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    """
    with torch.autocast(images.device.type, enabled=False):
        similarity = structural_similarity_index_measure(
            reconstructions.float(), images.float(), data_range=1.0
        )
    return 1 - torch.as_tensor(similarity)
