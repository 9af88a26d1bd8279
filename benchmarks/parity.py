"""Whether training in two processes is training in one: the same codebook, weights and losses on the same batches.

    python benchmarks/parity.py
    python benchmarks/parity.py --steps 10 --output parity.json

A small tokenizer (group norm, moving-average codebook with k-means start and resets, augmentation) goes through the
package's trainer in one process and in two, on a CPU, in float64 and float32, whole and with each batch cut into two
accumulated parts, on sound images and with every seventh image corrupt, with a single grid and with residual scales. Every run is compared with the one of one
process and whole batches. In float64 nothing but mistakes could part them; in float32 a rounding may assign a latent
to another code ("flipped"), after which two runs are two runs. Results go to benchmarks/reports/parity.json.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isic_vq.data.loading import DecodedImages
from isic_vq.data.sources import open_source
from isic_vq.evaluation.report import environment
from isic_vq.files import write_atomically
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import DataRecipe, LoopRecipe, VQVAERecipe
from isic_vq.training.run import Run
from isic_vq.training.vqvae import VQVAETask

REPORT = Path(__file__).parent / "reports" / "parity.json"
NUM_IMAGES, BATCH_SIZE = 81, 16  # an image is left over when an epoch, or the images of k-means, are cut up
MODEL: dict[str, Any] = {
    "image_size": 32,
    "hidden_sizes": [16, 32, 32],
    "num_residual_blocks": 1,
    "residual_size": 16,
    "norm": "group",  # batch norm depends on how a batch is cut
    "num_codes": 64,
    "code_dim": 8,
    "dead_code_threshold": 2.0,  # a step brings four latents per code: some codes die
}
SCALES = [1, 2, 4]
WARMUP_STEPS = 5
FAR = 10**6  # steps or epochs that no run reaches
TIMEOUT = 1800  # seconds for all runs of a group of processes


@dataclass(frozen=True)
class Job:
    """One run, in any number of processes."""

    precision: str
    accumulation_steps: int
    corrupt: bool
    scales: bool

    @property
    def name(self) -> str:
        """Names its folder."""
        images, codes = "corrupt" if self.corrupt else "sound", "scales" if self.scales else "grid"
        return f"{self.precision}-{self.accumulation_steps}-{images}-{codes}"

    @property
    def model(self) -> dict[str, Any]:
        """Its tokenizer's config."""
        return {**MODEL, "scales": SCALES, "num_phi": 2} if self.scales else MODEL


JOBS = [
    *(
        Job("fp64", parts, corrupt, scales)
        for scales in (False, True)
        for corrupt in (False, True)
        for parts in (1, 2)
    ),
    *(Job("fp32", parts, False, scales) for scales in (False, True) for parts in (1, 2)),
]


class DamagedImages(DecodedImages):
    """Images of which every seventh cannot be read."""

    def _decode(self, index: int) -> Any:
        return f"image {index}: damaged on purpose" if index % 7 == 3 else super()._decode(index)


class RecordedTask(VQVAETask):
    """The tokenizer stage, taking notes.

    Attributes:
        codes: per step, per micro-batch: the codes of this process's images in order.
        shares: per micro-batch: number of images, and their mean loss.
        resets: number of codes that were moved.
    """

    def begin(self, processes: Processes) -> None:
        super().begin(processes)
        self.codes: list[list[Tensor]] = []
        self.shares: list[tuple[int, float]] = []
        self.resets = 0
        quantizer = self.model.quantizer
        take_deferred, move = quantizer.take_deferred, quantizer._move

        def taken() -> list[tuple[Tensor, Tensor]]:
            noted = take_deferred()
            self.codes.append([codes.clone() for _, codes in noted])
            return noted

        def moved(dead: Tensor, replacements: Tensor) -> None:
            self.resets += int(dead.sum())
            move(dead, replacements)

        quantizer.take_deferred, quantizer._move = taken, moved

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        losses = super().losses(model, batch, step)
        self.shares.append((batch["size"], losses["loss"].item()))
        return losses


def train(job: Job, folder: Path, steps: int) -> None:
    """Train in this process, one of its group; leaves what it saw in `folder`."""
    torch.set_default_dtype(torch.float64 if job.precision == "fp64" else torch.float32)
    loop = LoopRecipe(
        max_steps=steps,
        batch_size=BATCH_SIZE,
        accumulation_steps=job.accumulation_steps,
        learning_rate=2e-3,
        warmup_steps=WARMUP_STEPS,
        precision="fp32",  # no autocast
        eval_every=FAR,
        save_every=FAR,
    )
    recipe = VQVAERecipe(
        data=DataRecipe(max_corrupt_share=0.5), loop=loop, codebook_warmup_steps=WARMUP_STEPS
    )
    folder.mkdir(parents=True, exist_ok=True)
    processes = Processes(loop, folder, idle_parameters=job.scales)  # phi, until the codebook starts
    torch.manual_seed(loop.seed)
    model = VQVAEModel(VQVAEConfig(**job.model)).to(
        torch.get_default_dtype(), memory_format=torch.channels_last
    )
    processor = IsicVQImageProcessor(size=MODEL["image_size"])
    images = DamagedImages if job.corrupt else DecodedImages
    train_set = images(open_source(f"synthetic:{NUM_IMAGES}:0"), processor, cache=True)
    validation_set = DecodedImages(open_source("synthetic:4:1"), processor)
    task = RecordedTask(model, processor, train_set, validation_set, recipe)
    trainer = Trainer(task, loop, Run(folder, "parity00"), processes, settings={})
    trainer.train()
    assert trainer.averaged is not None
    averaged = {f"averaged {name}": tensor for name, tensor in trainer.averaged.shadow.items()}
    seen = {
        "weights": {**model.state_dict(), **averaged},
        "codes": task.codes,
        "shares": task.shares,
        "resets": task.resets,
    }
    torch.save(seen, folder / f"process-{processes.rank}.pt")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(folder: Path, num_processes: int, steps: int) -> None:
    """Run every job in a group of processes."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
        command += ["--master-port", str(free_port())]
    command += [__file__, "--worker", str(folder), "--steps", str(steps)]
    settings = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        command, env={**os.environ, **settings}, timeout=TIMEOUT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{num_processes} processes failed:\n{done.stderr[-8000:]}")


def same_bits(tensors: list[dict[str, Tensor]], names: list[str]) -> bool:
    """Whether all processes hold the same bits."""
    first, *others = tensors
    return all(
        first[name].cpu().numpy().tobytes() == other[name].cpu().numpy().tobytes()
        for other in others
        for name in names
    )


def difference(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """Largest absolute difference."""
    return max((a[name].double() - b[name].double()).abs().max().item() for name in names)


def in_sample_order(processes: list[dict[str, Any]], step: int) -> Tensor:
    """Codes of a step: micro-batch by micro-batch, within one process by process."""
    parts = [
        codes for parts in zip(*(seen["codes"][step] for seen in processes), strict=True) for codes in parts
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def step_losses(processes: list[dict[str, Any]], accumulation_steps: int) -> list[float]:
    """Mean loss of the images of each step, over all micro-batches and processes."""
    shares = torch.tensor([seen["shares"] for seen in processes], dtype=torch.float64)
    numbers, losses = shares.unflatten(1, (-1, accumulation_steps)).unbind(-1)
    return ((numbers * losses).sum((0, 2)) / numbers.sum((0, 2))).tolist()


def perplexity(codes: Tensor) -> float:
    """exp(entropy) of how often each code occurs."""
    shares = torch.bincount(codes).double() / len(codes)
    return torch.special.entr(shares).sum().exp().item()


def compare(job: Job, num_processes: int, folder: Path, reference: Path, steps: int) -> dict[str, Any]:
    """One row of the report: a run against the one of one process and whole batches."""
    seen = [torch.load(folder / f"process-{rank}.pt") for rank in range(num_processes)]
    (single,) = [torch.load(reference / "process-0.pt")]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if line["kind"] == "batch"]
    codes = [in_sample_order(seen, step) for step in range(steps)]
    expected = [in_sample_order([single], step) for step in range(steps)]
    flipped = [int((a != b).sum()) for a, b in zip(codes, expected, strict=True)]
    losses = step_losses(seen, job.accumulation_steps)
    every = sorted(single["weights"])
    codebook = [f"quantizer.{name}" for name in ("codebook", "cluster_size", "code_sums")]
    weights = [process["weights"] for process in seen]
    return {
        **asdict(job),
        "processes": num_processes,
        "codebook_same_bits_in_all_processes": same_bits(weights, codebook),
        "weights_same_bits_in_all_processes": same_bits(weights, every),
        "codebook_difference": difference(weights[0], single["weights"], codebook),
        "weights_difference": difference(weights[0], single["weights"], every),
        "loss_difference": max(abs(a - b) for a, b in zip(losses, step_losses([single], 1), strict=True)),
        "logged_loss_difference": max(abs(a - line["loss"]) for a, line in zip(losses, logged, strict=True)),
        "logged_perplexity_difference": max(
            abs(perplexity(seen) - line["perplexity"])
            for seen, line in zip(codes, logged, strict=True)
            if len(seen)
        ),
        "assignments": sum(len(step) for step in codes),
        "flipped_assignments": sum(flipped),
        "first_flip_at_step": next((step for step, count in enumerate(flipped) if count), None),
        "resets": seen[0]["resets"],
        "uneven_batches": sum(
            len({n for n, _ in shares}) > 1
            for shares in zip(*(process["shares"] for process in seen), strict=True)
        ),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the report as a table."""
    print(
        "                   processes  parts  same bits  codebook  weights     loss   flipped of assigned  resets  uneven"
    )
    for row in rows:
        same = row["codebook_same_bits_in_all_processes"] and row["weights_same_bits_in_all_processes"]
        print(
            f"{row['precision']} {'corrupt' if row['corrupt'] else '':<7} {'scales' if row['scales'] else '':<6} {row['processes']:9d} "
            f"{row['accumulation_steps']:6d} {'yes' if same else 'NO':>10} {row['codebook_difference']:9.1e}"
            f"{row['weights_difference']:9.1e}{row['loss_difference']:9.1e}"
            f"{row['flipped_assignments']:10d} {row['assignments']:11d} {row['resets']:7d} {row['uneven_batches']:7d}"
        )


def main() -> None:
    """Run the jobs in one process and in two, compare and report; or, as a worker, run them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        for job in JOBS:
            train(job, args.worker / job.name, args.steps)
        return
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be above {WARMUP_STEPS}: the codebook starts there")
    with tempfile.TemporaryDirectory() as temporary:
        folders = {number: Path(temporary) / str(number) for number in (1, 2)}
        for number, folder in folders.items():
            launch(folder, number, args.steps)
        rows = [
            compare(
                job,
                number,
                folders[number] / job.name,
                folders[1] / Job(job.precision, 1, job.corrupt, job.scales).name,
                args.steps,
            )
            for job in JOBS
            for number in folders
            if (number, job.accumulation_steps) != (1, 1)
        ]
    show(rows)
    report = {
        "settings": {
            "steps": args.steps,
            "batch_size": BATCH_SIZE,
            "images": NUM_IMAGES,
            "model": MODEL,
            "scales": SCALES,
        },
        "runs": rows,
        "environment": {**environment("cpu"), "threads": 1},
    }
    write_atomically(args.output, (json.dumps(report, indent=2) + "\n").encode())
    print(f"wrote {args.output.name}")


if __name__ == "__main__":
    main()
