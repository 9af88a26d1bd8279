"""Residual quantization over scales: an image's latents as code grids, coarse to fine, over one codebook.

Scale by scale, what is still missing of the latents is averaged down to the scale's side and quantized; its vectors are
enlarged, smoothed by a convolution (phi) and added to what is there. All grids together say what the finest alone
could not, and each prefix of them is a whole, coarser image.

Source: Tian et al., "Visual Autoregressive Modeling", arXiv 2404.02905, algorithms 1 and 2 and section 3.2; losses as
in the authors' code, which released no training of it.
Differs: phi starts as the identity, so that the first step's residuals are those of plain interpolation; the codebook
may be a moving average, in which case phi alone learns from the codebook loss.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vector_quantizer import Quantization, VQVAEVectorQuantizer, nearest_codes, rows, straight_through

PHI_SHARE = 0.5  # of the convolution in what phi returns


class VQVAEPhi(nn.Conv2d):
    """Half the features themselves, half their 3x3 convolution; `(B, D, h, w)` to the same shape."""

    def __init__(self, code_dim: int):
        super().__init__(code_dim, code_dim, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # like distances, sums are not for bfloat16
            return features.lerp(super().forward(features), PHI_SHARE)


class Step(NamedTuple):
    """The quantization of one scale."""

    residual: Tensor  # `(B, side * side, D)`, what was missing, averaged to the scale's side
    codes: Tensor  # `(B, side * side)`
    features: Tensor  # `(B, D, h, w)`, the sum of this scale and those before


class VQVAEResidualQuantizer(VQVAEVectorQuantizer):
    """A `VQVAEVectorQuantizer` whose codes are `(B, L)`: all grids flattened, coarse to fine, L the sum of squared sides.

    Args:
        scales: sides of the grids, coarse to fine; the last is the latents'.
        num_phi: convolutions that the scales share, each among neighbouring ones.
        num_codes, code_dim, settings: those of `VQVAEVectorQuantizer`.
    """

    learns_by_loss = True  # phi does, however the codebook learns

    def __init__(self, scales: Sequence[int], num_phi: int, num_codes: int, code_dim: int, **settings: Any):
        super().__init__(num_codes, code_dim, **settings)
        self.scales = tuple(scales)
        self.phi = nn.ModuleList(VQVAEPhi(self.code_dim) for _ in range(num_phi))
        # Which phi each scale takes: the one whose place is nearest to the scale's, as the authors have them.
        edge = 1 / (3 if num_phi == 4 else 2) / num_phi
        places, last = np.linspace(edge, 1 - edge, num_phi), max(len(self.scales) - 1, 1)
        self.phi_of = [int(abs(places - index / last).argmin()) for index in range(len(self.scales))]

    def forward(self, latents: Tensor) -> Quantization:
        """Quantize latents of shape `(B, D, h, w)`; losses are means over the prefixes of the scales, too."""
        self._check(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.to(self.codebook.dtype)
            steps = list(self._refine(z.detach()))
            codes = torch.cat([step.codes for step in steps], dim=1)
            prefixes = [step.features for step in steps]
            commitment_loss = torch.stack([F.mse_loss(z, prefix.detach()) for prefix in prefixes]).mean()
            codebook_loss = torch.stack([F.mse_loss(prefix, z.detach()) for prefix in prefixes]).mean()
            quantized = straight_through(z, prefixes[-1])
            if self.training:
                # Image by image, so that several processes number them as one does.
                self._see(torch.cat([step.residual for step in steps], dim=1).flatten(0, 1), codes.flatten())
        return Quantization(quantized, codes, commitment_loss, codebook_loss)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Codes `(B, L)` of latents `(B, D, h, w)`; see `VQVAEVectorQuantizer.encode`."""
        self._check(latents)
        with torch.autocast(latents.device.type, enabled=False):
            steps = self._refine(latents.to(self.codebook.dtype))
            return torch.cat([step.codes for step in steps], dim=1)

    @torch.no_grad()
    def rows_to_learn(self, latents: Tensor, quantized: bool = True) -> Tensor:
        """The vectors of latents `(B, D, h, w)` that the codebook represents: the residuals of all scales, `(B * L, D)`.

        `quantized=False` takes the residuals that each scale would have if those before it had lost nothing but detail.
        """
        steps = self._refine(latents.to(self.codebook.dtype), quantized)
        return torch.cat([step.residual for step in steps], dim=1).flatten(0, 1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Features `(B, D, h, w)` of codes `(B, L)`, or of the first scales alone."""
        first, *others = (F.embedding(grid, self.codebook) for grid in self.grids(self.checked(codes)))
        features = self.add_scale(None, first, 0)
        for index, vectors in enumerate(others, 1):
            features = self.add_scale(features, vectors, index)
        return features

    def grids(self, codes: Tensor) -> list[Tensor]:
        """Codes `(B, L)`, or those of the first scales, as grids `(B, side, side)`, coarse to fine.

        Raises:
            ValueError: the codes are not those of whole scales.
        """
        sizes = [side * side for side in self.scales]
        sums = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        if codes.ndim != 2 or codes.shape[1] not in sums:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}: expected (batch, {sums[-1]}), the scales {self.scales} one "
                f"after the other, or whole first scales: {', '.join(map(str, sums[:-1]))}"
            )
        parts = codes.split(sizes[: sums.index(codes.shape[1]) + 1], dim=1)
        return [part.unflatten(1, (side, side)) for part, side in zip(parts, self.scales, strict=False)]

    def context(self, codes: Tensor) -> Tensor:
        """A prior's input `(B, L - first side squared, D)` for later scales: features of all coarser ones."""
        features: Tensor | None = None
        inputs = [self.codebook.new_zeros(codes.shape[0], 0, self.code_dim)]
        for index, grid in enumerate(self.grids(codes)):
            features, following = self.extend(features, grid.flatten(1), index)
            if following is not None:
                inputs.append(following)
        return torch.cat(inputs, dim=1)

    def extend(self, features: Tensor | None, codes: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """Add codes `(B, side * side)` of scale number `index` to features `(B, D, h, w)`, which are None before the first.

        Returns:
            The new features, and the context of the next scale, `(B, next side squared, D)`, or None after the last.
        """
        side = self.scales[index]
        vectors = F.embedding(self.checked(codes), self.codebook).unflatten(1, (side, side))
        features = self.add_scale(features, vectors, index)
        if index + 1 == len(self.scales):
            return features, None
        return features, averaged(features, self.scales[index + 1])

    def add_scale(self, features: Tensor | None, vectors: Tensor, index: int) -> Tensor:
        """The residual sum itself: features `(B, D, h, w)` plus phi(enlarged vectors `(B, side, side, D)`)."""
        enlarged = vectors.permute(0, 3, 1, 2)
        if self.scales[index] != self.scales[-1]:
            enlarged = F.interpolate(enlarged, size=self.scales[-1], mode="bicubic")
        smoothed = self.phi[self.phi_of[index]](enlarged)
        return smoothed if features is None else features + smoothed

    def _refine(self, latents: Tensor, quantized: bool = True) -> Iterator[Step]:
        """Quantize scale by scale; unless `quantized`, residuals themselves stand for their codes' vectors."""
        features: Tensor | None = None
        for index, side in enumerate(self.scales):
            missing = latents if features is None else latents - features.detach()
            residual = averaged(missing, side)
            codes = nearest_codes(residual.flatten(0, 1), self.codebook).view(residual.shape[:2])
            vectors = F.embedding(codes, self.codebook) if quantized else residual
            features = self.add_scale(features, vectors.unflatten(1, (side, side)), index)
            yield Step(residual, codes, features)

    def _check(self, latents: Tensor) -> None:
        super()._check(latents)
        if latents.shape[2:] != (self.scales[-1], self.scales[-1]):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: expected height and width {self.scales[-1]}, the finest scale"
            )


def averaged(features: Tensor, side: int) -> Tensor:
    """Features `(B, D, h, w)` averaged over areas, `(B, side * side, D)`."""
    smaller = features if features.shape[-1] == side else F.interpolate(features, size=side, mode="area")
    return rows(smaller).flatten(1, 2)
