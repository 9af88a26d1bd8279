"""How benchmarks measure: contestants take turns in one process, and what is reported are ratios within a round.

    contestants = {"ours": Contestant(step, images=32), "theirs": Contestant(other_step, images=32)}
    rows = compare(contestants, {"throughput of ours over theirs": ("theirs", "ours")}, rounds=30, warmup=3)
    write_report("name", settings, rows)
    print_figures(rows)

Each round holds one sample of every contestant, in a new random order, and a figure is the median over rounds of the
ratio of two samples of the same round. A sample is one step or, of a short one, as many as last 0.2 s. A sample
during which other processes used 0.1 CPU core or more is left out; ratios of CPU seconds, from all rounds, stand
beside. A step has to wait for the device it works on (`waited`).
"""

import ctypes
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from isic_vq.evaluation.report import environment
from isic_vq.files import write_atomically

REPORTS = Path(__file__).parent / "reports"
CLEAN_BELOW = 0.1  # CPU cores used by other processes
FEWEST_CLEAN = 5  # samples below which all are used, and the report says so
LEAST_SECONDS = 0.2  # of a sample: Linux counts other processes' time in hundredths of a second


def one_cluster(prior: nn.Module, batch: int) -> Tensor | None:
    """The cluster of each image, 0, of a prior that has some: which one it is takes no other time."""
    return torch.zeros(batch, dtype=torch.long) if prior.config.num_clusters else None


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
        step: does it once, or a part of it.
        images: how many images that is.
        parts: how many such steps make the work, where a whole one would take too long; all take equally long.
        facts: what else its row of the report says, for example its number of parameters.
    """

    step: Callable[[], Any]
    images: int
    parts: int = 1
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sample:
    """Wall and CPU seconds of one step, and the CPU cores that other processes kept busy meanwhile."""

    seconds: float
    cpu_seconds: float
    foreign_cores: float

    def times(self, parts: int) -> "Sample":
        """What so many steps would have taken."""
        return Sample(self.seconds * parts, self.cpu_seconds * parts, self.foreign_cores)

    @property
    def clean(self) -> bool:
        return self.foreign_cores < CLEAN_BELOW


def training_contestant(
    model: nn.Module,
    loss: Callable[[], Tensor],
    images: int,
    precision: str,
    optimizer: torch.optim.Optimizer | None = None,
    before_update: Callable[[], Any] = lambda: None,
    after_update: Callable[[], Any] = lambda: None,
) -> Contestant:
    """The usual few lines around a model in train mode.

    Args:
        model: what is trained.
        loss: computes the loss of one batch.
        images: size of the batch.
        precision: "fp32" or "bf16".
        optimizer: AdamW by default.
        before_update: runs between backward pass and update.
        after_update: runs after it.
    """
    model.train()
    optimizer = optimizer or torch.optim.AdamW(
        model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0, fused=True
    )

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        before_update()
        optimizer.step()
        after_update()
        return value.item()

    return Contestant(step, images, facts={"parameters": num_parameters(model)})


def num_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def waited(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The step, over when the device has done it."""
    if device == "cpu":
        return step

    def whole() -> None:
        step()
        torch.cuda.synchronize()

    return whole


def peak_bytes(step: Callable[[], Any], device: str = "cpu") -> int | None:
    """Most memory of a device that a step held above what was held before it; None where it cannot be told.

    On a CPU that is resident memory of this process, of which Linux keeps the peak.
    """
    step()  # what is allocated once and kept is not counted
    if device == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - start
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory, reused, would not show
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets the peak
    start = peak_resident_bytes()
    step()
    return peak_resident_bytes() - start


def peak_resident_bytes() -> int:
    """Most memory this process held since the peak was reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def compare(
    contestants: dict[str, Contestant], figures: dict[str, tuple[str, str]], rounds: int, warmup: int
) -> dict[str, Any]:
    """Time contestants by turns.

    Args:
        contestants: by name.
        figures: by name, the contestant whose time is divided and the one whose time it is divided by.
        rounds: samples of each contestant.
        warmup: steps of each before its first sample, at least 1.

    Returns:
        `figures` and `contestants`: a row for each.
    """
    samples = take_turns(contestants, rounds, warmup)
    return {
        "figures": {
            name: ratio_row(samples[above], samples[below]) for name, (above, below) in figures.items()
        },
        "contestants": {name: contestant_row(contestants[name], samples[name]) for name in contestants},
    }


def take_turns(contestants: dict[str, Contestant], rounds: int, warmup: int) -> dict[str, list[Sample]]:
    """Samples of each contestant; number i of each belongs to round i."""
    repeats: dict[str, int] = {}
    for name, contestant in contestants.items():
        shortest = min(timed(contestant.step).seconds for _ in range(warmup))
        repeats[name] = math.ceil(LEAST_SECONDS / shortest)
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    names, order = list(contestants), random.Random(0)
    for turn in range(rounds):
        order.shuffle(names)
        for name in names:
            samples[name].append(timed(contestants[name].step, repeats[name]).times(contestants[name].parts))
        print(f"\rround {turn + 1} of {rounds} ", end="", flush=True)
    print()
    return samples


def timed(step: Callable[[], Any], repeats: int = 1) -> Sample:
    """Run a step several times; seconds are of one of them."""
    foreign, cpu, start = foreign_seconds(), time.process_time(), time.perf_counter()
    for _ in range(repeats):
        step()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Sample(seconds / repeats, cpu / repeats, (foreign_seconds() - foreign) / seconds)


def foreign_seconds() -> float:
    """CPU seconds spent since boot by anything but this process, hypervisor included; 0 where not Linux."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split(maxsplit=9)[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def contestant_row(contestant: Contestant, samples: list[Sample]) -> dict[str, Any]:
    """Time and throughput of one contestant, and its facts."""
    clean = [sample.seconds for sample in samples if sample.clean]
    enough = len(clean) >= FEWEST_CLEAN
    seconds = spread(clean if enough else [sample.seconds for sample in samples])
    return {
        "seconds_per_step": seconds,
        "images_per_second": contestant.images / seconds["median"],
        "cpu_seconds_per_step": median(sample.cpu_seconds for sample in samples),
        "clean_samples": len(clean),
        "samples_used": "clean" if enough else "all: fewer than 5 were clean",
        **contestant.facts,
    }


def ratio_row(above: list[Sample], below: list[Sample]) -> dict[str, Any]:
    """Ratio of two contestants' times: round by round, and of their medians."""
    rounds = list(zip(above, below, strict=True))
    clean = [(a, b) for a, b in rounds if a.clean and b.clean]
    enough = len(clean) >= FEWEST_CLEAN
    used = clean if enough else rounds
    return {
        **spread([a.seconds / b.seconds for a, b in used]),
        "ratio_of_medians": median(a.seconds for a, _ in used) / median(b.seconds for _, b in used),
        "ratio_of_cpu_seconds": median(a.cpu_seconds / b.cpu_seconds for a, b in rounds),
        "clean_rounds": len(clean),
        "rounds_used": "clean" if enough else "all: fewer than 5 were clean",
    }


def write_report(name: str, settings: dict[str, Any], rows: dict[str, Any], device: str = "cpu") -> None:
    """Write benchmarks/reports/`name`.json: settings, rows, and the environment they were measured in."""
    settings = {**settings, "clean_below_cores": CLEAN_BELOW}
    content = {"settings": settings, **rows, "environment": environment(device)}
    write_atomically(REPORTS / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())


def print_figures(rows: dict[str, Any]) -> None:
    """Print every figure of `compare`: median, quartiles, and the ratio of CPU seconds."""
    for name, row in rows["figures"].items():
        low, high = row["quartiles"]
        cpu = row["ratio_of_cpu_seconds"]
        print(f"{row['median']:6.3f}  ({low:.3f} to {high:.3f}; in CPU seconds {cpu:.3f})  {name}")
