"""Configuration of the PixelCNN prior over code grids.

Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", arXiv 1606.05328
(gated), and "Pixel Recurrent Neural Networks", arXiv 1601.06759 (plain). Differs: codes enter through an
embedding, and a learned position embedding tells the net where on the grid it is.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class PixelCNNConfig(PreTrainedConfig):
    """What a `PixelCNNModel` is built from.

    The classes it is conditioned on are the entries of `id2label`; the id `len(id2label)` stands for
    "no class" (unconditional). An empty `id2label` makes an unconditional prior.

    Args:
        num_codes: K, size of the tokenizer's codebook.
        grid_size: side of the code grid.
        architecture: "gated" (vertical and horizontal stacks: no blind spot) or "plain" (one masked
            stack, type A then B, with BatchNorm and ReLU, as the report describes it).
        hidden_size: channels of each stack.
        num_layers: layers after the first.
        kernel_size: side of the later layers' (masked) kernel; odd.
        first_kernel_size: side of the first layer's (masked) kernel; odd.
        head_size: channels between the last layer and the logits.
        dropout: dropout probability inside each layer.
        class_dropout: probability that a training label is replaced by the unconditional id, which is
            what guidance and unconditional sampling need.
    """

    model_type = "isic_pixelcnn"
    base_config_key = "prior_config"

    num_codes: int = 512
    grid_size: int = 16
    architecture: str = "gated"
    hidden_size: int = 96
    num_layers: int = 10
    kernel_size: int = 3
    first_kernel_size: int = 7
    head_size: int = 256
    dropout: float | int = 0.1
    class_dropout: float | int = 0.1

    def __post_init__(self, **kwargs):  # type: ignore[no-untyped-def]  # signature set by transformers
        # Without this transformers fills in two placeholder classes, LABEL_0 and LABEL_1.
        self.id2label = {int(index): name for index, name in (self.id2label or {}).items()}
        self.label2id = {name: index for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)

    @property
    def unconditional_id(self) -> int:
        """The label that means "no class"."""
        return len(self.id2label)

    def validate_architecture(self) -> None:
        """Check the relations between fields; called by `strict` at construction."""
        if self.architecture not in ("gated", "plain"):
            raise ValueError(f"architecture is {self.architecture!r}: expected 'gated' or 'plain'")
        for name in ("kernel_size", "first_kernel_size"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected an odd number of at least 3")
        if min(self.num_codes, self.grid_size, self.hidden_size, self.head_size) < 1 or self.num_layers < 0:
            raise ValueError("num_codes, grid_size, hidden_size and head_size must be positive")
        ids = sorted(int(index) for index in self.id2label or {})
        if ids != list(range(len(ids))):
            raise ValueError(
                f"id2label has the ids {ids}: expected 0, 1, 2 and so on; the id after the last is unconditional"
            )
        for name in ("dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a probability in [0, 1)")
