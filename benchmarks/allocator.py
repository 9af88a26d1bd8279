"""What keeping freed memory in the process saves: each part of the work with malloc as glibc has it and as commands set it.

    python benchmarks/allocator.py

Two kinds of child processes take turns, told apart by ISIC_VQ_KEEP_MEMORY alone; each does the same work on the shipped
checkpoint and random images and says how long it took, how many pages the kernel had to give it meanwhile (minor page
faults), and a hash of what came out, which has to be the same in all of them. A round is a child of each kind; figures
are medians over rounds, ratios those within a round. Where other processes kept cores busy meanwhile (`foreign_cores`), CPU
seconds are what to read. Results go to benchmarks/reports/allocator.json.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from isic_vq.allocator import SWITCH, keep_freed_memory
from isic_vq.models.modeling_isic_vq import IsicVQModel
from measure import foreign_seconds, spread, training_contestant, write_report

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "isic-vq-128"
BATCH, SAMPLED = 32, 16  # images
MEASURES = ("seconds_per_image", "cpu_seconds_per_image", "page_faults_per_image", "foreign_cores")
KINDS = {"0": "as glibc has it", "1": "kept"}
STEPS = {
    "encode": 3,
    "decode": 3,
    "VQ-VAE step": 2,
    "prior step": 1,
    "sampling": 1,
}  # after one that is not measured


def work() -> dict[str, tuple[Callable[[], Any], int, Callable[[], list[Tensor]]]]:
    """By part: what does it once, of how many images, and what came out so far."""
    torch.manual_seed(0)
    model = IsicVQModel.from_pretrained(CHECKPOINT).eval()
    trained = IsicVQModel.from_pretrained(CHECKPOINT)
    tokenizer = trained.vqvae.to(memory_format=torch.channels_last)
    prior = trained.prior.to(memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, 128, 128)
    batch = images.contiguous(memory_format=torch.channels_last)
    codes, labels = model.encode(images), torch.arange(BATCH) % 7
    results: dict[str, list[Tensor]] = {}

    def kept(
        name: str, compute: Callable[[], Tensor]
    ) -> tuple[Callable[[], Any], int, Callable[[], list[Tensor]]]:
        def step() -> None:
            results[name] = [compute()]

        return step, SAMPLED if name == "sampling" else BATCH, lambda: results[name]

    def training(
        part: nn.Module, loss: Callable[[], Tensor]
    ) -> tuple[Callable[[], Any], int, Callable[[], list[Tensor]]]:
        return (
            training_contestant(part, loss, BATCH, "fp32").step,
            BATCH,
            lambda: list(part.state_dict().values()),
        )

    return {
        "encode": kept("encode", lambda: model.encode(images)),
        "decode": kept("decode", lambda: model.decode(codes)),
        "VQ-VAE step": training(tokenizer, lambda: tokenizer(batch).loss),
        "prior step": training(prior, lambda: prior(codes, labels).loss),
        "sampling": kept("sampling", lambda: model.generate(SAMPLED, 0, seed=0, backend="compiled").codes),
    }


def usage() -> list[float]:
    """Seconds, CPU seconds and page faults of this process so far, and CPU seconds of all others."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return [time.perf_counter(), time.process_time(), faults, foreign_seconds()]


def child(threads: int) -> dict[str, Any]:
    """Do the work in this process: numbers by part, and the most memory it held."""
    was_set = keep_freed_memory()
    assert was_set == (os.environ[SWITCH] == "1"), "malloc was not set as the environment asks"
    torch.set_num_threads(threads)
    parts = {}
    for name, (step, images, result) in work().items():
        step()
        samples = []
        for _ in range(STEPS[name]):
            before = usage()
            step()
            used = [after - start for start, after in zip(before, usage(), strict=True)]
            samples.append([*(amount / images for amount in used[:3]), used[3] / used[0]])
        digest = hashlib.sha256()
        for tensor in result():
            digest.update(tensor.contiguous().numpy().tobytes())
        parts[name] = {
            **{key: median(column) for key, column in zip(MEASURES, zip(*samples, strict=True), strict=True)},
            "sha256": digest.hexdigest(),
        }
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"parts": parts, "peak_bytes": peak}


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians by part and kind, and ratios within rounds."""
    rows: dict[str, Any] = {}
    for name in STEPS:
        assert len({run[kind]["parts"][name]["sha256"] for run in rounds for kind in KINDS.values()}) == 1, (
            f"{name}: results differ"
        )
        row: dict[str, Any] = {"same_bits": True}
        for kind in KINDS.values():
            row[kind] = {key: spread([run[kind]["parts"][name][key] for run in rounds]) for key in MEASURES}
        for ratio, key in (("times_as_fast", MEASURES[0]), ("ratio_of_cpu_seconds", MEASURES[1])):
            before, after = ([run[kind]["parts"][name][key] for run in rounds] for kind in KINDS.values())
            row[ratio] = spread([a / b for a, b in zip(before, after, strict=True)])
        rows[name] = row
    peaks = {kind: spread([run[kind]["peak_bytes"] for run in rounds]) for kind in KINDS.values()}
    return {"parts": rows, "peak_bytes": peaks}


def main() -> None:
    """Measure and write the report, or, as a child, print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="children of each kind")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.threads)))
        return
    rounds = []
    command = [sys.executable, __file__, "--child", "--threads", str(args.threads)]
    for number in range(args.rounds):
        found = {}
        for switch in sorted(KINDS, reverse=number % 2 == 1):
            done = subprocess.run(
                command, env={**os.environ, SWITCH: switch}, stdout=subprocess.PIPE, check=True
            )
            found[KINDS[switch]] = json.loads(done.stdout)
        rounds.append(found)
        print(f"round {number + 1} of {args.rounds}", flush=True)
    rows = summary(rounds)
    for name, row in rows["parts"].items():
        ratio, cpu = row["times_as_fast"], row["ratio_of_cpu_seconds"]["median"]
        ends = {key: [row[kind][key]["median"] for kind in KINDS.values()] for key in MEASURES}
        seconds, faults = ends["seconds_per_image"], ends["page_faults_per_image"]
        print(
            f"{ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f}; in CPU seconds {cpu:.2f})  {name}: "
            f"{1000 * seconds[0]:.2f} -> {1000 * seconds[1]:.2f} ms and {faults[0]:.0f} -> {faults[1]:.0f} page faults per image"
        )
    busy = [
        run[kind]["parts"][name]["foreign_cores"]
        for run in rounds
        for kind in KINDS.values()
        for name in STEPS
    ]
    print(f"other processes kept {median(busy):.2f} cores busy")
    print({kind: f"{row['median'] / 2**20:.0f} MiB at the peak" for kind, row in rows["peak_bytes"].items()})
    write_report("allocator", {"rounds": args.rounds, "threads": args.threads, "steps": STEPS}, rows)


if __name__ == "__main__":
    main()
