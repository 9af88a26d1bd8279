"""Configuration of the PixelCNN prior over code grids.

Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", arXiv 1606.05328
(gated), and "Pixel Recurrent Neural Networks", arXiv 1601.06759 (plain). Differs: codes enter through an
embedding, and a learned position embedding tells the net where on the grid it is.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .checks import expect
from .configuration_prior import PriorConfig
from .configuration_vqvae import MAX_LAYERS, check_parameters


@strict
class PixelCNNConfig(PriorConfig):
    """What a `PixelCNNModel` is built from.

    Args:
        grid_size: side of the code grid.
        architecture: "gated" (vertical and horizontal stacks: no blind spot) or "plain" (one masked
            stack, type A then B, with BatchNorm and ReLU, as the report describes it).
        hidden_size: channels of each stack.
        num_layers: layers after the first; also called `num_hidden_layers`.
        kernel_size: side of the later layers' (masked) kernel; odd.
        first_kernel_size: side of the first layer's (masked) kernel; odd.
        head_size: channels between the last layer and the logits.
        arguments: those of `PriorConfig`.
    """

    model_type = "isic_pixelcnn"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_layers"}
    of_tokenizer: ClassVar[tuple[str, ...]] = ("num_codes", "grid_size")

    grid_size: int = 16
    architecture: str = "gated"
    hidden_size: int = 96
    num_layers: int = 10
    kernel_size: int = 3
    first_kernel_size: int = 7
    head_size: int = 256

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.grid_size, self.grid_size

    @property
    def sizes(self) -> list[int]:
        return [self.grid_size**2]

    @property
    def least_parameters(self) -> int:
        size, kernel = self.hidden_size, self.kernel_size
        layers = size * (self.num_layers * size * kernel * (kernel // 2) + self.first_kernel_size**2 // 2)
        return layers + self.num_codes * (size + self.head_size) + size * (self.head_size + self.grid_size**2)

    @property
    def num_steps(self) -> int:
        return self.grid_size

    def validate_architecture(self) -> None:
        """Check the relations between fields; called by `strict` at construction."""
        is_known = self.architecture in ("gated", "plain")
        expect(is_known, "architecture", self.architecture, "'gated' or 'plain'")
        for name in ("kernel_size", "first_kernel_size"):
            side = getattr(self, name)
            expect(side >= 3 and side % 2 == 1, name, side, "an odd number of at least 3")
        if min(self.num_codes, self.grid_size, self.hidden_size, self.head_size) < 1 or self.num_layers < 0:
            raise ValueError("num_codes, grid_size, hidden_size and head_size must be positive")
        expect(self.num_layers <= MAX_LAYERS, "num_layers", self.num_layers, f"at most {MAX_LAYERS}")
        check_parameters(self.least_parameters)
