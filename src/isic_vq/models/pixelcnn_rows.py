"""Drawing rows of codes from what a cache knows, with torch's own operations.

`Rows` runs them one by one; `GraphedRows` records those of a row once and replays the recording.
"""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .pixelcnn_cache import GatedCache, PlainCache
from .sampling import Sampling


class Rows(AbstractContextManager):
    """Draws rows of codes with torch's own operations: on any device, in any precision."""

    def __init__(self, cache: GatedCache | PlainCache, sampling: Sampling):
        self.cache, self.sampling = cache, sampling
        # All logits that codes were drawn from, added up.
        self.total = torch.zeros((), dtype=torch.float64, device=cache.before.device)
        self.guidance_share: float | Tensor = 1.0  # of the present row

    def __exit__(self, *exception: object) -> None:
        """Nothing to let go of."""

    def draw(self, row: int, uniforms: Tensor) -> Tensor:
        """Codes `(B, columns)` of a row, from uniforms of that shape; rows are drawn in order."""
        self.guidance_share = self.share_of(row)
        self.start_row(row)
        return self.draw_columns(uniforms)

    def share_of(self, row: int) -> float:
        """How much of the guidance a row takes."""
        return self.sampling.guidance_share(row / max(self.cache.grid - 1, 1))

    def start_row(self, row: int) -> None:
        """Take in the rows above."""
        self.cache.start_row(row)

    def logits(self, column: int) -> Tensor:
        """Logits of the next code of the row, `(B, K)` or, when guided, `(2B, K)`."""
        return self.cache.logits(column)

    def draw_columns(self, uniforms: Tensor) -> Tensor:
        """As `draw`, of the row that is started."""
        codes = []
        for column, noise in enumerate(uniforms.unbind(1)):
            codes.append(self.sampling.draw(self.logits(column), noise, self.guidance_share, self.total))
            self.cache.put(column, self.sampling.both(codes[-1]))
        return torch.stack(codes, dim=1)

    def check(self) -> None:
        """Raise ValueError if a code was drawn from logits that are not finite."""
        self.sampling.check(math.isfinite(self.total.item()))


class GraphedRows(Rows):
    """Draws rows of codes by replaying one CUDA graph, which costs one launch where a row has thousands.

    Raises:
        ValueError: a cache that is not on a CUDA device.
    """

    def __init__(self, cache: GatedCache | PlainCache, sampling: Sampling):
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
            if self.sampling.guidance_power is not None:  # another number in each row, read from its place
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
