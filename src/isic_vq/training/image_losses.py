"""Losses that several stages share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from isic_vq.evaluation.appearance import ROUNDING_POWER, power_spectrum
from isic_vq.evaluation.measures import ssim

TILE = 32  # pixels; smaller images are one tile


def ssim_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """1 - SSIM, mean over the batch, of images `(B, 3, H, W)` in [0, 1]; in float32 even under autocast.

    Variances are small differences of large means: bfloat16 would leave noise.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    """
    with torch.autocast(images.device.type, enabled=False):
        return 1 - ssim(images.float(), reconstructions.float()).mean()


def spectrum_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute difference of local log power, without phase, between square images `(B, 3, H, W)` in [0, 1].

    Power is averaged over rings of the spectrum, periods of 2 to about 10 pixels, each in four directions (or the texture would
    all run in one), in overlapping tiles of 32 pixels. It asks for the same amount of texture, not for the same texture: details
    that the codes do not hold cost nothing, where squared errors would have them left out.
    """
    side = min(TILE, images.shape[-1])
    frequency = torch.fft.fftfreq(side, device=images.device) * side
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round()
    angle = torch.atan2(frequency[:, None].expand(side, side), frequency.expand(side, side))
    direction = (angle / (math.pi / 4)).round() % 4
    parts = [
        (radius == ring) & (direction == number)
        for ring in range(max(1, side // 10), side // 2 + 1)
        for number in range(4)
    ]
    rings = torch.stack(parts).flatten(1).float()
    rings = rings / rings.sum(1, keepdim=True).clamp(min=1)

    def log_power(pixels: Tensor) -> Tensor:
        tiles = pixels.float().unfold(2, side, side // 2).unfold(3, side, side // 2)
        power = power_spectrum(tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return torch.log(power.flatten(1) @ rings.T + ROUNDING_POWER)

    with torch.autocast(images.device.type, enabled=False):
        return (log_power(reconstructions) - log_power(images)).abs().mean()


def grid_loss(images: Tensor, reconstructions: Tensor, period: int) -> Tensor:
    """Excess power of errors at the frequencies of a grid of `period` pixels and their multiples; 0 without such errors.

    The mean of sqrt(1 + r) - 1, r the error's power at such a frequency over the image's power around it, of square images
    `(B, 3, H, W)` in [0, 1] whose side is a multiple of `period`.
    """
    side = images.shape[-1]
    with torch.autocast(images.device.type, enabled=False):
        error = power_spectrum(reconstructions.float() - images.float())
        around = F.pad(power_spectrum(images)[:, None], (3, 3, 3, 3), mode="circular")
        near = F.avg_pool2d(around, 7, stride=1) * 49 - F.avg_pool2d(around[..., 2:-2, 2:-2], 3, stride=1) * 9
        lines = (..., slice(None, None, side // period), slice(None, None, side // period))
        ratio = error[lines] / (near[:, 0][lines] / 40 + ROUNDING_POWER)
        return ((1 + ratio).sqrt() - 1).flatten(1)[:, 1:].mean()  # all but the mean colour
