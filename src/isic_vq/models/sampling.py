"""From logits to codes: guidance, temperature, top-k, top-p, and reproducible draws.

A draw is inverse-CDF sampling of one uniform number, so the randomness of an image is a fixed array of
uniforms, one per grid position: it depends on the seed and the image's index alone, never on the batch the
image happens to be computed in. Top-p after Holtzman et al., arXiv 1904.09751; guidance after Ho and
Salimans, arXiv 2207.12598, written as u + s (c - u): scale 1 is off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import expect, is_whole

FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits.

    Args:
        temperature: below 1 sharpens, above 1 flattens the distributions.
        top_k: keep this many most likely codes; by default all.
        top_p: keep the most likely codes that hold this much probability; by default all.
        guidance_scale: 1 is off, larger values follow the label more closely; see `guided_logits`.
        guidance_power: exponent of guidance that grows over the codes, see `guidance_share`; by default as the prior has it.

    Raises:
        ValueError: a setting without a meaning, or one that float32 does not hold.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    guidance_power: float | None = None

    def __post_init__(self) -> None:
        temperature, top_k, top_p, scale, power = vars(self).values()
        positive = (
            "more than 0 (top_k=1 takes the most likely code), and no smaller or larger than float32 holds"
        )
        is_temperature = isinstance(temperature, Real) and FLOAT32.tiny <= temperature <= FLOAT32.max
        expect(is_temperature, "temperature", temperature, positive)
        is_number = top_k is None or is_whole(top_k, 1)
        expect(is_number, "top_k", top_k, "at least 1, or None for all codes; a whole number")
        is_share = top_p is None or (isinstance(top_p, Real) and 0 < top_p <= 1)
        expect(is_share, "top_p", top_p, "a probability in (0, 1], or None")
        at_least = "at least 0; 1 is off; and no more than float32 holds"
        is_scale = isinstance(scale, Real) and 0 <= scale <= FLOAT32.max
        expect(is_scale, "guidance_scale", scale, at_least)
        is_power = power is None or (isinstance(power, Real) and 0 < power <= FLOAT32.max)
        expect(is_power, "guidance_power", power, "more than 0, or None for the prior's default")

    def changed(self, settings: dict[str, Any]) -> "Sampling":
        """Copy with other values of some fields; TypeError for the name of none."""
        for name in settings.keys() - vars(self).keys():
            raise TypeError(
                f"unexpected argument {name!r}: beside those of its call this takes {', '.join(vars(self))}"
            )
        return replace(self, **settings)

    def changes(self, usual: "Sampling | None" = None) -> dict[str, float]:
        """The fields that differ from another's, by default from those of a draw from the prior's own distribution."""
        before = vars(usual or Sampling())
        return {name: value for name, value in vars(self).items() if value != before[name]}

    @property
    def guided(self) -> bool:
        """Whether logits come in two halves: of the labelled images, then of the same ones without a label."""
        return self.guidance_scale != 1

    def guidance_share(self, progress: float, usual: float = 1.0) -> float:
        """Return the share of the guidance that a row or scale takes: (1 - cos(pi t^p)) / 2.

        Source: sampling of Yu et al., "Randomized Autoregressive Visual Generation", arXiv 2411.00776.

        Args:
            progress: t, from 0 at the first to 1 at the last.
            usual: what a prior takes where no `guidance_power` is set.
        """
        if self.guidance_power is None:
            return usual
        return (1 - math.cos(math.pi * progress**self.guidance_power)) / 2

    def both(self, images: Tensor) -> Tensor:
        """Repeat entries per image `(B, ...)` when guided, once with and once without a label: `(2B, ...)`."""
        return torch.cat([images, images]) if self.guided else images

    def draw(
        self,
        logits: Tensor,
        uniforms: Tensor,
        guidance_share: float | Tensor = 1.0,
        total: Tensor | None = None,
    ) -> Tensor:
        """Draw codes `(B, ...)` from logits `(B, ..., K)`, or `(2B, ..., K)` when guided, and uniforms `(B, ...)`.

        Args:
            logits: raw, in any precision.
            uniforms: in [0, 1), float64.
            guidance_share: of what guidance adds to 1, only this share is taken.
            total: float64 scalar to which the logits are added after guidance and temperature, in place. It stays finite
                as long as they do, without waiting for the device at each draw; see `check`.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            scale = 1 + guidance_share * (self.guidance_scale - 1)
            logits = guided_logits(conditional, unconditional, scale)
        logits = logits / self.temperature
        if total is not None:
            total += logits.sum(dtype=total.dtype)
        return draw(exclude_unlikely(logits, self.top_k, self.top_p), uniforms)

    def check(self, finite: bool) -> None:
        """Raise ValueError if logits that codes were drawn from are not finite."""
        if not finite:
            raise ValueError(
                f"logits are not finite (NaN or infinite) at temperature {self.temperature:g} and guidance_scale "
                f"{self.guidance_scale:g}: the prior's weights are damaged, or a number overflows; choose milder settings, "
                "or load the model again, in float32"
            )


def num_labelled(labels: Any) -> int:
    """Number of images that labels are for where nobody says: one per label; 1 of a single label or None."""
    return len(labels) if np.ndim(labels) else 1


def image_generators(seed: int, num_images: int, first_index: int = 0) -> list[torch.Generator]:
    """Make one CPU generator per image, a function of (seed, image index) alone."""
    for name, value in {"seed": seed, "first_index": first_index}.items():
        expect(is_whole(value, 0), name, value, "0 or more, a whole number")
    states = [
        np.random.SeedSequence(seed, spawn_key=(first_index + index,)).generate_state(1, np.uint64)[0]
        for index in range(num_images)
    ]
    return [torch.Generator().manual_seed(int(state)) for state in states]


def position_uniforms(
    generators: torch.Generator | Sequence[torch.Generator], num_positions: int, num_images: int | None = None
) -> Tensor:
    """Uniforms in [0, 1), `(num_images, num_positions)` float64: row i is the noise of image i.

    Args:
        generators: one per image, or one for all.
        num_positions: uniforms of an image.
        num_images: how many; by default one per generator.

    Raises:
        ValueError: no generators, or another number of them than of images.
    """
    if isinstance(generators, torch.Generator):
        shape = (num_images or 1, num_positions)
        return torch.rand(shape, generator=generators, dtype=torch.float64, device=generators.device)
    is_list = isinstance(generators, Sequence) and all(isinstance(g, torch.Generator) for g in generators)
    expect(is_list, "generator", generators, "a torch.Generator, or a list of one per image")
    if num_images not in (None, len(generators)):
        raise ValueError(
            f"there are {len(generators)} generators for {num_images} images: give one per image"
        )
    return torch.stack([torch.rand(num_positions, generator=g, dtype=torch.float64) for g in generators])


def guided_logits(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """u + s (c - u): s = 1 gives c, s = 0 gives u, s > 1 exaggerates what the label changes."""
    return unconditional + guidance_scale * (conditional - unconditional)


def exclude_unlikely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set excluded codes to -inf in logits `(..., K)` that are divided by the temperature.

    top-k keeps the k most likely codes (and those tied with the k-th); top-p then keeps the smallest set of
    most likely codes whose probability reaches p, never less than one code.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sample from logits `(..., K)`: the first code whose cumulative probability exceeds the uniform.

    Uniforms `(...)` are in [0, 1), float64; a logit of -inf excludes a code. The codes have the uniforms' shape.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # Rounding can leave the total a little off 1, so the uniform is scaled to it.
    target = uniforms.to(cumulative.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
