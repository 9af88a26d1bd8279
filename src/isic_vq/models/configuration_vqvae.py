"""Configuration of the VQ-VAE tokenizer.

Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937; the layer
order (convolution, batch normalisation, ReLU) follows the report "Image Generation using VQ-VAE and
Pixel CNN". Residual quantization over scales is that of Tian et al., "Visual Autoregressive Modeling", arXiv 2404.02905.
Differs: an exponential-moving-average codebook by default (appendix A.1 of the paper), and a
linear projection to `code_dim` between encoder and quantizer.
"""

import math
from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .checks import expect

PRESETS: dict[str, dict[str, Any]] = {
    "f8": {"hidden_sizes": (64, 128, 128)},
    "f4": {"hidden_sizes": (64, 128)},
}

MAX_PARAMETERS = 2**30
MAX_LAYERS = 1000
MAX_IMAGE_SIZE = 4096  # pixels


def check_parameters(least: float) -> None:
    """Raise ValueError for sizes that are a mistake or an attack: modules allocate what a config asks for."""
    if least > MAX_PARAMETERS:
        raise ValueError(
            f"the sizes make at least {least:.3g} parameters: expected at most {MAX_PARAMETERS:,}"
        )


def check_scales(scales: Sequence[int], last: int) -> None:
    """Raise ValueError unless sides of code grids grow from at least 1 to `last`."""
    sides = list(scales)
    if not sides or sides[0] < 1 or sides != sorted(set(sides)) or sides[-1] != last:
        raise ValueError(
            f"scales are {sides}: expected sides that grow from at least 1 to {last}, the code grid's"
        )


@strict
class VQVAEConfig(PreTrainedConfig):
    """What a `VQVAEModel` is built from.

    Args:
        image_size: side of the square input, in pixels; a multiple of `downsampling`.
        num_channels: colour channels of the input.
        hidden_sizes: channels after each stride-2 convolution; their number sets the downsampling
            (three halvings: f8, two: f4).
        num_residual_blocks: residual blocks at the code grid's resolution, in encoder and decoder each.
        residual_size: channels inside a residual block.
        refinement_size: channels of three 3x3 convolutions at full resolution that correct the decoder's pixels; 0 has none.
        norm: "batch" (BatchNorm, as the report has it) or "group" (GroupNorm: no running statistics,
            the choice for tiny batches and for runs that must not depend on how the batch is cut).
        num_codes: K, the number of codebook vectors.
        code_dim: D, channels of a codebook vector.
        scales: sides of the code grids, coarse to fine, such as (1, 2, 3, 4, 6, 8, 12, 16); the last is `grid_size`.
            None makes a single grid.
        num_phi: convolutions that the scales share, of which there are at most as many as scales; without
            scales there are none.
        codebook_update: "ema" (moving averages of the assigned latents) or "gradient" (codebook loss).
        ema_decay: decay per training step of the moving averages.
        ema_epsilon: Laplace smoothing of the moving counts, in counts.
        dead_code_threshold: a code whose moving count, in latents per step, falls below this is moved
            onto a latent of the current batch; 0 turns resets off.
        beta: weight of the commitment loss ||z - sg(e)||^2 (third term of eq. 3).
        l1_weight: weight of the mean absolute error in `loss`.
        mse_weight: weight of the mean squared error in `loss`.
    """

    model_type = "isic_vqvae"
    base_config_key = "vqvae_config"

    image_size: int = 128
    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 128)
    num_residual_blocks: int = 2
    residual_size: int = 64
    refinement_size: int = 0
    norm: str = "batch"
    num_codes: int = 512
    code_dim: int = 32
    scales: list[int] | tuple[int, ...] | None = None
    num_phi: int = 4
    codebook_update: str = "ema"
    ema_decay: float = 0.99
    ema_epsilon: float = 1e-5
    dead_code_threshold: float | int = 1.0
    beta: float | int = 0.25
    l1_weight: float | int = 1.0
    mse_weight: float | int = 1.0

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VQVAEConfig":
        """Build the preset `name` ("f8": 16x16 codes of a 128-pixel image, "f4": 32x32) with overrides."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: expected one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def downsampling(self) -> int:
        """Input pixels per code along one side."""
        return 2 ** len(self.hidden_sizes)

    @property
    def grid_size(self) -> int:
        """Side of the code grid of an `image_size` image."""
        return self.image_size // self.downsampling

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the code grids, coarse to fine."""
        return tuple(self.scales or (self.grid_size,))

    @property
    def num_positions(self) -> int:
        """Codes of an image."""
        return sum(side * side for side in self.sides)

    @property
    def least_parameters(self) -> int:
        """A lower bound of the number of parameters."""
        sizes = list(self.hidden_sizes)
        last, blocks = sizes[-1], 2 * self.num_residual_blocks
        squares = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False)) + self.num_channels * sizes[0]
        squares += blocks * self.residual_size * last + self.refinement_size**2
        return squares + self.code_dim * (self.num_codes + last)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of an image's codes: `(h, w)`, or `(L,)` with all scales one after the other."""
        return (self.num_positions,) if self.scales else (self.grid_size, self.grid_size)

    def validate_architecture(self) -> None:
        """Check the relations between fields; called by `strict` at construction."""
        if not self.hidden_sizes:
            raise ValueError(
                "hidden_sizes is empty: expected one entry per halving, for example (64, 128, 128)"
            )
        multiple = f"{self.downsampling}, the downsampling of {len(self.hidden_sizes)} hidden_sizes"
        is_multiple = self.image_size > 0 and self.image_size % self.downsampling == 0
        expect(is_multiple, "image_size", self.image_size, f"a positive multiple of {multiple}")
        expect(self.image_size <= MAX_IMAGE_SIZE, "image_size", self.image_size, f"at most {MAX_IMAGE_SIZE}")
        blocks = self.num_residual_blocks
        expect(blocks <= MAX_LAYERS, "num_residual_blocks", blocks, f"at most {MAX_LAYERS}")
        check_parameters(self.least_parameters)
        expect(self.norm in ("batch", "group"), "norm", self.norm, "'batch' or 'group'")
        update = self.codebook_update
        expect(update in ("ema", "gradient"), "codebook_update", update, "'ema' or 'gradient'")
        if self.scales is not None:
            check_scales(self.scales, self.grid_size)
            number = len(self.scales)
            expect(
                1 <= self.num_phi <= number, "num_phi", self.num_phi, f"1 to {number}, the number of scales"
            )
        least = dict.fromkeys(("num_channels", "residual_size", "num_codes", "code_dim"), 1)
        least |= dict.fromkeys(
            ("num_residual_blocks", "refinement_size", "ema_epsilon", "dead_code_threshold"), 0
        )
        least |= dict.fromkeys(("beta", "l1_weight", "mse_weight"), 0)
        for name, low in least.items():
            expect(low <= getattr(self, name) < math.inf, name, getattr(self, name), f"at least {low}")
        if min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes are {list(self.hidden_sizes)}: expected at least 1 channel each")
        expect(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a value in [0, 1)")
