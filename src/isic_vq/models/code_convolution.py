"""Convolutions over embedded codes as sums of table rows.

What a tap of a kernel adds depends on one code alone, so a table with a row for every tap and code, computed once,
replaces the product of the same vectors with the same weights at every position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def code_tables(embedding: Tensor, weight: Tensor) -> Tensor:
    """Tabulate what each code, of vectors `(K, C)`, adds at each tap of a kernel `(C_out, C, height, width)`.

    Returns:
        `(height * width, K + 1, C_out)`; the code K, "outside the grid", adds nothing.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        tables = torch.einsum("kc,ocij->ijko", embedding, weight)
        return F.pad(tables, (0, 0, 0, 1)).flatten(0, 1)


def sum_taps(tables: Tensor, codes: Tensor) -> Tensor:
    """Add up the rows of windows of codes `(N, taps)`, in [0, K], to `(N, C_out)`."""
    taps = torch.arange(len(tables), device=codes.device)
    return F.embedding_bag(codes + taps * tables.shape[1], tables.flatten(0, 1), mode="sum")


class CodeConv2d(nn.Conv2d):
    """A convolution, of stride 1, of embedded codes."""

    def forward(  # type: ignore[override]
        self, codes: Tensor, embedding: Tensor, padding: tuple[int, int, int, int]
    ) -> Tensor:
        """conv(pad(embedded codes)) by look-ups, of codes `(B, h, w)` with vectors `(K, C)`.

        Padding is left, right, top, bottom; negative crops. The result `(B, C_out, h', w')` lies channels last in memory.
        """
        height, width = self.kernel_size
        tables = code_tables(embedding, self.weight)
        padded = F.pad(codes, padding, value=len(embedding))
        windows = padded.unfold(1, height, 1).unfold(2, width, 1).flatten(3)
        sums = sum_taps(tables, windows.flatten(0, 2)) + self.bias
        return sums.view(*windows.shape[:3], -1).permute(0, 3, 1, 2)
