"""Exact incremental sampling from a PixelCNN: each feature is computed once.

Within a row only the codes to the left are new, so everything that depends on the rows above (the vertical
stack, or the upper half of a masked convolution) is computed once per row, and a code costs one step of small
matrix products instead of a pass of the whole network. The idea is that of Ramachandran et al., "Fast
Generation for Convolutional Autoregressive Models", arXiv 1704.06001.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sampling import check_sampling, draw, filtered_logits, guided_logits

if TYPE_CHECKING:
    from .modeling_pixelcnn import PixelCNNModel


def sample_codes(
    model: "PixelCNNModel",
    uniforms: Tensor,
    labels: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance_scale: float,
    on_row: Callable[[], None] | None,
) -> Tensor:
    """Sample `(B, h, w)` codes; the arguments are those of `PixelCNNModel.sample`, the model is in eval mode."""
    check_sampling(temperature, top_k, top_p, guidance_scale)
    grid, batch = model.config.grid_size, len(uniforms)
    if uniforms.shape != (batch, grid * grid):
        raise ValueError(f"uniforms have shape {tuple(uniforms.shape)}: expected ({batch}, {grid * grid})")
    uniforms = uniforms.to(model.device)
    codes = torch.zeros(batch, grid, grid, dtype=torch.long, device=model.device)
    guided = guidance_scale != 1
    if guided:  # both branches in one batch: the labelled images, then the same images without a label
        labels = torch.cat([labels, torch.full_like(labels, model.config.unconditional_id)])
    cache = open_cache(model, labels)
    for row in range(grid):
        cache.start_row(row)
        for column in range(grid):
            logits = cache.logits(column).float()
            if guided:
                logits = guided_logits(logits[:batch], logits[batch:], guidance_scale)
            logits = filtered_logits(logits, temperature, top_k, top_p)
            codes[:, row, column] = draw(logits, uniforms[:, row * grid + column])
            new = codes[:, row, column]
            cache.put(column, torch.cat([new, new]) if guided else new)
        if on_row is not None:
            on_row()
    return codes


def open_cache(model: "PixelCNNModel", labels: Tensor) -> "GatedCache | PlainCache":
    """An empty cache for images of the class ids `(B,)`: `start_row`, then `logits` and `put` per column."""
    cache_class = GatedCache if model.config.architecture == "gated" else PlainCache
    return cache_class(model, labels)


def window_weights(conv: nn.Conv2d) -> Tensor:
    """A `(1, width)` convolution's weight as a matrix `(in * width, out)` for flattened windows."""
    return conv.weight.flatten(1).t().contiguous()


def head_logits(head: nn.Sequential, hidden: Tensor) -> Tensor:
    """Apply the 1x1 head to the features `(B, C)` of one position."""
    _, first, _, second = head
    hidden = F.linear(hidden.relu(), first.weight.flatten(1), first.bias)
    return F.linear(hidden.relu(), second.weight.flatten(1), second.bias)


class GatedCache:
    """Features of the gated network that the codes so far determine."""

    def __init__(self, model: "PixelCNNModel", labels: Tensor):
        size, grid = model.config.hidden_size, model.config.grid_size
        self.model, self.grid, self.row = model, grid, 0
        self.class_biases = [layer.class_bias(labels).chunk(2, dim=1) for layer in model.layers]
        self.left_weights = [window_weights(layer.horizontal) for layer in model.layers]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(len(labels), size, *shape, device=model.device, dtype=model.dtype)

        # Inputs of each layer's vertical convolution, padded above and on both sides, and of its horizontal
        # convolution in the present row, padded on the left. The first layer's input is the embedded codes.
        self.above = [zeros(layer.reach + grid, grid + 2 * layer.reach) for layer in model.layers]
        self.left = [zeros(layer.reach + grid) for layer in model.layers]
        self.from_above: list[Tensor] = []

    def start_row(self, row: int) -> None:
        """Compute the vertical stack of a row, whose inputs are the rows above."""
        self.row, self.from_above = row, []
        vertical = None
        for index, layer in enumerate(self.model.layers):
            reach = layer.reach
            if vertical is not None:
                self.above[index][:, :, row + reach, reach : reach + self.grid] = vertical
            depth = layer.vertical.kernel_size[0]
            above = layer.vertical(self.above[index][:, :, row : row + depth]).squeeze(2)
            class_vertical, class_horizontal = self.class_biases[index]
            across = F.linear(above.transpose(1, 2), layer.vertical_to_horizontal.weight.flatten(1))
            self.from_above.append(across + (class_horizontal + layer.horizontal.bias)[:, None])
            signal, opening = (above + class_vertical[:, :, None]).chunk(2, dim=1)
            gated = signal.tanh() * opening.sigmoid()
            vertical = (
                gated + self.model.position_embedding[:, :, row] if vertical is None else vertical + gated
            )
            self.left[index].zero_()

    def logits(self, column: int) -> Tensor:
        """Logits `(B, K)` of the next code of the row."""
        hidden = None
        for index, layer in enumerate(self.model.layers):
            reach, left = layer.reach, self.left[index]
            if hidden is not None:
                left[:, :, column + reach] = hidden
            width = layer.horizontal.kernel_size[1]
            window = left[:, :, column : column + width].flatten(1)
            features = window @ self.left_weights[index] + self.from_above[index][:, column]
            signal, opening = features.chunk(2, dim=1)
            output = F.linear(
                signal.tanh() * opening.sigmoid(), layer.output.weight.flatten(1), layer.output.bias
            )
            position = self.model.position_embedding[:, :, self.row, column]
            hidden = output + position if hidden is None else hidden + output
        return head_logits(self.model.head, hidden)

    def put(self, column: int, codes: Tensor) -> None:
        """Take in the codes `(B,)` drawn at a column of the present row."""
        embedded = self.model.code_embedding(codes)
        reach = self.model.layers[0].reach
        self.above[0][:, :, self.row + reach, column + reach] = embedded
        self.left[0][:, :, column + reach] = embedded

    def reorder(self, ancestors: Tensor) -> None:
        """Between rows: image i goes on from what image `ancestors[i]` was; `ancestors` is `(B,)`."""
        self.above = [features[ancestors] for features in self.above]
        self.class_biases = [(v[ancestors], h[ancestors]) for v, h in self.class_biases]


class PlainCache:
    """Features of the plain network that the codes so far determine."""

    def __init__(self, model: "PixelCNNModel", labels: Tensor):
        size, grid = model.config.hidden_size, model.config.grid_size
        self.model, self.grid, self.row = model, grid, 0
        self.class_biases = [layer.class_bias(labels) for layer in model.layers]
        self.left_weights = [window_weights(layer.conv.left) for layer in model.layers]
        # Input of each layer's convolution, padded above and on both sides.
        self.inputs = [
            torch.zeros(
                len(labels), size, layer.conv.reach + grid, grid + 2 * layer.conv.reach,
                device=model.device, dtype=model.dtype,
            )
            for layer in model.layers
        ]  # fmt: skip
        self.from_above: list[Tensor] = []

    def start_row(self, row: int) -> None:
        """Convolve the rows above, which are complete in every layer."""
        self.row = row
        self.from_above = [
            layer.conv.above(inputs[:, :, row : row + layer.conv.reach]).squeeze(2)
            for layer, inputs in zip(self.model.layers, self.inputs, strict=True)
        ]

    def logits(self, column: int) -> Tensor:
        """Logits `(B, K)` of the next code of the row."""
        hidden = None
        for index, layer in enumerate(self.model.layers):
            reach, inputs = layer.conv.reach, self.inputs[index]
            if hidden is not None:
                inputs[:, :, self.row + reach, column + reach] = hidden
            width = layer.conv.left.kernel_size[1]
            window = inputs[:, :, self.row + reach, column : column + width].flatten(1)
            features = window @ self.left_weights[index] + self.from_above[index][:, :, column]
            features = layer.norm(features[:, :, None, None])[:, :, 0, 0] + self.class_biases[index]
            position = self.model.position_embedding[:, :, self.row, column]
            hidden = features.relu() + position if hidden is None else hidden + features.relu()
        return head_logits(self.model.head, hidden)

    def put(self, column: int, codes: Tensor) -> None:
        """Take in the codes `(B,)` drawn at a column of the present row."""
        reach = self.model.layers[0].conv.reach
        self.inputs[0][:, :, self.row + reach, column + reach] = self.model.code_embedding(codes)

    def reorder(self, ancestors: Tensor) -> None:
        """Between rows: image i goes on from what image `ancestors[i]` was; `ancestors` is `(B,)`."""
        self.inputs = [features[ancestors] for features in self.inputs]
        self.class_biases = [bias[ancestors] for bias in self.class_biases]
