"""What it costs to refuse numbers that are not finite, as a share of the time that images take.

    python benchmarks/finite_checks.py
    python benchmarks/finite_checks.py --rounds 5

Each way to make or read a block of 16 images takes turns with its checks alone, on tensors of the same shapes and as
often as it runs them. The models are model_cards/isic-vq-128 and isic-vq-128-var. Results go to
benchmarks/reports/finite-checks.json.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import torch

from isic_vq import IsicVQModel
from isic_vq.models.checks import check_finite
from isic_vq.models.pixelcnn_compiled import FLOAT32_MAX, lie_within
from measure import Contestant, compare, print_figures, write_report

MODELS = Path(__file__).resolve().parents[1] / "model_cards"
BATCH = 16


def sums(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    """What `Sampling.draw` and `check` do to logits of these shapes."""
    logits = [torch.randn(shape) for shape in shapes]

    def step() -> None:
        total = torch.zeros((), dtype=torch.float64)
        for part in logits:
            total += part.sum(dtype=torch.float64)
        total.item()

    return step


@numba.njit
def kernel_checks(values: Any, number: int) -> int:
    """The compiled backend's check, so many times."""
    passed = 0
    for index in range(number):
        values[index % len(values)] += 1e-9  # or the loop would be run once
        passed += lie_within(values, FLOAT32_MAX)
    return passed


def check_all(tensors: list[torch.Tensor]) -> None:
    """`check_finite` of each."""
    for tensor in tensors:
        check_finite(tensor, "numbers", "none")


def contestants() -> dict[str, Contestant]:
    """Every way, and its checks."""
    pixels = torch.rand(BATCH, 3, 128, 128)
    models = {name: IsicVQModel.from_pretrained(MODELS / name) for name in ("isic-vq-128", "isic-vq-128-var")}
    raster, var = models.values()
    vqvae, num_codes = raster.config.vqvae_config, raster.config.vqvae_config.num_codes
    latents = torch.randn(BATCH, vqvae.code_dim, vqvae.sides[-1], vqvae.sides[-1])
    of_decode = partial(check_all, [latents, pixels])
    codes = raster.encode(pixels)
    values = torch.randn(num_codes, dtype=torch.float64).numpy()
    per_code = sums([(BATCH, num_codes)] * raster.prior.config.num_positions)
    per_scale = sums([(BATCH, size, num_codes) for size in var.prior.config.sizes])
    in_kernels = partial(kernel_checks, values, BATCH * raster.prior.config.num_positions)
    logits = raster.predict(codes)

    def together(*steps: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [step() for step in steps]

    ways = {
        "generate, eager": (
            partial(raster.generate, BATCH, seed=0, backend="eager"),
            together(per_code, of_decode),
        ),
        "generate, compiled": (
            partial(raster.generate, BATCH, seed=0, backend="compiled"),
            together(in_kernels, of_decode),
        ),
        "generate, VAR": (partial(var.generate, BATCH, seed=0), together(per_scale, of_decode)),
        "encode": (partial(raster.encode, pixels), partial(check_all, [pixels, latents])),
        "decode": (partial(raster.decode, codes), of_decode),
        "score": (partial(raster.score, pixels), partial(check_all, [pixels, latents, logits])),
    }
    return {
        name: Contestant(step, BATCH)
        for way, steps in ways.items()
        for name, step in zip((way, f"checks of {way}"), steps, strict=True)
    }


def main() -> None:
    """Compare, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        entered = contestants()
        ways = [name for name in entered if not name.startswith("checks of ")]
        figures = {f"checks over {way}": (f"checks of {way}", way) for way in ways}
        rows = compare(entered, figures, arguments.rounds, warmup=2)
    print_figures(rows)
    write_report("finite-checks", {"batch": BATCH, "threads": 1, "rounds": arguments.rounds}, rows)


if __name__ == "__main__":
    main()
