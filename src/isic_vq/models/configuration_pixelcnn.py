"""Configuration of the PixelCNN prior over code grids.

Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", arXiv 1606.05328
(gated), and "Pixel Recurrent Neural Networks", arXiv 1601.06759 (plain). Differs: codes enter through an
embedding, and a learned position embedding tells the net where on the grid it is.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

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
    def description(self) -> str:
        """What it is and in which order it makes codes."""
        kind = "gated " if self.architecture == "gated" else ""
        return f"{kind}PixelCNN prior that generates such grids in raster order"

    @property
    def reference(self) -> tuple[str, str]:
        """Authors, title and arXiv number of its paper."""
        if self.architecture == "gated":
            authors = "A. van den Oord et al."
            return f"{authors}: Conditional Image Generation with PixelCNN Decoders", "1606.05328"
        return (
            "A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu: Pixel Recurrent Neural Networks",
            "1601.06759",
        )

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of an image's codes: `(h, w)`."""
        return self.grid_size, self.grid_size

    @property
    def sizes(self) -> list[int]:
        """Codes of the one grid."""
        return [self.grid_size**2]

    @property
    def least_parameters(self) -> int:
        """A lower bound of the number of parameters."""
        size, kernel = self.hidden_size, self.kernel_size
        layers = size * (self.num_layers * size * kernel * (kernel // 2) + self.first_kernel_size**2 // 2)
        return layers + self.num_codes * (size + self.head_size) + size * (self.head_size + self.grid_size**2)

    @property
    def num_steps(self) -> int:
        """Rows of the grid."""
        return self.grid_size

    def validate_architecture(self) -> None:
        """Check the relations between fields; called by `strict` at construction."""
        if self.architecture not in ("gated", "plain"):
            raise ValueError(f"architecture is {self.architecture!r}: expected 'gated' or 'plain'")
        for name in ("kernel_size", "first_kernel_size"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected an odd number of at least 3")
        if min(self.num_codes, self.grid_size, self.hidden_size, self.head_size) < 1 or self.num_layers < 0:
            raise ValueError("num_codes, grid_size, hidden_size and head_size must be positive")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}: expected at most {MAX_LAYERS}")
        check_parameters(self.least_parameters)
