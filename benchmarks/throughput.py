"""How fast the quantizer, the shipped tokenizer and a training step are, as ratios to other quantizers.

    PYTHONPATH=build/peers python benchmarks/throughput.py    # needs two libraries, see benchmarks/README.md
    PYTHONPATH=build/peers python benchmarks/throughput.py --check    # only check that contestants compute the same

Three sections, each with contestants that take turns as measure.py has it:

- quantizer: 32 x 1024 latents of 64 channels, K = 512, in train mode, with and without the backward pass. The latents
  ask for a gradient, as an encoder's do. Codebooks are moving averages (decay 0.99) but for diffusers', which only
  gathers a gradient. Each library gets its natural layout: tokens (32, 1024, 64) for vector-quantize-pytorch, contiguous
  (32, 64, 32, 32) for diffusers. The plain step (scores of all latents at once, argmin, index_add) and the package get
  (32, 64, 32, 32) channels-last, which is what the package's trainer holds and the same memory as tokens; the package
  also contiguous.
- tokenizer: encoding and decoding with model_cards/isic-vq-128, as loaded.
- training: an optimizer step of the f8 and of the f4 tokenizer (256 and 1024 latents per image) around each quantizer.

`peak_bytes` is what a step held at once beyond what was there before it. Results go to
benchmarks/reports/throughput.json. Where there is a CUDA device everything is measured there too, waiting for it after
every step.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import (
    DiffusersQuantizer,
    MinimalQuantizer,
    MinimalVQVAE,
    PackageQuantizer,
    VectorQuantizePytorch,
    start_codebook,
)
from torch import Tensor, nn

from isic_vq.evaluation.report import environment
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.modeling_vqvae import VQVAEModel
from measure import Contestant, compare, peak_bytes, print_figures, training_contestant, waited, write_report

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "isic-vq-128"
NUM_IMAGES, GRID, CODE_DIM, NUM_CODES = 32, 32, 64, 512
BATCH_SIZES = (1, 16, 64)
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format

OURS, OURS_CONTIGUOUS, PLAIN = "isic_vq", "isic_vq, contiguous", "plain step"
LIBRARY, LIBRARY_STRAIGHT = "vector-quantize-pytorch", "vector-quantize-pytorch, no rotation trick"
DIFFUSERS = "diffusers"
PEERS = (PLAIN, LIBRARY, LIBRARY_STRAIGHT, DIFFUSERS)
FORWARD, BOTH = "forward", "forward and backward"

Section = tuple[dict[str, Contestant], dict[str, tuple[str, str]]]  # contestants and figures by name


def quantizers(model: VQVAEModel) -> dict[str, nn.Module]:
    """Every quantizer in train mode, with the codebook and the settings of the model's."""
    config, ours = model.config, deepcopy(model.quantizer)
    start = ours.codebook, ours.cluster_size, config.ema_decay
    modules = {
        OURS: PackageQuantizer(ours),
        PLAIN: MinimalQuantizer(*start),
        LIBRARY: VectorQuantizePytorch(*start),
        LIBRARY_STRAIGHT: VectorQuantizePytorch(*start, rotation_trick=False),
        DIFFUSERS: DiffusersQuantizer(ours.codebook, config.beta),
    }
    return {name: module.to(ours.codebook.device).train() for name, module in modules.items()}


def check(modules: dict[str, nn.Module], latents: Tensor) -> None:
    """Assert that all quantizers choose the same vectors; rounding may part a few latents between two codes."""
    expected, _ = deepcopy(modules[OURS])(latents)
    for name in PEERS:
        quantized, _ = deepcopy(modules[name])(latents)
        share = ((quantized - expected).abs().amax(1) > 1e-4).float().mean().item()
        assert share < 1e-3, f"{name} quantizes {share:.1%} of the latents otherwise"
        print(f"{name}: {share:.2%} of the latents are quantized otherwise")


def quantizer_section(device: str) -> Section:
    """Quantizers alone."""
    latents = torch.randn(NUM_IMAGES, CODE_DIM, GRID, GRID, device=device)
    gradient = torch.randn_like(latents)
    model = VQVAEModel(VQVAEConfig(code_dim=CODE_DIM, num_codes=NUM_CODES)).to(device)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, CODE_DIM)
    share = torch.full((NUM_CODES,), len(rows) / NUM_CODES, device=device)
    model.quantizer.start_from(rows[torch.randperm(len(rows), device=device)[:NUM_CODES]], share)
    modules = quantizers(model)
    check(modules, latents)
    modules[OURS_CONTIGUOUS] = deepcopy(modules[OURS])

    def contestants(name: str) -> dict[str, Contestant]:
        layout = CONTIGUOUS if name in (OURS_CONTIGUOUS, DIFFUSERS) else CHANNELS_LAST
        own = latents.clone(memory_format=layout).requires_grad_()
        incoming = gradient.contiguous(memory_format=layout), torch.ones((), device=device)
        module = modules[name]

        def both() -> None:
            own.grad = None
            module.zero_grad(set_to_none=True)
            torch.autograd.backward(module(own), incoming)

        steps = {FORWARD: waited(partial(module, own), device), BOTH: waited(both, device)}
        return {
            f"{name}, {kind}": Contestant(step, NUM_IMAGES, facts={"peak_bytes": peak_bytes(step, device)})
            for kind, step in steps.items()
        }

    pairs = [(peer, OURS) for peer in PEERS] + [(PLAIN, OURS_CONTIGUOUS), (DIFFUSERS, OURS_CONTIGUOUS)]
    figures = {
        f"{kind}: throughput of {ours} over {peer}": (f"{peer}, {kind}", f"{ours}, {kind}")
        for kind in (FORWARD, BOTH)
        for peer, ours in pairs
    }
    return {key: value for name in modules for key, value in contestants(name).items()}, figures


def tokenizer_section(device: str) -> Section:
    """The shipped tokenizer."""
    model = VQVAEModel.from_pretrained(CHECKPOINT).to(device)
    contestants = {}
    for size in BATCH_SIZES:
        pixel_values = torch.rand(size, 3, model.config.image_size, model.config.image_size, device=device)
        codes = model.encode(pixel_values)
        steps = {
            "encode": waited(partial(model.encode, pixel_values), device),
            "decode": waited(partial(model.decode, codes), device),
        }
        for name, step in steps.items():
            facts = {"peak_bytes": peak_bytes(step, device)}
            contestants[f"{name}, batch of {size}"] = Contestant(step, size, facts=facts)
    return contestants, {}


def training_section(preset: str, device: str) -> Section:
    """Training steps of one encoder and decoder around each quantizer."""
    model = VQVAEModel(VQVAEConfig.from_preset(preset)).to(device)
    pixel_values = torch.rand(NUM_IMAGES, 3, model.config.image_size, model.config.image_size, device=device)
    start_codebook(model, pixel_values)
    batch = pixel_values.contiguous(memory_format=CHANNELS_LAST)
    contestants = {}
    for name, quantizer in quantizers(model).items():
        # diffusers' loss holds beta already
        beta = 1.0 if name == DIFFUSERS else model.config.beta
        whole = MinimalVQVAE(deepcopy(model.encoder), deepcopy(model.decoder), quantizer, beta)
        whole = whole.to(memory_format=CHANNELS_LAST)
        contestant = training_contestant(whole, partial(whole, batch), NUM_IMAGES, "fp32")
        contestant.step = waited(contestant.step, device)
        contestant.facts["peak_bytes"] = peak_bytes(contestant.step, device)
        contestants[name] = contestant
    return contestants, {f"throughput of {OURS} over {peer}": (peer, OURS) for peer in PEERS}


SECTIONS: dict[str, Callable[[str], Section]] = {
    "quantizer": quantizer_section,
    "tokenizer": tokenizer_section,
    "training f8": partial(training_section, "f8"),
    "training f4": partial(training_section, "f4"),
}


def print_contestants(rows: dict[str, Any]) -> None:
    """Print throughput and memory of every contestant of `compare`."""
    for name, row in rows["contestants"].items():
        peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        print(f"{row['images_per_second']:8.1f} images/s  {peak:>5} MiB  {name}")


def main() -> None:
    """Measure every section on every device and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="samples of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before its first sample")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument(
        "--check", action="store_true", help="check that contestants compute the same, and stop"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.check:
        quantizer_section("cpu")
        return
    rows: dict[str, Any] = {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        rows[device] = {"device": environment(device)["device"]}
        for name, section in SECTIONS.items():
            print(f"{device}: {name}")
            rows[device][name] = compare(*section(device), args.rounds, args.warmup)
            print_contestants(rows[device][name])
            print_figures(rows[device][name])
    settings = {"rounds": args.rounds, "threads": args.threads}
    settings |= {name: metadata.version(name) for name in ("vector-quantize-pytorch", "diffusers")}
    write_report("throughput", settings, rows)


if __name__ == "__main__":
    main()
