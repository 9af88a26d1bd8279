"""Configuration of the VQ-VAE tokenizer.

Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937; the layer
order (convolution, batch normalisation, ReLU) follows the report "Image Generation using VQ-VAE and
Pixel CNN". Differs: an exponential-moving-average codebook by default (appendix A.1 of the paper), and a
linear projection to `code_dim` between encoder and quantizer.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

PRESETS: dict[str, dict[str, Any]] = {
    "f8": {"hidden_sizes": (64, 128, 128)},
    "f4": {"hidden_sizes": (64, 128)},
}


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
        norm: "batch" (BatchNorm, as the report has it) or "group" (GroupNorm: no running statistics,
            the choice for tiny batches and for runs that must not depend on how the batch is cut).
        num_codes: K, the number of codebook vectors.
        code_dim: D, channels of a codebook vector.
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
    norm: str = "batch"
    num_codes: int = 512
    code_dim: int = 32
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

    def validate_architecture(self) -> None:
        """Check the relations between fields; called by `strict` at construction."""
        if not self.hidden_sizes:
            raise ValueError(
                "hidden_sizes is empty: expected one entry per halving, for example (64, 128, 128)"
            )
        if self.image_size <= 0 or self.image_size % self.downsampling:
            raise ValueError(
                f"image_size is {self.image_size}: expected a positive multiple of {self.downsampling}, "
                f"the downsampling of {len(self.hidden_sizes)} hidden_sizes"
            )
        if self.norm not in ("batch", "group"):
            raise ValueError(f"norm is {self.norm!r}: expected 'batch' or 'group'")
        if self.codebook_update not in ("ema", "gradient"):
            raise ValueError(f"codebook_update is {self.codebook_update!r}: expected 'ema' or 'gradient'")
        if self.num_codes < 1 or self.code_dim < 1:
            raise ValueError(
                f"num_codes and code_dim must be positive, got {self.num_codes} and {self.code_dim}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: expected a value in [0, 1)")
