"""Editing on the code grid: resample some codes of an image, given all the others.

The target is the prior's own posterior, p(masked codes | kept codes, label). Codes are drawn in the prior's order, so
a draw cannot see the kept codes that come after it. A particle filter makes up for that: it carries many
candidates (particles), weighs each by the likelihood of the kept codes given what precedes them in it (never by that
of its own draws), and lets the fit ones multiply. It is exact as the number of particles grows; where no kept code
follows a masked one, a single particle is exact.

Source: the bootstrap filter of Gordon, Salmond and Smith, "Novel approach to nonlinear/non-Gaussian Bayesian
state estimation", 1993, in the notation of Naesseth, Lindsten and Schon, "Elements of Sequential Monte Carlo",
arXiv 1903.04797; systematic resampling after Kitagawa, "Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear
State Space Models", 1996.
Differs: particles are resampled between steps (rows, or scales), where the prior's cache can be reordered, and not at
every code.

The decoded patches then join the kept pixels without an edge: Perez, Gangnet and Blake, "Poisson Image Editing", 2003,
seamless cloning in its form of a membrane (eq. 4).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from .checks import check_finite, damaged_or_overflow, expect, is_whole
from .modeling_prior import Walk
from .modes import exactly, weights_at_hand
from .sampling import draw, image_generators, position_uniforms

if TYPE_CHECKING:
    from .modeling_isic_vq import IsicVQModel

BLENDS = ("poisson", "paste", "decode")


@dataclass
class IsicVQEditOutput(ModelOutput):
    """Output of `IsicVQModel.inpaint` and `IsicVQModel.counterfactual`.

    Args:
        pixel_values: `(B, 3, H, W)`, RGB in [0, 1].
        codes: int64 in [0, K), `(B, h, w)` or, of several scales, `(B, L)`; outside the mask as encoded.
        mask: bool of the same shape, the resampled codes.
        labels: `(B,)` int64, the class ids; the unconditional id where none was asked for.
        num_particles: `(B,)` int64, how many were used: as many as asked for, or 1 where that is exact.
        ess: `(B, steps)` float64 in [1, num_particles], the effective sample size after each row or scale, before
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


def code_masks(
    mask: Tensor, num_images: int, size: int, sides: Sequence[int], dilation: int = 0
) -> list[Tensor]:
    """The codes to resample for a mask of pixels: those whose patch touches it.

    A code of a coarser scale stands for a larger patch, and is resampled if resampled codes of the finest scale cover more
    than half of it. If a touch were enough, every image's coarsest code would be resampled, which the kept codes around the
    mask were chosen to complete: kept halves of images would change their colour.

    Args:
        mask (`torch.BoolTensor` of shape `(B, 1, H, W)`, `(B, H, W)` or `(H, W)`): True where to resample.
        num_images: B.
        size: H and W.
        sides: of the code grids, coarse to fine; the result has a `torch.BoolTensor` `(B, side, side)` for each.
        dilation: how many codes of the finest grid the mask grows by on all sides, diagonals included.

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
    expect(dilation >= 0, "dilation", dilation, "0 codes or more")
    pixels = mask.reshape(-1, 1, size, size).expand(num_images, 1, size, size).float()
    touched = F.max_pool2d(pixels, size // sides[-1])
    touched = F.max_pool2d(touched, 2 * dilation + 1, stride=1, padding=dilation)
    empty = (~touched.flatten(1).bool().any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"mask is empty for image {', '.join(map(str, empty))}: nothing to redraw; mark at least one pixel"
        )
    covered = [F.interpolate(touched, size=side, mode="area") for side in sides[:-1]]
    return [*((part > 0.5)[:, 0] for part in covered), touched[:, 0] > 0]


def pixel_mask(mask: Tensor, size: int) -> Tensor:
    """The pixels `(B, 1, size, size)` that masked codes `(B, h, w)` of the finest grid stand for."""
    step = size // mask.shape[-1]
    return mask[:, None].repeat_interleave(step, 2).repeat_interleave(step, 3)


def effective_sample_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights given as logarithms `(N,)`: N where all are equal, 1 where one has it all."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item()


def systematic_resampling(log_weights: Tensor, uniform: float) -> Tensor:
    """Ancestors `(N,)` int64 of equally weighted particles, from log weights `(N,)` up to a constant.

    A comb of N teeth, 1 / N apart, goes through the CDF from `uniform` / N on: particle i gets floor(N w_i) or ceil(N w_i)
    children, N w_i in the mean.
    """
    cumulative = log_weights.softmax(0).cumsum(0)
    teeth = torch.arange(len(log_weights), dtype=cumulative.dtype, device=cumulative.device) + uniform
    teeth *= cumulative[-1] / len(log_weights)  # rounding can leave the total a little off 1
    return torch.searchsorted(cumulative, teeth, right=True).clamp(max=len(log_weights) - 1)


def membrane(values: Tensor, known: Tensor) -> Tensor:
    """Continue values `(1, C, H, W)` from where they are `known` `(1, 1, H, W)`: other pixels become their neighbours' mean.

    This is Laplace's equation, solved by red-black successive over-relaxation from the mean of the known values, with the
    factor that is best for a square of this size (Young, "Iterative Solution of Large Linear Systems", 1971). The error
    falls at least a thousandfold if a border of the image is known. Where nothing is known the result is 0.
    """
    size = max(values.shape[-2:])
    held = torch.where(known, values, 0.0)
    result = torch.where(known, values, held.sum((2, 3), keepdim=True) / known.sum().clamp(min=1))
    rows, columns = (torch.arange(side, device=values.device) for side in values.shape[-2:])
    white = (rows[:, None] + columns) % 2 == 0
    turns = (~known & white, ~known & ~white)
    factor = 2 / (1 + math.sin(math.pi / (2 * size)))
    for _ in range(4 * size):
        for turn in turns:
            around = F.pad(result, (1, 1, 1, 1), mode="replicate")
            beside, across = around[..., 1:-1, :], around[..., 1:-1]
            mean = (beside[..., :-2] + beside[..., 2:] + across[..., :-2, :] + across[..., 2:, :]) / 4
            result = torch.where(turn, torch.lerp(result, mean, factor), result)
    return result


def blended(decoded: Tensor, original: Tensor, mask: Tensor, blend: str) -> Tensor:
    """Join decoded pixels with the kept ones of the original, `(B, 3, H, W)` each, RGB in [0, 1].

    Args:
        decoded: all pixels of the edited codes.
        original: the image before the edit.
        mask (`torch.BoolTensor` of shape `(B, 1, H, W)`): the pixels that were drawn; all others stay as they were, to the
            last bit, unless `blend` is "decode".
        blend: see `IsicVQModel.inpaint`.
    """
    if blend == "decode":
        return decoded
    if blend == "poisson":
        # One by one: the last bits of a sum may depend on the size of the batch.
        errors = zip((original - decoded).split(1), (~mask).split(1), strict=True)
        decoded = (decoded + torch.cat([membrane(*error) for error in errors])).clamp(0, 1)
    return torch.where(mask, decoded, original)


class Particles(NamedTuple):
    """What `filter_particles` ends with."""

    codes: Tensor  # `(N, L)` int64, the candidates, flat
    log_weights: Tensor  # `(N,)` float64, up to a constant
    ess: list[float]  # effective sample size after each step, before resampling
    log_evidence: float  # as in `IsicVQEditOutput`


def redraw_codes(
    model: "IsicVQModel",
    codes: Tensor,
    mask: Tensor,
    labels: Tensor,
    num_particles: int,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], Any] | None = None,
) -> IsicVQEditOutput:
    """Draw the masked codes from p(masked codes | kept codes, label); `pixel_values` is left to the caller.

    Images are taken one by one, with the particles as the batch, so that no image depends on the others. A prior with
    clusters is given that of all the image's codes. `codes` are `(B, h, w)` or `(B, L)`, a `mask` of their shape is True
    somewhere in every image, `labels` are class ids `(B,)`; the seeds of `generators`, one per image, determine the noise.
    """
    expect(is_whole(num_particles, 1), "num_particles", num_particles, "a whole number of at least 1")
    prior = model.prior
    chosen, sets = [], []
    with weights_at_hand(prior), exactly(prior), torch.inference_mode():
        clusters = prior.clusters_of(codes)
        conditions = prior.conditions(prior.checked_labels(labels, len(codes)), clusters)
        for image, masked, condition, generator in zip(
            codes.flatten(1), mask.flatten(1), conditions, generators, strict=True
        ):
            is_exact = masked[masked.int().argmax() :].all()  # no kept code has anything to say about a draw
            # Streams that no call of `generate` with the same seed uses. One of them resamples.
            seed, count = generator.initial_seed(), 1 if is_exact else num_particles
            comb, *noise = position_uniforms(image_generators(seed, 1 + count), image.numel())
            walk = prior.walk(condition.repeat(count), model.vqvae.extend)
            particles = filter_particles(walk, image, masked, torch.stack(noise), comb, on_step)
            chosen.append(particles.codes[draw(particles.log_weights[None], comb[-1:])])
            sets.append(particles)
    return IsicVQEditOutput(
        codes=torch.cat(chosen).view_as(codes),  # a normal tensor: autograd refuses those of inference mode
        mask=mask,
        labels=labels,
        num_particles=torch.tensor([len(particles.codes) for particles in sets]),
        ess=torch.tensor([particles.ess for particles in sets], dtype=torch.float64),
        log_evidence=torch.tensor([particles.log_evidence for particles in sets], dtype=torch.float64),
    )


def filter_particles(
    walk: Walk,
    codes: Tensor,
    mask: Tensor,
    uniforms: Tensor,
    comb: Tensor,
    on_step: Callable[[], Any] | None = None,
) -> Particles:
    """Weighted candidates for one image's masked codes; call it in inference mode.

    `walk` is of N images of one class, at its beginning; `codes` and `mask` are `(L,)`. Noise in [0, 1) comes from
    `uniforms` `(N, L)`, of each particle and position, and `comb` `(L,)`, of resampling after each position.
    """
    count = len(uniforms)
    first = mask.int().argmax().item()
    weighed = ~mask & (torch.arange(len(mask), device=mask.device) > first)
    particles = codes.repeat(count, 1)
    log_weights = torch.zeros(count, dtype=torch.float64, device=codes.device)
    log_evidence, ess = 0.0, []
    for index, step in enumerate(walk.steps):
        for group in step:
            logits = walk.logits(group)
            check_finite(logits, "logits of particles", damaged_or_overflow(logits.dtype))
            masked, kept = mask[group], weighed[group]
            if masked.any():
                particles[:, group][:, masked] = draw(logits[:, masked], uniforms[:, group][:, masked.cpu()])
            if kept.any():
                nats = -logits[:, kept].double().log_softmax(-1)
                log_weights -= nats.gather(-1, particles[:, group][:, kept, None]).sum((1, 2))
            walk.put(group, particles[:, group])
        ess.append(effective_sample_size(log_weights))
        if ess[-1] < count / 2 and index + 1 < len(walk.steps):
            ancestors = systematic_resampling(log_weights, comb[group.stop - 1].item())
            log_evidence += log_weights.logsumexp(0).item() - math.log(count)
            particles, log_weights = particles[ancestors], torch.zeros_like(log_weights)
            walk.reorder(ancestors)
        if on_step is not None:
            on_step()
    log_evidence += log_weights.logsumexp(0).item() - math.log(count)
    return Particles(particles, log_weights, ess, log_evidence)
