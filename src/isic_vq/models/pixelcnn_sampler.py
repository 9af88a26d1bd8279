"""Backends of exact incremental sampling from a PixelCNN, row by row; the loop is `PixelCNNModel.draw_codes`.

"eager" runs torch's own operations and works everywhere; "compiled" runs numba's kernels on a CPU; "cuda_graph"
replays a recorded row on a CUDA device (see `modes.RUN_ON`). All draw the same codes, up to rounding.
"""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .modes import was_run
from .pixelcnn_cache import Cache, GraphedRows, Rows, open_cache
from .sampling import Sampling

if TYPE_CHECKING:
    from .modeling_pixelcnn import PixelCNNModel

BACKENDS = ("eager", "compiled", "cuda_graph")

# Seconds by which one code and layer of a block of 16 images is cheaper compiled, and what loading and compiling the
# kernels takes: orders of magnitude, from benchmarks/sampling.py.
SAVED_PER_LAYER = 20e-6
LOADING, COMPILING = 0.6, 10.0


def best_backend(model: "PixelCNNModel", num_blocks: int) -> str:
    """Choose the backend that samples so many blocks of images in the least time, kernels' start included.

    Of those that were run on the kind of device; "eager", which is plain torch, where none was.
    """
    if was_run(model.device.type, "cuda_graph"):
        return "cuda_graph"
    has_numba = importlib.util.find_spec("numba") is not None
    if model.device.type != "cpu" or model.dtype != torch.float32 or not has_numba:
        return "eager"
    saved = num_blocks * model.config.grid_size**2 * len(model.layers) * SAVED_PER_LAYER
    if LOADING < saved <= COMPILING:
        from .pixelcnn_compiled import lie_on_disk

        return "compiled" if lie_on_disk() else "eager"
    return "compiled" if saved > COMPILING else "eager"


def open_rows(backend: str, cache: Cache, sampling: Sampling) -> Rows:
    """Return what draws rows of codes on a backend.

    Raises:
        ValueError: an unknown backend, or one that the model's device or precision rules out.
        ImportError: "compiled" without numba.
    """
    if backend == "eager":
        return Rows(cache, sampling)
    if backend == "cuda_graph":
        return GraphedRows(cache, sampling)
    if backend == "compiled":
        from .pixelcnn_compiled import CompiledRows

        return CompiledRows(cache, sampling)
    raise ValueError(f"backend is {backend!r}: expected one of {', '.join(BACKENDS)}")


class RasterWalk:
    """A `Walk` over the codes in raster order, each a group of its own, with a model in eval mode."""

    def __init__(self, model: "PixelCNNModel", conditions: Tensor):
        self.cache, self.grid = open_cache(model, conditions), model.config.grid_size
        starts = torch.arange(self.grid**2).view(self.grid, self.grid).tolist()
        self.steps: Sequence[Sequence[slice]] = [[slice(start, start + 1) for start in row] for row in starts]

    def logits(self, group: slice) -> Tensor:
        row, column = divmod(group.start, self.grid)
        if column == 0:
            self.cache.start_row(row)
        return self.cache.logits(column)[:, None]

    def put(self, group: slice, codes: Tensor) -> None:
        self.cache.put(group.start % self.grid, codes[:, 0])

    def reorder(self, ancestors: Tensor) -> None:
        self.cache.reorder(ancestors)
