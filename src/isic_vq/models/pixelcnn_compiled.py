"""Kernels that sample one row of codes, compiled by numba: the fast way on a CPU, above all for few images.

They do the horizontal steps of `pixelcnn_cache` with the same folded weights, without the cost of calling torch
for every small product. Products are written for vector units: four images and four inputs at a time, every output
summed in the same order whatever the number of images, so that an image does not depend on those beside it. Kernels
hold no lock: threads take images each, which needs no threading layer of numba's.

numba is optional. Its first call compiles (seconds), later processes load the result from disk.
"""

import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pixelcnn_cache import GatedCache, PlainCache, Rows
from .sampling import Sampling

try:
    import numba
    from numba.core import types
    from numba.extending import overload
except ImportError as error:
    raise ImportError(
        "compiled sampling needs numba: pip install numba, or choose backend='eager'"
    ) from error

logger = logging.getLogger(__name__)

NOT_FINITE = -1  # what is drawn from logits of which one is NaN or infinite
FLOAT32_MAX, FLOAT64_MAX = (float(np.finfo(dtype).max) for dtype in (np.float32, np.float64))
TILE = 4  # images whose products share a load of the weights

# Sums stay in the order they are written in; a product and a sum may be rounded once instead of twice.
FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}


def compiled(function: Callable) -> Any:
    """numba.njit with a cache on disk, if there is a folder that can be written to."""
    try:
        return numba.njit(cache=True, **FLAGS)(function)
    except RuntimeError as error:
        logger.warning("every process compiles the kernels again: %s", error)
        return numba.njit(**FLAGS)(function)


def lie_on_disk() -> bool:
    """Whether an earlier process has compiled the kernels here."""
    return any(Path(gated_row.stats.cache_path or "").glob(f"{__name__.rpartition('.')[2]}.*_row-*.nbi"))


def tanh(x: float) -> float:
    """tanh, which LLVM turns into vector instructions for float32 only as a rational function."""
    return math.tanh(x)


@overload(tanh, jit_options=FLAGS)
def _overload_tanh(x):
    """x P(x^2) / Q(x^2), fitted to tanh in float64: off by at most 3.5e-7 in float32, as far as 1."""
    if x != types.float32:
        return lambda x: math.tanh(x)
    limit = np.float32(9.02)
    p = (0.9999999790678767, 0.13379722740627845, 0.003494040047383633, 2.0583563866058703e-05)
    q = (1.0, 0.4671303799612609, 0.02587109461400176, 0.0003283101473588974, 7.762063574039639e-07)
    p0, p1, p2, p3, p4 = map(np.float32, (*p, 1.3319172885930171e-08))
    q0, q1, q2, q3, q4 = map(np.float32, q)

    def rational(x):
        x = min(max(x, -limit), limit)
        z = x * x
        above = x * (p0 + z * (p1 + z * (p2 + z * (p3 + z * p4))))
        return above / (q0 + z * (q1 + z * (q2 + z * (q3 + z * q4))))

    return rational


@compiled
def add_product(out, x, weight):
    """out += x @ weight, `(M, N)`, `(M, K)` and `(K, N)`; rows are contiguous."""
    num_rows, size = x.shape
    num_columns = weight.shape[1]
    fours = num_rows // 4 * 4
    for m in range(0, fours, 4):
        o0, o1, o2, o3 = out[m], out[m + 1], out[m + 2], out[m + 3]
        a, b, c, d = x[m], x[m + 1], x[m + 2], x[m + 3]
        for k in range(0, size // 4 * 4, 4):
            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            c0, c1, c2, c3 = c[k], c[k + 1], c[k + 2], c[k + 3]
            d0, d1, d2, d3 = d[k], d[k + 1], d[k + 2], d[k + 3]
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            for n in range(num_columns):
                v0, v1, v2, v3 = w0[n], w1[n], w2[n], w3[n]
                o0[n] = o0[n] + a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                o1[n] = o1[n] + b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                o2[n] = o2[n] + c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                o3[n] = o3[n] + d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
        for k in range(size // 4 * 4, size):
            w0 = weight[k]
            for n in range(num_columns):
                o0[n] += a[k] * w0[n]
                o1[n] += b[k] * w0[n]
                o2[n] += c[k] * w0[n]
                o3[n] += d[k] * w0[n]
    for m in range(fours, num_rows):
        o0, a = out[m], x[m]
        for k in range(0, size // 4 * 4, 4):
            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
            w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
            for n in range(num_columns):
                o0[n] = o0[n] + a0 * w0[n] + a1 * w1[n] + a2 * w2[n] + a3 * w3[n]
        for k in range(size // 4 * 4, size):
            w0 = weight[k]
            for n in range(num_columns):
                o0[n] += a[k] * w0[n]


@compiled
def move_on(window, hidden):
    """Drop the oldest inputs of a window `(M, taps * C)` and append the newest, `(M, C)`."""
    size = hidden.shape[1]
    kept = window.shape[1] - size
    for m in range(len(window)):
        row = window[m]
        for c in range(kept):
            row[c] = row[c + size]
        for c in range(size):
            row[kept + c] = hidden[m, c]


@compiled
def head_logits(logits, hidden, head):
    """logits = second(relu(first(relu(hidden)))) for rows of features."""
    first_bias, first, second_bias, second = head
    inner = np.empty((len(hidden), len(first_bias)), hidden.dtype)
    rectify(hidden)
    for m in range(len(hidden)):
        inner[m] = first_bias
        logits[m] = second_bias
    add_product(inner, hidden, first)
    rectify(inner)
    add_product(logits, inner, second)


@compiled
def rectify(features):
    """ReLU in place."""
    for row in features:
        for c in range(len(row)):
            row[c] = max(row[c], 0)


@compiled
def gate(out, features):
    """out = tanh(first half of the channels) (1 + tanh(second half)): twice eq. 2, which the weights allow for."""
    size = out.shape[1]
    for m in range(len(out)):
        row = features[m]
        for c in range(size):
            signal = tanh(row[c])
            out[m, c] = signal + signal * tanh(row[size + c])


@compiled
def gated_logits(column, images, before, net, windows, logits):
    """Compute logits `(M, K)` at a column of the images `(M,)`, and move `windows` `(layers, M, taps * C)` on to it."""
    position, row_kernels, outputs, offset, head = net
    num_layers, num_rows, _ = windows.shape
    size = position.shape[1]
    features = np.empty((num_rows, 2 * size), before.dtype)
    gated = np.empty((num_rows, size), before.dtype)
    hidden = np.empty((num_rows, size), before.dtype)
    for m in range(num_rows):
        hidden[m] = position[column]
    for layer in range(num_layers):
        for m in range(num_rows):
            features[m] = before[layer, column, images[m]]
        if layer:
            add_product(features, windows[layer - 1], row_kernels[layer - 1])
        gate(gated, features)
        add_product(hidden, gated, outputs[layer])
        move_on(windows[layer], hidden)
    for m in range(num_rows):
        hidden[m] += offset
    head_logits(logits, hidden, head)


@compiled
def plain_logits(column, images, before, net, windows, logits):
    """Do as `gated_logits` for the plain network; `row` takes the inputs of layers 1 and up at the column."""
    position, row_kernels, row, head = net
    num_layers, num_rows, _ = windows.shape
    size = position.shape[1]
    features = np.empty((num_rows, size), before.dtype)
    hidden = np.empty((num_rows, size), before.dtype)
    for m in range(num_rows):
        hidden[m] = position[column]
    for layer in range(num_layers):
        for m in range(num_rows):
            features[m] = before[layer, column, images[m]]
        if layer:
            add_product(features, windows[layer - 1], row_kernels[layer - 1])
        for m in range(num_rows):
            for c in range(size):
                hidden[m, c] += max(features[m, c], 0)
            if layer < num_layers - 1:
                row[layer, column, images[m]] = hidden[m]
        move_on(windows[layer], hidden)
    head_logits(logits, hidden, head)


@compiled
def lie_within(values, limit):
    """Whether no value is NaN or further from 0 than the limit."""
    beyond = 0
    for k in range(len(values)):
        beyond |= not abs(values[k]) <= limit
    return beyond == 0


@compiled
def draw_code(logits, unlabelled, guidance_scale, temperature, uniform):
    """`Sampling.draw` without top-k and top-p, of one code; `unlabelled` counts if the guidance scale is not 1.

    `NOT_FINITE` where a logit is not, or would not be in the precision of the others.
    """
    limit = FLOAT32_MAX if logits.itemsize == 4 else FLOAT64_MAX
    cumulative = np.empty(len(logits), np.float64)
    for k in range(len(logits)):
        logit = logits[k]
        if guidance_scale != 1:
            logit = unlabelled[k] + guidance_scale * (logit - unlabelled[k])
        cumulative[k] = logit / temperature
    if not lie_within(cumulative, limit):
        return NOT_FINITE
    largest, total = cumulative.max(), 0.0
    for k in range(len(logits)):
        total += math.exp(cumulative[k] - largest)
        cumulative[k] = total
    return min(np.searchsorted(cumulative, uniform * total, side="right"), len(logits) - 1)


@compiled
def draw_column(
    column, images, before, logits, num_draws, tables_left, uniforms, codes, guidance_scale, temperature
):
    """Draw the codes of a column, and add what they mean to the columns on their right to layer 0."""
    for m in range(num_draws):
        unlabelled = logits[(m + num_draws) % len(images)]
        code = draw_code(logits[m], unlabelled, guidance_scale, temperature, uniforms[images[m], column])
        codes[images[m], column] = code
        for copy in range(m, len(images), num_draws):
            for distance in range(1, min(len(tables_left), before.shape[1] - 1 - column) + 1):
                before[0, column + distance, images[copy]] += tables_left[distance - 1, code]


@compiled
def gated_row(images, before, net, windows, logits, *drawing):
    """Draw a row of codes for the images `(M,)`; `drawing` are the other arguments of `draw_column`."""
    for column in range(before.shape[1]):
        gated_logits(column, images, before, net, windows, logits)
        draw_column(column, images, before, logits, *drawing)


@compiled
def plain_row(images, before, net, windows, logits, *drawing):
    """Do as `gated_row` for the plain network."""
    for column in range(before.shape[1]):
        plain_logits(column, images, before, net, windows, logits)
        draw_column(column, images, before, logits, *drawing)


@dataclass
class Share:
    """A thread's part of a batch."""

    images: np.ndarray  # `(M,)`, which images; when guided the labelled ones, then the same without a label
    # `(layers, M, taps * C)`, the inputs of layers 1 and up that their kernels see of the row.
    windows: np.ndarray
    logits: np.ndarray  # `(M, K)`, of the present column


class CompiledRows(Rows):
    """Draws rows of codes with compiled kernels, on as many threads as torch uses; needs float32 or float64 on a CPU.

    With top-k or top-p torch draws the codes, column by column.
    """

    def __init__(self, cache: GatedCache | PlainCache, sampling: Sampling):
        if cache.before.device.type != "cpu" or cache.before.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the model is in {cache.before.dtype} on {cache.before.device}: compiled sampling takes float32 or "
                "float64 on a CPU; choose backend='eager'"
            )
        super().__init__(cache, sampling)
        self.before, self.tables_left = cache.before.numpy(), cache.tables_left.numpy()
        row_kernels = np.empty(
            (len(cache.row_kernels), cache.windows.shape[2], cache.width), self.before.dtype
        )
        for number, matrix in enumerate(cache.row_kernels):
            row_kernels[number] = matrix.numpy()
        head = tuple(part.detach().numpy() for layer in cache.head for part in layer)
        self.net: tuple
        if isinstance(cache, GatedCache):
            self.row_kernel, self.logits_kernel = gated_row, gated_logits
            outputs = np.stack([matrix.numpy() for matrix in cache.outputs])
            self.net = (cache.position_row.numpy(), row_kernels, outputs, cache.offset.numpy(), head)
        else:
            self.row_kernel, self.logits_kernel = plain_row, plain_logits
            self.net = (cache.position_row.numpy(), row_kernels, cache.row.numpy(), head)
        num_draws = cache.batch // 2 if sampling.guided else cache.batch
        num_shares = min(torch.get_num_threads(), -(-num_draws // TILE))
        edges = [num_draws * share // num_shares for share in range(num_shares + 1)]
        self.shares = [self._share(np.arange(first, last)) for first, last in itertools.pairwise(edges)]
        self.threads = ThreadPoolExecutor(num_shares)

    def __exit__(self, *exception: object) -> None:
        self.threads.shutdown()

    def start_row(self, row: int) -> None:
        super().start_row(row)
        for share in self.shares:
            share.windows.fill(0)

    def logits(self, column: int) -> Tensor:
        logits = np.empty((self.cache.batch, self.cache.model.config.num_codes), self.before.dtype)

        def work(share: Share) -> None:
            self.logits_kernel(column, share.images, self.before, self.net, share.windows, share.logits)
            logits[share.images] = share.logits

        list(self.threads.map(work, self.shares))
        return torch.from_numpy(logits)

    def draw_columns(self, uniforms: Tensor) -> Tensor:
        if self.sampling.top_k is not None or self.sampling.top_p is not None:
            return super().draw_columns(uniforms)
        codes = torch.empty(uniforms.shape, dtype=torch.long)
        noise, drawn = uniforms.numpy(), codes.numpy()
        scale = 1 + float(self.guidance_share) * (self.sampling.guidance_scale - 1)
        settings = scale, float(self.sampling.temperature)

        def work(share: Share) -> None:
            num_draws = len(share.images) // 2 if self.sampling.guided else len(share.images)
            grids = share.images, self.before, self.net, share.windows, share.logits
            self.row_kernel(*grids, num_draws, self.tables_left, noise, drawn, *settings)

        list(self.threads.map(work, self.shares))
        self.sampling.check(bool((codes != NOT_FINITE).all()))  # the next row would look it up
        self.cache.codes.copy_(self.sampling.both(codes))
        return codes

    def _share(self, images: np.ndarray) -> Share:
        if self.sampling.guided:
            images = np.concatenate([images, images + self.cache.batch // 2])
        layers, _, taps = self.cache.windows.shape
        num_codes, dtype = self.cache.model.config.num_codes, self.before.dtype
        windows = np.zeros((layers, len(images), taps), dtype)
        return Share(images, windows, np.empty((len(images), num_codes), dtype))
