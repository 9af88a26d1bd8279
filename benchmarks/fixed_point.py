"""Does exact parallel decoding pay? Passes until a guess agrees with its own draws, against cached sampling.

    python benchmarks/fixed_point.py

With the noise of every position drawn beforehand, a grid of codes is the one fixed point of "predict all positions
from the present guess, draw all of them again" (Wiggers and Hoogeboom, arXiv 2002.09928; Song et al., arXiv
2002.03629). Each pass makes at least one more position final. The report has, for the shipped checkpoint, the passes
that whole grids take, those that rows take one after the other (each a pass of the horizontal stack over a row), and
seconds beside those of the cached sampler. Results go to benchmarks/reports/fixed-point.json.
"""

import time
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from isic_vq.models.sampling import Sampling, image_generators, position_uniforms
from measure import one_cluster, write_report


def settle(prior: PixelCNNModel, codes: Tensor, uniforms: Tensor, rows: slice) -> int:
    """Draw the codes of some rows anew until they stay as they are; returns the passes it took."""
    passes = 0
    while True:
        logits = prior(codes, clusters=one_cluster(prior, len(codes))).logits.permute(0, 2, 3, 1)[:, rows]
        drawn = Sampling().draw(logits.flatten(0, 2), uniforms[:, rows].flatten()).view_as(codes[:, rows])
        passes += 1
        if torch.equal(drawn, codes[:, rows]):
            return passes
        codes[:, rows] = drawn


@torch.inference_mode()
def measure(prior: PixelCNNModel, batch: int) -> dict[str, Any]:
    """Passes and seconds of a batch of images."""
    grid = prior.config.grid_size
    flat = position_uniforms(image_generators(0, batch), grid * grid)
    uniforms = flat.view(batch, grid, grid)
    start = time.perf_counter()
    expected = prior.sample(flat, clusters=one_cluster(prior, batch))
    cached = time.perf_counter() - start
    codes = torch.zeros_like(expected)
    start = time.perf_counter()
    passes = settle(prior, codes, uniforms, slice(None))
    parallel = time.perf_counter() - start
    same = (codes == expected).float().mean().item()
    codes = torch.zeros_like(expected)
    by_row = [settle(prior, codes, uniforms, slice(row, row + 1)) for row in range(grid)]
    return {
        "batch": batch,
        "passes_of_the_whole_grid": passes,
        "share_of_positions": passes / grid**2,
        "passes_per_row": mean(by_row),
        "share_of_columns": mean(by_row) / grid,
        "codes_equal_to_cached_sampling": same,
        "seconds_of_whole_grid": parallel,
        "seconds_of_cached_sampling": cached,
        "cached_over_parallel": parallel / cached,
    }


def main() -> None:
    """Measure and write the report."""
    prior = load_model(IsicVQModel).prior
    rows = [measure(prior, batch) for batch in (1, 16)]
    for row in rows:
        print(row)
    write_report("fixed-point", {"checkpoint": "isic-vq-128", "seed": 0}, {"measured": rows})


if __name__ == "__main__":
    main()
