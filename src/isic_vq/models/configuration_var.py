"""Configuration of the VAR prior: next-scale prediction over the code grids of a residual tokenizer.

Source: Tian et al., "Visual Autoregressive Modeling", arXiv 2404.02905.
"""

import math
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .checks import expect
from .configuration_prior import PriorConfig
from .configuration_vqvae import MAX_LAYERS, check_parameters, check_scales


@strict
class VARConfig(PriorConfig):
    """What a `VARModel` is built from.

    Args:
        scales: sides of the tokenizer's code grids, coarse to fine.
        code_dim: D, channels of the tokenizer's features.
        hidden_size: channels of the transformer; a multiple of `num_heads`.
        num_layers: its depth; also called `num_hidden_layers`.
        num_heads: attention heads; also called `num_attention_heads`.
        mlp_ratio: hidden channels of the feed-forward part, in multiples of `hidden_size`.
        initializer_range: standard deviation of new embeddings, of classes and of positions.
        arguments: those of `PriorConfig`.
    """

    model_type = "isic_var"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    }
    of_tokenizer: ClassVar[tuple[str, ...]] = ("num_codes", "scales", "code_dim")

    scales: list[int] | tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    code_dim: int = 32
    hidden_size: int = 192
    num_layers: int = 6
    num_heads: int = 6
    mlp_ratio: float | int = 4
    initializer_range: float | int = 0.5

    @property
    def sizes(self) -> list[int]:
        return [side * side for side in self.scales]

    @property
    def code_shape(self) -> tuple[int, ...]:
        return (sum(self.sizes),)

    @property
    def least_parameters(self) -> int:
        layers = int(self.num_layers * self.hidden_size**2 * self.mlp_ratio)
        mask = self.num_positions**2  # between positions: no parameters, but as large
        return layers + (self.num_codes + self.code_dim) * self.hidden_size + mask

    @property
    def num_steps(self) -> int:
        return len(self.scales)

    def validate_architecture(self) -> None:
        """Check the relations between fields; called by `strict` at construction."""
        check_scales(self.scales, self.scales[-1] if self.scales else 1)
        if min(self.num_codes, self.code_dim, self.hidden_size, self.num_layers, self.num_heads) < 1:
            raise ValueError("num_codes, code_dim, hidden_size, num_layers and num_heads must be positive")
        is_multiple = self.hidden_size % self.num_heads == 0
        expect(is_multiple, "hidden_size", self.hidden_size, f"a multiple of num_heads, {self.num_heads}")
        is_range = 0 <= self.initializer_range < math.inf
        expect(is_range, "initializer_range", self.initializer_range, "a finite number of at least 0")
        expect(0 < self.mlp_ratio < math.inf, "mlp_ratio", self.mlp_ratio, "a finite number of more than 0")
        expect(self.num_layers <= MAX_LAYERS, "num_layers", self.num_layers, f"at most {MAX_LAYERS}")
        check_parameters(self.least_parameters)
