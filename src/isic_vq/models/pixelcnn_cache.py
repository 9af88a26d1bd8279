"""Sampling from a PixelCNN with torch's operations: each feature of the codes already drawn is computed once.

Within a row only the codes to the left are new, so everything that depends on the rows above (the vertical
stack, or the upper half of a masked convolution) is computed once per row, and a code costs one step of small
matrix products instead of a pass of the whole network. The idea is that of Ramachandran et al., "Fast
Generation for Convolutional Autoregressive Models", arXiv 1704.06001.

What makes it fast: features lie as (column, image, channel), so that the convolutions of a row are a few plain
matrix products; labels, biases and BatchNorm are folded beforehand; sigmoid(x) is written (1 + tanh(x / 2)) / 2
with the halves folded into the weights, so that one tanh serves both halves of a gate; nothing is allocated per
code but by the draw.
"""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .code_convolution import code_tables, sum_taps
from .sampling import Sampling

if TYPE_CHECKING:
    from .modeling_pixelcnn import PixelCNNGatedLayer, PixelCNNModel, PixelCNNPlainLayer


def open_cache(model: "PixelCNNModel", conditions: Tensor) -> "GatedCache | PlainCache":
    """Open an empty cache for images of the conditions `(B,)`: call `start_row`, then `logits` and `put` per column.

    Raises:
        ValueError: a layer was wrapped by another library; what that adds to its weights would be left out.
    """
    known = ("torch.", __package__ or "", type(model).__module__.rpartition(".")[0])
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(known):
            raise ValueError(
                f"the prior's {name} is a {type(module).__module__}.{type(module).__name__}: sampling folds the weights of "
                "plain layers; merge adapters into them first (merge_and_unload() of peft)"
            )
    return (GatedCache if model.config.architecture == "gated" else PlainCache)(model, conditions)


class Cache(ABC):
    """Features of the codes so far: of the present row, and of those above as far as later rows see them.

    Layer 0 sees codes; the others see features of `size` channels. An activation takes `width` channels.
    """

    # Weights of layers 1 and up: the kernel over the row itself, `(taps * size, width)`, the layer's own column last.
    row_kernels: list[Tensor]

    def __init__(self, model: "PixelCNNModel", num_images: int, width: int, num_rows: int, taps: int):
        config = model.config
        self.model, self.grid, self.batch = model, config.grid_size, num_images
        self.size, self.width = config.hidden_size, width
        self.reach, self.first_reach = config.kernel_size // 2, config.first_kernel_size // 2
        padded, num_later = self.grid + 2 * self.reach, len(model.layers) - 1
        # Codes of the rows above and of the present one; num_codes stands for "outside the grid".
        shape = (num_images, self.first_reach, self.grid + 2 * self.first_reach)
        self.codes_above = torch.full(shape, config.num_codes, device=model.device)
        self.codes = torch.full((num_images, self.grid), config.num_codes, device=model.device)
        # Inputs of layers 1 and up in the rows above: (column, image, row * channel), the newest row last.
        self.above = self._zeros(num_later, padded, num_images, num_rows * self.size).unbind()
        # What enters each layer's activation at each column, but for what layers 1 and up see of the row itself.
        self.before = self._zeros(num_later + 1, self.grid, num_images, width)
        self.before_at = [part.unbind() for part in self.before.unbind(1)]
        # Inputs of layers 1 and up at the columns their kernels see, the present one last, and the final output.
        self.windows = self._zeros(num_later + 1, num_images, taps * self.size)
        self.window_at = self.windows.unbind()
        self.hidden_at = self.windows[:, :, -self.size :].unbind()
        self.features = self._zeros(num_images, width)
        self.position = model.position_embedding[0].permute(1, 2, 0).contiguous()  # (row, column, channel)
        self.position_row = torch.empty_like(self.position[0])
        _, first, _, second = model.head
        self.head = [(conv.bias, conv.weight.flatten(1).t().contiguous()) for conv in (first, second)]

    def start_row(self, row: int) -> None:
        """Compute the features that a row gets from the rows above; rows are started in order."""
        self.position_row.copy_(self.position[row])
        self.see_rows_above()

    @abstractmethod
    def see_rows_above(self) -> None:
        """Fill `before` with what the rows above and the biases give, and forget what the last row left."""

    @abstractmethod
    def last_hidden(self, column: int) -> Tensor:
        """Compute the features `(B, C)` at a column after the last layer, rectified."""

    def logits(self, column: int) -> Tensor:
        """Compute logits `(B, K)` of the next code of the row."""
        (first_bias, first), (second_bias, second) = self.head
        hidden = torch.addmm(first_bias, self.last_hidden(column), first).relu_()
        return torch.addmm(second_bias, hidden, second)

    def put(self, column: int, codes: Tensor) -> None:
        """Feed the codes `(B,)` drawn at a column of the current row."""
        self.codes[:, column] = codes
        last = min(column + self.first_reach, self.grid - 1)
        if last > column:
            tables = self.tables_left[: last - column]
            self.before[0, column + 1 : last + 1].add_(tables.index_select(1, codes))
        for start in range(0, self.windows.shape[2] - self.size, self.size):
            end = start + self.size
            self.windows[:, :, start:end] = self.windows[:, :, end : end + self.size]

    def reorder(self, ancestors: Tensor) -> None:
        """Between rows, continue image i from what image `ancestors[i]` was; `ancestors` is `(B,)`."""
        self.codes_above.copy_(self.codes_above[ancestors])
        self.codes.copy_(self.codes[ancestors])
        for rows in self.above:
            rows.copy_(rows[:, ancestors])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.model.device, dtype=self.model.dtype)

    def _see_codes(self, above: Tensor, left: Tensor) -> None:
        """Take layer 0's kernels, `(width, C, rows, k)` over the rows above and `(width, C, 1, k)` to the left."""
        embedding = self.model.code_embedding.weight
        self.tables_above = code_tables(embedding, above)
        # By distance to the right.
        self.tables_left = code_tables(embedding, left)[:, :-1].flip(0).contiguous()

    def _convolve_codes_above(self) -> Tensor:
        """Convolve layer 0's rows above, `(columns * B, width)`, without its bias."""
        present = self.codes_above[:, :, self.first_reach : self.first_reach + self.grid]
        present.copy_(torch.cat([present[:, 1:], self.codes[:, None]], dim=1))
        # (image, row, column, kernel column)
        windows = self.codes_above.unfold(2, 2 * self.first_reach + 1, 1)
        return sum_taps(self.tables_above, windows.permute(2, 0, 1, 3).flatten(0, 1).flatten(1))

    def _convolve_above(self, rows: Tensor, kernel: list[Tensor]) -> Tensor:
        parts = [rows[shift : shift + self.grid].flatten(0, 1) for shift in range(len(kernel))]
        result = parts[0] @ kernel[0]
        for part, matrix in zip(parts[1:], kernel[1:], strict=True):
            result.addmm_(part, matrix)
        return result

    def _push(self, rows: Tensor, new: Tensor) -> None:
        kept = rows[:, :, self.size :].clone()
        rows[:, :, : kept.shape[2]] = kept
        rows[self.reach : self.reach + self.grid, :, kept.shape[2] :] = new


def columns(weight: Tensor) -> list[Tensor]:
    """Split a kernel `(F, C, rows, k)` into k matrices `(rows * C, F)`, one per column."""
    return [part.permute(2, 1, 0).flatten(0, 1).contiguous() for part in weight.unbind(3)]


class GatedCache(Cache):
    """The gated network's features."""

    def __init__(self, model: "PixelCNNModel", conditions: Tensor):
        layers: list[PixelCNNGatedLayer] = list(model.layers)
        first, *later = layers
        size, taps = model.config.hidden_size, model.config.kernel_size // 2 + 1
        super().__init__(model, len(conditions), 2 * size, num_rows=taps, taps=taps)
        halves = torch.ones(2 * size, 1, 1, 1, device=model.device, dtype=model.dtype)
        halves[size:] = 0.5  # where tanh serves as sigmoid
        self._see_codes(first.vertical.weight * halves, first.horizontal.weight * halves)
        self.kernels = [columns(layer.vertical.weight * halves) for layer in later]
        self.row_kernels = [torch.cat(columns(layer.horizontal.weight * halves)) for layer in later]
        self.outputs = [(layer.output.weight.flatten(1) / 2).t().contiguous() for layer in layers]
        row = halves.flatten()
        self.across = [
            layer.vertical_to_horizontal.weight.flatten(1).t() / row[:, None] * row for layer in layers
        ]
        classes = [layer.class_bias(conditions).chunk(2, dim=1) for layer in layers]
        self.vertical_biases = [
            (layer.vertical.bias + vertical) * row
            for layer, (vertical, _) in zip(layers, classes, strict=True)
        ]
        # The class bias of the vertical stack is in what goes across, where the network does not have it. The step
        # leaves out the biases of the layers' outputs: what they add up to enters here and before the head.
        self.horizontal_biases, self.offset = [], self._zeros(size)
        for index, (layer, (vertical, horizontal)) in enumerate(zip(layers, classes, strict=True)):
            bias = (layer.horizontal.bias + horizontal) * row - (vertical * row) @ self.across[index]
            bias = bias.repeat(self.grid, 1, 1)  # (column, image, width)
            if index:
                for distance, matrix in enumerate(reversed(self.row_kernels[index - 1].split(size))):
                    bias[distance:] += self.offset @ matrix
            self.horizontal_biases.append(bias.flatten(0, 1))
            self.offset = self.offset + layer.output.bias

    def see_rows_above(self) -> None:
        self.windows.zero_()
        vertical = self.position_row[:, None]
        for index, (bias, across) in enumerate(zip(self.vertical_biases, self.across, strict=True)):
            if index == 0:
                above = self._convolve_codes_above()
            else:
                self._push(self.above[index - 1], vertical)
                above = self._convolve_above(self.above[index - 1], self.kernels[index - 1])
            seen = above.view(self.grid, self.batch, self.width)
            seen += bias
            torch.addmm(self.horizontal_biases[index], above, across, out=self.before[index].flatten(0, 1))
            if index < len(self.above):  # nobody sees the last layer's vertical output
                signal, opening = seen.tanh_().chunk(2, dim=2)
                vertical = torch.add(vertical, torch.addcmul(signal, signal, opening), alpha=0.5)

    def last_hidden(self, column: int) -> Tensor:
        before, residual = self.before_at[column], self.position_row[column]
        signal, opening = self.features.chunk(2, dim=1)
        gated = torch.empty_like(signal)
        for index, output in enumerate(self.outputs):
            if index:
                torch.addmm(
                    before[index], self.window_at[index - 1], self.row_kernels[index - 1], out=self.features
                )
                self.features.tanh_()
            else:
                torch.tanh(before[0], out=self.features)
            torch.addcmul(signal, signal, opening, out=gated)
            residual = torch.addmm(residual, gated, output, out=self.hidden_at[index])
        return (residual + self.offset).relu_()

    def reorder(self, ancestors: Tensor) -> None:
        super().reorder(ancestors)
        self.vertical_biases = [bias[ancestors] for bias in self.vertical_biases]
        self.horizontal_biases = [
            bias.view(self.grid, self.batch, self.width)[:, ancestors].flatten(0, 1)
            for bias in self.horizontal_biases
        ]


class PlainCache(Cache):
    """The plain network's features; BatchNorm is folded into the convolutions."""

    def __init__(self, model: "PixelCNNModel", conditions: Tensor):
        layers: list[PixelCNNPlainLayer] = list(model.layers)
        first, *later = layers
        reach = model.config.kernel_size // 2
        super().__init__(model, len(conditions), model.config.hidden_size, num_rows=reach, taps=reach + 1)
        first_scale, *later_scales = scales = [batch_norm_scale(layer.norm) for layer in layers]
        self._see_codes(first.conv.above.weight * first_scale, first.conv.left.weight * first_scale)
        self.kernels, self.row_kernels = [], []
        for layer, scale in zip(later, later_scales, strict=True):
            self.kernels.append(columns(layer.conv.above.weight * scale))
            self.row_kernels.append(torch.cat(columns(layer.conv.left.weight * scale)))
        self.biases = [
            (layer.conv.above.bias - layer.norm.running_mean) * scale.flatten()
            + layer.norm.bias
            + layer.class_bias(conditions)
            for layer, scale in zip(layers, scales, strict=True)
        ]
        # Inputs of layers 1 and up over the present row, which the next rows see.
        self.row = self._zeros(len(later), self.grid, self.batch, self.size)

    def see_rows_above(self) -> None:
        self.windows.zero_()
        for index, bias in enumerate(self.biases):
            if index == 0:
                above = self._convolve_codes_above()
            else:
                self._push(self.above[index - 1], self.row[index - 1])
                above = self._convolve_above(self.above[index - 1], self.kernels[index - 1])
            torch.add(above.view(self.grid, self.batch, self.width), bias, out=self.before[index])

    def last_hidden(self, column: int) -> Tensor:
        before = self.before_at[column]
        residual = torch.relu(before[0]).add_(self.position_row[column])
        self.hidden_at[0].copy_(residual)
        for index, kernel in enumerate(self.row_kernels):
            torch.addmm(before[index + 1], self.window_at[index], kernel, out=self.features)
            residual = torch.add(residual, self.features.relu_(), out=self.hidden_at[index + 1])
        self.row[:, column] = self.windows[:-1, :, -self.size :]
        return residual.relu()

    def reorder(self, ancestors: Tensor) -> None:
        super().reorder(ancestors)
        self.row.copy_(self.row[:, :, ancestors])
        self.biases = [bias[ancestors] for bias in self.biases]


def batch_norm_scale(norm: nn.BatchNorm2d) -> Tensor:
    """Return the factors of BatchNorm's channels in eval mode, `(C, 1, 1, 1)`."""
    return (norm.weight * (norm.running_var + norm.eps).rsqrt()).view(-1, 1, 1, 1)


class Rows(AbstractContextManager):
    """Draws the rows of codes of a batch, one after the other: on any device, in any precision."""

    def __init__(self, cache: Cache, sampling: Sampling):
        self.cache, self.sampling = cache, sampling
        # Of all logits drawn from.
        self.total = torch.zeros((), dtype=torch.float64, device=cache.before.device)
        self.guidance_share: float | Tensor = 1.0  # of the present row

    def __exit__(self, *exception: object) -> None:
        pass

    def draw(self, row: int, uniforms: Tensor) -> Tensor:
        """Draw the codes `(B, columns)` of a row from uniforms of that shape; rows are drawn in order."""
        self.guidance_share = self.share_of(row)
        self.start_row(row)
        return self.draw_columns(uniforms)

    def share_of(self, row: int) -> float:
        return self.sampling.guidance_share(row / max(self.cache.grid - 1, 1))

    def start_row(self, row: int) -> None:
        self.cache.start_row(row)

    def logits(self, column: int) -> Tensor:
        """Compute logits of the next code of the row, `(B, K)` or, when guided, `(2B, K)`."""
        return self.cache.logits(column)

    def draw_columns(self, uniforms: Tensor) -> Tensor:
        """Draw the codes of the row that is started."""
        codes = []
        for column, noise in enumerate(uniforms.unbind(1)):
            codes.append(self.sampling.draw(self.logits(column), noise, self.guidance_share, self.total))
            self.cache.put(column, self.sampling.both(codes[-1]))
        return torch.stack(codes, dim=1)

    def check(self) -> None:
        """Raise ValueError if a code was drawn from logits that are not finite."""
        self.sampling.check(math.isfinite(self.total.item()))


class GraphedRows(Rows):
    """Replays one recorded row as a CUDA graph, which costs one launch where a row has thousands."""

    def __init__(self, cache: Cache, sampling: Sampling):
        super().__init__(cache, sampling)
        if cache.before.device.type != "cuda":
            raise ValueError(
                f"the model is on {cache.before.device}: backend 'cuda_graph' needs a CUDA device"
            )
        self.graph: torch.cuda.CUDAGraph | None = None

    def draw(self, row: int, uniforms: Tensor) -> Tensor:
        if row == 0:  # one ordinary row sets up what may not be set up in a graph
            return super().draw(row, uniforms)
        self.cache.position_row.copy_(self.cache.position[row])
        if self.graph is None:
            if self.sampling.guidance_power is not None:  # differs by row: a graph reads it from memory
                self.guidance_share = torch.zeros((), dtype=torch.float64, device=uniforms.device)
                self.guidance_share.fill_(self.share_of(row))
            self.uniforms = uniforms.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.cache.see_rows_above()
                self.codes = self.draw_columns(self.uniforms)
        self.uniforms.copy_(uniforms)
        if isinstance(self.guidance_share, Tensor):
            self.guidance_share.fill_(self.share_of(row))
        self.graph.replay()
        return self.codes.clone()
