"""How fast codes are sampled, as ratios to samplers that run the whole network for every code.

    python benchmarks/sampling.py           # needs pythae, see benchmarks/README.md
    python benchmarks/sampling.py --grids 32 --batches 1 16 --rounds 5

The network is a gated PixelCNN of 15 layers and 64 channels with a 512-wide head over 512 codes, random weights. The
baseline is the same function with full, masked kernels and one forward pass per position under no_grad; its passes
and those of pythae's sampler all take equally long, so a few are timed and multiplied by the number of positions.
Contestants take turns as measure.py has it. Apart from that the report has the floating-point operations spent, the
machine's matrix rate, peak memory (each contestant in a process of its own) and what the compiled backend takes to
start. On a machine with a CUDA device a second part runs there. Results go to benchmarks/reports/sampling.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import full_tap_pixelcnn, pythae_pixelcnn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from isic_vq.models.pixelcnn_cache import open_cache
from measure import Contestant, compare, print_figures, waited, write_report

NUM_CODES, NUM_LAYERS = 512, 15
BASELINE, PYTHAE, FORWARD = "full taps, a pass per position", "pythae's sampler", "one full forward"
EAGER, COMPILED, GRAPH, GRAPH_BF16 = "eager", "compiled", "cuda_graph", "cuda_graph, bfloat16"


def network(grid: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PixelCNNModel:
    """The network that is sampled from."""
    torch.manual_seed(0)
    config = PixelCNNConfig(
        num_codes=NUM_CODES,
        grid_size=grid,
        hidden_size=64,
        num_layers=NUM_LAYERS - 1,
        kernel_size=3,
        first_kernel_size=7,
        head_size=512,
    )
    return PixelCNNModel(config).eval().to(device, dtype)


def contestants(grid: int, batch: int, names: list[str], device: str = "cpu") -> dict[str, Contestant]:
    """Ways to sample a batch of grids."""
    model = network(grid, device)
    uniforms = torch.rand(batch, grid * grid, dtype=torch.float64)
    codes = torch.randint(NUM_CODES, (batch, grid, grid), device=device)

    def contestant(name: str) -> Contestant:
        if name == BASELINE:
            step = partial(torch.no_grad()(full_tap_pixelcnn(model)), codes)
            return Contestant(waited(step, device), batch, grid * grid)
        if name == PYTHAE:
            peer = pythae_pixelcnn(NUM_CODES, NUM_LAYERS).eval().to(device)
            return Contestant(
                waited(partial(pythae_draw, peer, codes[:, None].float()), device), batch, grid * grid
            )
        if name == FORWARD:
            return Contestant(waited(partial(torch.no_grad()(model), codes), device), batch)
        if name == GRAPH_BF16:
            half = network(grid, device, torch.bfloat16)
            return Contestant(waited(partial(half.sample, uniforms, backend=GRAPH), device), batch)
        return Contestant(waited(partial(model.sample, uniforms, backend=name), device), batch)

    return {name: contestant(name) for name in names}


@torch.no_grad()
def pythae_draw(model: torch.nn.Module, grids: Tensor) -> None:
    """What pythae's sampler does at a position."""
    out = model({"data": grids}).out.squeeze(2)
    probabilities = torch.softmax(out[:, :, 1, 1], dim=-1)
    grids[:, :, 1, 1] = torch.multinomial(probabilities, 1).float()


def race(
    grid: int, batch: int, names: list[str], rounds: int, ceilings: dict[str, float], device: str = "cpu"
) -> dict[str, Any]:
    """Compare contestants on one grid and batch size, samplers with the machine's ceilings, too."""
    print(f"{grid} x {grid} codes, batch {batch}, {device}")
    figures = {f"{name} over {BASELINE}": (BASELINE, name) for name in names if name != BASELINE}
    if COMPILED in names:
        figures[f"{COMPILED} over {EAGER}"] = (EAGER, COMPILED)
    rows = compare(contestants(grid, batch, names, device), figures, rounds, warmup=1)
    spent = {"gflops_per_second": operations(grid)[EAGER] * batch, "gigabytes_per_second": weights_read(grid)}
    for name, row in rows["contestants"].items():
        seconds = row["seconds_per_step"]["median"]
        row["seconds_per_image"] = seconds / batch
        if name in (EAGER, COMPILED, GRAPH):
            row["share_of"] = {what: spent[what] / seconds / rate for what, rate in ceilings.items()}
    print_figures(rows)
    print({name: f"{row['seconds_per_image']:.4f} s/image" for name, row in rows["contestants"].items()})
    return {"grid": grid, "batch": batch, "device": device, **rows}


def operations(grid: int) -> dict[str, float]:
    """Floating-point operations per image, in 1e9; table look-ups count nothing."""
    spent = {}
    for name, parts in ((BASELINE, grid * grid), (EAGER, 1)):
        step = contestants(grid, 1, [name])[name].step
        with FlopCounterMode(display=False) as counter:
            step()
        spent[name] = counter.get_total_flops() * parts / 1e9
    return spent


@torch.no_grad()
def weights_read(grid: int) -> float:
    """What the steps of one batch read of weights if nothing stays in a cache, in 1e9 bytes."""
    cache = open_cache(network(grid), torch.tensor([0]))
    weights = [*cache.row_kernels, *cache.outputs, *(part for layer in cache.head for part in layer)]
    return sum(weight.nbytes for weight in weights) * grid**2 / 1e9


def matrix_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Best rate of a square matrix product, in 1e9 operations per second."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        (a @ b).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def memory_bandwidth() -> float:
    """Rate of a copy on the CUDA device, in 1e9 bytes per second, reads and writes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds) / 1e9


def peak_memory(grid: int, batch: int, names: list[str]) -> dict[str, float]:
    """Peak resident memory in MiB of a process that runs one step of a contestant, and of one that runs none."""
    script = (
        "import sys, sampling; sampling.print_peak_memory(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    )

    def peak(name: str) -> float:
        command = [sys.executable, "-c", script, str(grid), str(batch), name]
        done = subprocess.run(
            command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    return {name: peak(name) for name in ["nothing", *names]}


def print_peak_memory(grid: int, batch: int, name: str) -> None:
    """Run one step of a contestant and print this process's peak memory, which Linux alone tells."""
    if name == "nothing":
        network(grid)
    else:
        contestants(grid, batch, [name])[name].step()
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    print(int(status["VmHWM"].split()[0]) / 1024)


def start_of_compiled() -> dict[str, float]:
    """Seconds that the compiled backend's first grid takes beyond its second: kernels compiled, or read from disk."""
    script = (
        "import time, torch, sampling\n"
        "model, uniforms, times = sampling.network(8), torch.rand(1, 64, dtype=torch.float64), []\n"
        "for _ in range(2):\n"
        "    start = time.perf_counter(); model.sample(uniforms, backend='compiled')\n"
        "    times.append(time.perf_counter() - start)\n"
        "print(times[0] - times[1])\n"
    )
    with tempfile.TemporaryDirectory() as cache:
        seconds = [
            float(
                subprocess.run(
                    [sys.executable, "-c", script], cwd=os.path.dirname(__file__), capture_output=True, text=True,
                    check=True, env={**os.environ, "NUMBA_CACHE_DIR": cache},
                ).stdout
            )
            for _ in range(2)
        ]  # fmt: skip
    return {"compiling": seconds[0], "reading_from_disk": seconds[1]}


def main() -> None:
    """Run the races and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    names = [BASELINE, PYTHAE, FORWARD, EAGER, COMPILED]
    ceilings = {"gflops_per_second": matrix_rate()}
    rows: dict[str, Any] = {
        "ceilings": ceilings,
        "gflops_per_image": {str(grid): operations(grid) for grid in arguments.grids},
        "start_of_compiled_seconds": start_of_compiled(),
    }
    print(json.dumps(rows, indent=2))
    rows["races"] = [
        race(grid, batch, names, arguments.rounds, ceilings)
        for grid in arguments.grids
        for batch in arguments.batches
    ]
    last, largest = arguments.grids[-1], arguments.batches[-1]
    rows["peak_memory_mib"] = {
        "grid": last,
        "batch": largest,
        **peak_memory(last, largest, [BASELINE, PYTHAE, EAGER, COMPILED]),
    }
    print(json.dumps(rows["peak_memory_mib"]))
    if torch.cuda.is_available():
        names = [BASELINE, FORWARD, EAGER, GRAPH, GRAPH_BF16]
        ceilings = {"gflops_per_second": matrix_rate("cuda"), "gigabytes_per_second": memory_bandwidth()}
        rows["cuda"] = {
            "ceilings": ceilings,
            "bfloat16_gflops_per_second": matrix_rate("cuda", torch.bfloat16),
            "races": [
                race(grid, batch, names, arguments.rounds, ceilings, "cuda")
                for grid in arguments.grids
                for batch in (1, 64, 512)
            ],
        }
    settings = {
        "network": network(last).config.to_diff_dict(),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
    }
    write_report("sampling", settings, rows)


if __name__ == "__main__":
    main()
