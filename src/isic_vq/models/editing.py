"""Editing on the code grid: draw some codes of an image anew, given all the others.

The target is the prior's own posterior, p(masked codes | kept codes, label). Codes are drawn in raster order, so
a draw cannot see the kept codes that come after it. A particle filter makes up for that: it carries many
candidates (particles), weighs each by the likelihood of the kept codes given what precedes them in it (never by that
of its own draws), and lets the fit ones multiply. It is exact as the number of particles grows; where no kept code
follows a masked one, a single particle is exact.

Source: the bootstrap filter of Gordon, Salmond and Smith, "Novel approach to nonlinear/non-Gaussian Bayesian
state estimation", 1993, in the notation of Naesseth, Lindsten and Schon, "Elements of Sequential Monte Carlo",
arXiv 1903.04797; systematic resampling after Kitagawa, "Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear
State Space Models", 1996.
Differs: particles are resampled between rows, where the sampler's cache can be reordered, and not at every code.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from .modeling_pixelcnn import PixelCNNModel
from .modes import evaluating
from .pixelcnn_cache import open_cache
from .sampling import draw, image_generators, position_uniforms


@dataclass
class EditOutput(ModelOutput):
    """Output of `IsicVQModel.inpaint` and `IsicVQModel.counterfactual`.

    Args:
        pixel_values: `(B, 3, H, W)`, RGB in [0, 1].
        codes: `(B, h, w)` int64 in [0, K); outside the mask as encoded.
        mask: `(B, h, w)` bool, the codes that were drawn anew.
        labels: `(B,)` int64, the class ids; the unconditional id where none was asked for.
        num_particles: `(B,)` int64, how many were used: as many as asked for, or 1 where that is exact.
        ess: `(B, h)` float64 in [1, num_particles], the effective sample size after each row, before
            resampling: how many equally weighted particles would be worth as much. Near 1, the image was
            chosen from a handful of candidates; ask for more particles.
        log_evidence: `(B,)` float64, in nats: the estimate of log p(kept codes after the first masked one |
            kept codes before it, label). Its exponential is unbiased; 0 where nothing is kept after.
    """

    pixel_values: Tensor | None = None
    codes: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    num_particles: Tensor | None = None
    ess: Tensor | None = None
    log_evidence: Tensor | None = None


def central_region(size: int) -> Tensor:
    """Mask `(size, size)` of the middle half in height and width: where dermoscopy frames the lesion."""
    region = torch.zeros(size, size, dtype=torch.bool)
    region[size // 4 : size - size // 4, size // 4 : size - size // 4] = True
    return region


def code_mask(mask: Tensor, num_images: int, size: int, downsampling: int, dilation: int = 0) -> Tensor:
    """The codes whose patch touches a mask of pixels.

    Args:
        mask (`torch.BoolTensor` of shape `(B, 1, H, W)`, `(B, H, W)` or `(H, W)`): True where to redraw.
        num_images: B.
        size: H and W.
        downsampling: side of the patch of pixels that a code stands for.
        dilation: how many codes the mask grows by on all sides, diagonals included.

    Returns:
        `torch.BoolTensor` of shape `(B, h, w)`.

    Raises:
        ValueError: wrong shape or type, a negative dilation, or an image without a masked pixel.
    """
    shapes = [(num_images, 1, size, size), (num_images, size, size), (size, size)]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is of type {getattr(mask, 'dtype', type(mask).__name__)}: expected a torch.bool tensor, True "
            "where to redraw; compare, for example mask > 0.5"
        )
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: expected {', '.join(map(str, shapes[:-1]))} or {shapes[-1]}, the "
            "height and width of the images"
        )
    if dilation < 0:
        raise ValueError(f"dilation is {dilation}: expected 0 codes or more")
    pixels = mask.reshape(-1, 1, size, size).expand(num_images, 1, size, size).float()
    touched = F.max_pool2d(pixels, downsampling)
    touched = F.max_pool2d(touched, 2 * dilation + 1, stride=1, padding=dilation)[:, 0] > 0
    empty = (~touched.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"mask is empty for image {', '.join(map(str, empty))}: nothing to redraw; mark at least one pixel"
        )
    return touched


def pixel_mask(mask: Tensor, downsampling: int) -> Tensor:
    """The pixels `(B, 1, H, W)` that masked codes `(B, h, w)` stand for."""
    return mask[:, None].repeat_interleave(downsampling, 2).repeat_interleave(downsampling, 3)


def effective_sample_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights given as logarithms `(N,)`: N where all are equal, 1 where one has it all."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item()


def systematic_resampling(log_weights: Tensor, uniform: float) -> Tensor:
    """Ancestors `(N,)` int64 of equally weighted particles: a comb of N teeth, 1 / N apart, through the CDF.

    Particle i gets floor(N w_i) or ceil(N w_i) children, N w_i in the mean.

    Args:
        log_weights (`torch.Tensor` of shape `(N,)`): up to a constant.
        uniform: in [0, 1), where the comb starts, in units of 1 / N.
    """
    cumulative = log_weights.softmax(0).cumsum(0)
    teeth = torch.arange(len(log_weights), dtype=cumulative.dtype, device=cumulative.device) + uniform
    teeth *= cumulative[-1] / len(log_weights)  # rounding can leave the total a little off 1
    return torch.searchsorted(cumulative, teeth, right=True).clamp(max=len(log_weights) - 1)


class Particles(NamedTuple):
    """What `filter_particles` ends with.

    Args:
        codes: `(N, h, w)` int64, the candidates.
        log_weights: `(N,)` float64, up to a constant: what each is worth.
        ess: the effective sample size after each of the h rows, before resampling.
        log_evidence: as in `EditOutput`.
    """

    codes: Tensor
    log_weights: Tensor
    ess: list[float]
    log_evidence: float


def redraw_codes(
    prior: PixelCNNModel,
    codes: Tensor,
    mask: Tensor,
    labels: Tensor,
    num_particles: int,
    generators: Sequence[torch.Generator],
    on_row: Callable[[], Any] | None = None,
) -> EditOutput:
    """Draw the masked codes from p(masked codes | kept codes, label); `pixel_values` is left to the caller.

    Images are taken one by one, with the particles as the batch, so that none depends on its company.

    Args:
        prior: in either mode.
        codes (`torch.LongTensor` of shape `(B, h, w)`): in [0, K).
        mask (`torch.BoolTensor` of shape `(B, h, w)`): True where to redraw, somewhere in every image.
        labels (`torch.LongTensor` of shape `(B,)`): class ids.
        num_particles: N, candidates per image.
        generators: one per image; its seed determines the image's noise.
        on_row: called after each finished row of each image.

    Raises:
        ValueError: `num_particles` below 1, or labels that are not the prior's.
    """
    if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles is {num_particles!r}: expected a whole number of at least 1")
    labels = prior.checked_labels(labels, len(codes))
    chosen, sets = [], []
    with evaluating(prior), torch.inference_mode():
        for image, masked, label, generator in zip(codes, mask, labels, generators, strict=True):
            flat = masked.flatten()
            is_exact = flat[flat.int().argmax() :].all()  # no kept code has anything to say about a draw
            # Streams that no call of `generate` with the same seed uses. One of them resamples.
            seed, count = generator.initial_seed(), 1 if is_exact else num_particles
            comb, *noise = position_uniforms(image_generators(seed, 1 + count), image.numel())
            particles = filter_particles(prior, image, masked, label, torch.stack(noise), comb, on_row)
            chosen.append(particles.codes[draw(particles.log_weights[None], comb[-1:])])
            sets.append(particles)
    return EditOutput(
        codes=torch.cat(chosen),  # a normal tensor: autograd refuses those of inference mode
        mask=mask,
        labels=labels,
        num_particles=torch.tensor([len(particles.codes) for particles in sets]),
        ess=torch.tensor([particles.ess for particles in sets], dtype=torch.float64),
        log_evidence=torch.tensor([particles.log_evidence for particles in sets], dtype=torch.float64),
    )


def filter_particles(
    prior: PixelCNNModel,
    codes: Tensor,
    mask: Tensor,
    label: Tensor,
    uniforms: Tensor,
    comb: Tensor,
    on_row: Callable[[], Any] | None = None,
) -> Particles:
    """Weighted candidates for one image's masked codes; call it in inference mode, with the prior in eval mode.

    Args:
        prior: in eval mode.
        codes (`torch.LongTensor` of shape `(h, w)`): in [0, K).
        mask (`torch.BoolTensor` of shape `(h, w)`): True where to redraw, somewhere.
        label (`torch.LongTensor` without axes): class id.
        uniforms (`torch.Tensor` of shape `(N, h * w)`): noise of each particle and position, in [0, 1).
        comb (`torch.Tensor` of shape `(h * w,)`): noise of resampling after each position, in [0, 1).
        on_row: called after each finished row.
    """
    count, (height, width) = len(uniforms), codes.shape
    masked = mask.flatten().tolist()
    first = masked.index(True)
    particles = codes.repeat(count, 1, 1)
    log_weights = torch.zeros(count, dtype=torch.float64, device=codes.device)
    log_evidence, ess = 0.0, []
    cache = open_cache(prior, label.repeat(count))
    for row in range(height):
        cache.start_row(row)
        for column in range(width):
            position = row * width + column
            logits = cache.logits(column)
            if masked[position]:
                particles[:, row, column] = draw(logits, uniforms[:, position])
            elif position > first:
                log_weights += logits.double().log_softmax(-1)[:, codes[row, column]]
            cache.put(column, particles[:, row, column])
        ess.append(effective_sample_size(log_weights))
        if ess[-1] < count / 2 and row + 1 < height:
            ancestors = systematic_resampling(log_weights, comb[position].item())
            log_evidence += log_weights.logsumexp(0).item() - math.log(count)
            particles, log_weights = particles[ancestors], torch.zeros_like(log_weights)
            cache.reorder(ancestors)
        if on_row is not None:
            on_row()
    log_evidence += log_weights.logsumexp(0).item() - math.log(count)
    return Particles(particles, log_weights, ess, log_evidence)
