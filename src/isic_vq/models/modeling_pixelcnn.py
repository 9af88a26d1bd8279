"""PixelCNN: an autoregressive prior over grids of codes, in raster order.

Source: "gated": van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", arXiv 1606.05328,
eq. 2 and figure 2 (vertical and horizontal stacks, no blind spot). "plain": van den Oord et al., "Pixel
Recurrent Neural Networks", arXiv 1601.06759, section 3.4 (masks A and B), with BatchNorm and ReLU as in the
report "Image Generation using VQ-VAE and Pixel CNN".
Differs: codes enter through an embedding; a learned position embedding follows the first layer; the vertical
stack has residual connections too; a masked convolution is written as two small ones, over the rows above and
over the codes to the left, which is the same function without multiplying masked taps by zero; those of the gated
net's first layer, whose input is codes, are sums of table rows.
BatchNorm in train mode mixes positions (and so leaks future codes): the plain net's causality and likelihood
hold in eval mode.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .clusters import ConditionEmbedding
from .code_convolution import CodeConv2d
from .configuration_pixelcnn import PixelCNNConfig
from .modeling_prior import Extend, PriorModel
from .modes import exactly, label_unrun
from .pixelcnn_cache import open_cache
from .pixelcnn_sampler import RasterWalk, best_backend, open_rows
from .sampling import Sampling


def gate(features: Tensor) -> Tensor:
    """tanh(first half of the channels) * sigmoid(second half) (eq. 2)."""
    signal, opening = features.chunk(2, dim=1)
    return signal.tanh() * opening.sigmoid()


class PixelCNNCausalConv2d(nn.Module):
    """A masked convolution, of odd `kernel_size`, without its masked taps: rows above, plus codes to the left.

    With mask A it sees strictly earlier positions, with mask B (`sees_itself`) its own, too.
    """

    def __init__(self, size_in: int, size_out: int, kernel_size: int, sees_itself: bool):
        super().__init__()
        self.reach, self.sees_itself = kernel_size // 2, sees_itself
        self.above = nn.Conv2d(size_in, size_out, (self.reach, kernel_size))
        self.left = nn.Conv2d(size_in, size_out, (1, self.reach + sees_itself), bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, C, h, w)` to `(B, size_out, h, w)`."""
        reach, last = self.reach, 0 if self.sees_itself else -1
        above = self.above(F.pad(features, (reach, reach, reach, -1)))  # row i sees rows i-reach .. i-1
        return above + self.left(F.pad(features, (reach, last)))


class PixelCNNPlainLayer(nn.Module):
    """relu(BatchNorm(masked convolution)); layers of type B add their input."""

    def __init__(self, size_in: int, config: PixelCNNConfig, first: bool):
        super().__init__()
        self.first = first
        kernel_size = config.first_kernel_size if first else config.kernel_size
        self.conv = PixelCNNCausalConv2d(size_in, config.hidden_size, kernel_size, sees_itself=not first)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.class_bias = ConditionEmbedding(config, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor, conditions: Tensor) -> Tensor:
        hidden = self.norm(self.conv(features)) + self.class_bias(conditions)[:, :, None, None]
        hidden = self.dropout(hidden.relu())
        return hidden if self.first else features + hidden


class PixelCNNGatedLayer(nn.Module):
    """One layer of the vertical and the horizontal stack.

    The vertical stack at row i sees rows above i (its kernel includes row i of its *input*, except in the first
    layer, whose input is the codes themselves); the horizontal stack sees the codes to the left, and the
    vertical stack through a 1x1 convolution.
    """

    def __init__(self, config: PixelCNNConfig, first: bool):
        super().__init__()
        size = config.hidden_size
        kernel_size = config.first_kernel_size if first else config.kernel_size
        self.first, self.reach = first, kernel_size // 2
        depth = self.reach if first else self.reach + 1
        convolution = CodeConv2d if first else nn.Conv2d
        self.vertical = convolution(size, 2 * size, (depth, kernel_size))
        self.vertical_to_horizontal = nn.Conv2d(2 * size, 2 * size, 1, bias=False)
        self.horizontal = convolution(size, 2 * size, (1, depth))
        self.output = nn.Conv2d(size, size, 1)
        self.class_bias = ConditionEmbedding(config, 4 * size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(F.pad(vertical, (self.reach, self.reach, self.reach, 0)))
        left = self.horizontal(F.pad(horizontal, (self.reach, 0)))
        new_vertical, new_horizontal = self.gated(above, left, conditions)
        return vertical + new_vertical, horizontal + new_horizontal

    def gated(self, above: Tensor, left: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks' new features from what their convolutions saw."""
        class_vertical, class_horizontal = self.class_bias(conditions)[:, :, None, None].chunk(2, dim=1)
        new_vertical = gate(above + class_vertical)
        new_horizontal = gate(left + self.vertical_to_horizontal(above) + class_horizontal)
        return new_vertical, self.dropout(self.output(new_horizontal))


class PixelCNNFirstGatedLayer(PixelCNNGatedLayer):
    """The layer that sees codes, none of them at its own position; its convolutions are table look-ups."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__(config, first=True)

    def forward(self, codes: Tensor, embedding: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        reach = self.reach
        above = self.vertical(codes, embedding, (reach, reach, reach, -1))
        left = self.horizontal(codes, embedding, (reach, -1, 0, 0))
        return self.gated(above, left, conditions)


class PixelCNNModel(PriorModel):
    """p(codes | label) = product over raster order of p(code | earlier codes, label).

    Examples:
        >>> import torch
        >>> from isic_vq import PixelCNNConfig, PixelCNNModel
        >>> config = PixelCNNConfig(num_codes=16, grid_size=4, hidden_size=8, num_layers=1, first_kernel_size=3)
        >>> model = PixelCNNModel(config).eval()
        >>> model(torch.zeros(2, 4, 4, dtype=torch.long)).logits.shape
        torch.Size([2, 16, 4, 4])
    """

    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig):
        super().__init__(config)
        size = config.hidden_size
        self.code_embedding = nn.Embedding(config.num_codes, size)
        self.position_embedding = nn.Parameter(torch.zeros(1, size, config.grid_size, config.grid_size))
        if config.architecture == "gated":
            others = [PixelCNNGatedLayer(config, first=False) for _ in range(config.num_layers)]
            self.layers = nn.ModuleList([PixelCNNFirstGatedLayer(config), *others])
        else:
            self.layers = nn.ModuleList(
                [PixelCNNPlainLayer(size, config, first=index == 0) for index in range(config.num_layers + 1)]
            )
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(size, config.head_size, 1),
            nn.ReLU(),
            nn.Conv2d(config.head_size, config.num_codes, 1),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Codes start apart; class biases start at zero, so that every class starts as "no class".
            init.normal_(module.weight) if module is self.code_embedding else init.zeros_(module.weight)
        elif isinstance(module, PixelCNNModel):
            init.zeros_(module.position_embedding)
        else:
            super()._init_weights(module)

    def predict(self, codes: Tensor, conditions: Tensor, context: Tensor | None) -> Tensor:
        first, *others = self.layers
        if self.config.architecture == "gated":
            every_code = torch.arange(self.config.num_codes, device=codes.device)
            vertical, hidden = first(codes, self.code_embedding(every_code), conditions)
            vertical, hidden = vertical + self.position_embedding, hidden + self.position_embedding
            for layer in others:
                vertical, hidden = layer(vertical, hidden, conditions)
        else:
            embedded = self.code_embedding(codes).permute(0, 3, 1, 2)
            hidden = first(embedded, conditions) + self.position_embedding
            for layer in others:
                hidden = layer(hidden, conditions)
        return self.head(hidden)

    def best_backend(self, num_blocks: int) -> str:
        return best_backend(self, num_blocks)

    def draw_codes(
        self,
        uniforms: Tensor,
        conditions: Tensor,
        sampling: Sampling,
        backend: str,
        on_step: Callable[[], None] | None,
        extend: Extend | None,
    ) -> Tensor:
        """Row by row; see `PriorModel.draw_codes`."""
        label_unrun(self.device.type, backend)
        grid, codes = self.config.grid_size, []
        rows_first = uniforms.to(self.device).view(-1, grid, grid).transpose(0, 1).contiguous()
        with exactly(self), open_rows(backend, open_cache(self, conditions), sampling) as rows:
            for row in range(grid):
                codes.append(rows.draw(row, rows_first[row]))
                if on_step is not None:
                    on_step()
            rows.check()
        return torch.stack(codes, dim=1)

    def walk(self, conditions: Tensor, extend: Extend | None = None) -> RasterWalk:
        """Begin images of the conditions `(B,)`; see `PriorModel.walk`."""
        return RasterWalk(self, conditions)
