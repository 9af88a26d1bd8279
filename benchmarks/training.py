"""How fast the package trains, as ratios to other ways of training the same networks.

    python benchmarks/training.py vqvae     # tokenizer, 128 x 128; needs pythae, see benchmarks/README.md
    python benchmarks/training.py prior     # gated PixelCNN over 16 x 16 codes
    python benchmarks/training.py prior --check    # only check that peer and package are the same function

All contestants live in one process and take turns: each round holds one step of every contestant, in a new
random order, and a figure is the median over rounds of the ratio of two steps of the same round. A step
during which other processes used 0.1 CPU core or more is left out; ratios of CPU seconds, from all rounds,
stand beside. Results go to benchmarks/reports/training-{vqvae,prior}.json; a grid, preset or precision that
is not the default is added to the name.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peers import MinimalQuantizer, MinimalVQVAE, full_tap_pixelcnn, pythae_vqvae
from torch import Tensor, nn

from isic_vq.data.loading import DecodedImages, collate
from isic_vq.data.sources import open_source
from isic_vq.evaluation.report import environment
from isic_vq.files import write_atomically
from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
from isic_vq.models.configuration_vqvae import PRESETS, VQVAEConfig
from isic_vq.models.diagnosis import DIAGNOSES
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.averaging import AveragedParameters
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, VQVAERecipe
from isic_vq.training.run import Run
from isic_vq.training.vqvae import VQVAETask

REPORTS = Path(__file__).parent / "reports"
CLEAN_BELOW = 0.1  # CPU cores used by other processes
FEWEST_CLEAN = 5  # samples below which all are used, and the report says so
SAVE_EVERY = 250  # steps between checkpoints, as the recipes have it
FAR = 10**6  # steps or epochs that no benchmark reaches
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format

TRAINER, PLAIN_TRAINER = "isic_vq", "isic_vq, no augmentation"
STEP, MODEL = "isic_vq, step without trainer", "isic_vq, step without clipping and averaging"
BARE, PYTHAE = "bare channels-last loop", "pythae VQVAE (EMA)"
PRIOR, PRIOR_CONTIGUOUS = "isic_vq", "isic_vq, contiguous"
FULL, FULL_CHANNELS_LAST = "full taps", "full taps, channels last"

# Figure: the contestant whose time is divided, the one whose time it is divided by.
FIGURES = {
    "vqvae": {
        "throughput of isic_vq over pythae": (PYTHAE, TRAINER),
        "throughput of isic_vq over pythae, neither augmenting": (PYTHAE, PLAIN_TRAINER),
        "time of isic_vq over bare loop": (TRAINER, BARE),
        "time of isic_vq over bare loop, neither augmenting": (PLAIN_TRAINER, BARE),
        "augmentation": (TRAINER, PLAIN_TRAINER),
        "loading, loop and logging": (PLAIN_TRAINER, STEP),
        "clipping and averaging": (STEP, MODEL),
        "model and quantizer over bare ones": (MODEL, BARE),
    },
    "prior": {
        "throughput of isic_vq over full taps": (FULL, PRIOR),
        "throughput of isic_vq over full taps, both channels last": (FULL_CHANNELS_LAST, PRIOR),
        "throughput of isic_vq over full taps, both contiguous": (FULL, PRIOR_CONTIGUOUS),
    },
}


@dataclass
class Contestant:
    """One way to train.

    Attributes:
        step: performs one whole optimizer step.
        parameters: trainable parameters.
    """

    step: Callable[[], Any]
    parameters: int


@dataclass
class Sample:
    """One timed step: wall and CPU seconds, and the CPU cores other processes kept busy meanwhile."""

    seconds: float
    cpu_seconds: float
    foreign_cores: float

    @property
    def clean(self) -> bool:
        return self.foreign_cores < CLEAN_BELOW


def foreign_seconds() -> float:
    """CPU seconds spent since boot by anything but this process, hypervisor included; 0 where not Linux."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def timed(step: Callable[[], Any]) -> Sample:
    """Run one step."""
    foreign, cpu, start = foreign_seconds(), time.process_time(), time.perf_counter()
    step()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Sample(seconds, cpu, (foreign_seconds() - foreign) / seconds)


def measure(contestants: dict[str, Contestant], rounds: int, warmup: int) -> dict[str, list[Sample]]:
    """Let the contestants take turns; sample i of each belongs to round i."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    names, order = list(contestants), random.Random(0)
    for turn in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            sample = timed(contestants[name].step)
            if turn >= warmup:
                samples[name].append(sample)
        print(f"\rround {turn + 1 - warmup} of {rounds} ", end="", flush=True)
    print()
    return samples


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def contestant_row(contestant: Contestant, samples: list[Sample], batch_size: int) -> dict[str, Any]:
    """Time, throughput and size of one contestant."""
    clean = [sample.seconds for sample in samples if sample.clean]
    enough = len(clean) >= FEWEST_CLEAN
    seconds = spread(clean if enough else [sample.seconds for sample in samples])
    return {
        "seconds_per_step": seconds,
        "images_per_second": batch_size / seconds["median"],
        "cpu_seconds_per_step": median(sample.cpu_seconds for sample in samples),
        "clean_samples": len(clean),
        "samples_used": "clean" if enough else "all: fewer than 5 were clean",
        "parameters": contestant.parameters,
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


def plain_contestant(
    model: nn.Module,
    loss: Callable[[], Tensor],
    precision: str,
    optimizer: torch.optim.Optimizer | None = None,
    before_update: Callable[[], Any] = lambda: None,
    after_update: Callable[[], Any] = lambda: None,
) -> Contestant:
    """The usual few lines around a model in train mode; without `optimizer`, AdamW."""
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

    return Contestant(step, num_parameters(model))


def num_parameters(model: nn.Module) -> int:
    """How many numbers the optimizer trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def trainer_contestant(
    model: VQVAEModel, images: DecodedImages, augment: bool, args: argparse.Namespace, stack: ExitStack
) -> tuple[Contestant, Trainer]:
    """The package's own trainer in a temporary folder, step by step; validation is never reached."""
    loop = LoopRecipe(
        max_steps=FAR,
        batch_size=args.batch_size,
        precision=args.precision,
        eval_every=FAR,
        save_every=SAVE_EVERY,
    )
    recipe = VQVAERecipe(loop=loop, codebook_warmup_steps=1, augment=augment)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model = model.to(memory_format=CHANNELS_LAST)
    task = VQVAETask(model, images.image_processor, images, images, recipe)
    trainer = Trainer(task, loop, Run(folder, "benchmark"), Processes(loop, folder), settings={})
    steps = trainer.steps()
    stack.callback(steps.close)
    return Contestant(lambda: next(steps), num_parameters(model)), trainer


@torch.no_grad()
def start_codebook(model: VQVAEModel, pixel_values: Tensor) -> None:
    """Put the codebook at random latents, so that contestants start alike and no code is dead."""
    latents = model.train().embed(pixel_values)
    latents = latents.permute(0, 2, 3, 1).reshape(-1, model.config.code_dim)
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    share = torch.full((model.config.num_codes,), len(latents) / model.config.num_codes)
    model.quantizer.start_from(latents[order[: model.config.num_codes]], share)


def check_vqvae(model: VQVAEModel, bare: MinimalVQVAE, pixel_values: Tensor) -> None:
    """Assert that package and bare loop compute the same loss."""
    ours, theirs = deepcopy(model).train(), deepcopy(bare).train()
    difference = (ours(pixel_values).loss - theirs(pixel_values)).abs().item()
    assert difference < 1e-5, f"losses of package and bare loop differ by {difference}"
    print(f"package and bare loop: losses differ by {difference:.1e}")


def vqvae_contestants(args: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Contestant], Trainer]:
    """Contestants of the tokenizer, and the trainer behind the first of them."""
    model = VQVAEModel(VQVAEConfig.from_preset(args.preset, norm="batch"))
    config = model.config
    records = open_source(f"synthetic:{8 * args.batch_size}")
    images = DecodedImages(records, IsicVQImageProcessor(size=config.image_size), cache=True)
    items = [images[index] for index in range(len(images))]  # decoded once, before any clock runs
    pixel_values = collate(items[: args.batch_size])["pixel_values"].contiguous()
    start_codebook(model, pixel_values)
    quantizer = MinimalQuantizer(model.quantizer.codebook, model.quantizer.cluster_size, config.ema_decay)
    bare = MinimalVQVAE(deepcopy(model.encoder), deepcopy(model.decoder), quantizer, config.beta)
    check_vqvae(model, bare, pixel_values)
    peer = pythae_vqvae(deepcopy(model.encoder), deepcopy(model.decoder), config)

    whole, trainer = trainer_contestant(deepcopy(model), images, True, args, stack)
    plain, _ = trainer_contestant(deepcopy(model), images, False, args, stack)
    step, minimal, bare = (m.to(memory_format=CHANNELS_LAST) for m in (deepcopy(model), model, bare))
    averaged = AveragedParameters(step, trainer.recipe.average_decay)
    batch = pixel_values.contiguous(memory_format=CHANNELS_LAST)
    return {
        TRAINER: whole,
        PLAIN_TRAINER: plain,
        STEP: plain_contestant(
            step,
            lambda: step(batch).loss,
            args.precision,
            before_update=lambda: nn.utils.clip_grad_norm_(step.parameters(), trainer.recipe.max_grad_norm),
            after_update=lambda: averaged.update(step),
        ),
        MODEL: plain_contestant(minimal, lambda: minimal(batch).loss, args.precision),
        BARE: plain_contestant(bare, lambda: bare(batch), args.precision),
        PYTHAE: plain_contestant(
            peer,
            lambda: peer({"data": pixel_values}).loss,
            args.precision,
            torch.optim.Adam(peer.parameters(), lr=1e-4),  # its trainer's default
        ),
    }, trainer


def checkpoint_row(trainer: Trainer, step_seconds: float) -> dict[str, float]:
    """What saving a checkpoint costs, also as a share of the steps between two of them."""
    seconds = median(
        timed(lambda: trainer.checkpoints.save(trainer.averaged, trainer.progress)).seconds for _ in range(5)
    )
    return {"seconds": seconds, "every": SAVE_EVERY, "share_of_step": seconds / SAVE_EVERY / step_seconds}


def loop_row(trained: Contestant) -> dict[str, float]:
    """The share of a trainer's step that is not forward, backward and updates: loading, logging, bookkeeping."""
    shares = []
    for _ in range(20):
        start = time.perf_counter()
        values = trained.step()
        shares.append(1 - values["compute_seconds"] / (time.perf_counter() - start))
    return {"share_of_step": median(shares)}


@torch.no_grad()
def check_prior(model: PixelCNNModel, peer: PixelCNNModel, codes: Tensor, labels: Tensor) -> None:
    """Assert that package and full-tap network compute the same logits."""
    model.eval(), peer.eval()
    difference = (model(codes, labels).logits - peer(codes, labels).logits).abs().max().item()
    assert difference < 1e-4, f"logits of package and full-tap network differ by {difference}"
    print(f"package and full taps: logits differ by {difference:.1e}")


def prior_contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    """Contestants of the prior."""
    classes = dict(enumerate(DIAGNOSES[:-1]))
    model = PixelCNNModel(PixelCNNConfig(grid_size=args.grid, id2label=classes))
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, which would hide a difference
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    codes = torch.randint(model.config.num_codes, (args.batch_size, args.grid, args.grid))
    labels = torch.randint(len(classes), (args.batch_size,))
    peer = full_tap_pixelcnn(model)
    check_prior(model, peer, codes, labels)

    def contestant(model: PixelCNNModel, memory_format: torch.memory_format) -> Contestant:
        copy = deepcopy(model).to(memory_format=memory_format)
        return plain_contestant(copy, lambda: copy(codes, labels).loss, args.precision)

    return {
        PRIOR: contestant(model, CHANNELS_LAST),
        PRIOR_CONTIGUOUS: contestant(model, CONTIGUOUS),
        FULL: contestant(peer, CONTIGUOUS),
        FULL_CHANNELS_LAST: contestant(peer, CHANNELS_LAST),
    }


def run_vqvae(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the tokenizer."""
    with ExitStack() as stack:
        contestants, trainer = vqvae_contestants(args, stack)
        rows = {} if args.check else compare("vqvae", contestants, args)
        if rows:
            step_seconds = rows["contestants"][STEP]["seconds_per_step"]["median"]
            rows["checkpoint"] = checkpoint_row(trainer, step_seconds)
            rows["loop"] = loop_row(contestants[TRAINER])
        return rows


def run_prior(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the prior."""
    contestants = prior_contestants(args)
    return {} if args.check else compare("prior", contestants, args)


def compare(stage: str, contestants: dict[str, Contestant], args: argparse.Namespace) -> dict[str, Any]:
    """Time the contestants; a row for each, and one for each figure."""
    samples = measure(contestants, args.rounds, args.warmup)
    return {
        "figures": {
            name: ratio_row(samples[above], samples[below]) for name, (above, below) in FIGURES[stage].items()
        },
        "contestants": {
            name: contestant_row(contestants[name], samples[name], args.batch_size) for name in contestants
        },
    }


def main() -> None:
    """Measure one stage and write its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=sorted(FIGURES))
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the first timed one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="f8", help="size of the tokenizer")
    parser.add_argument("--grid", type=int, default=16, help="side of the prior's code grid")
    parser.add_argument(
        "--check", action="store_true", help="check that contestants compute the same, and stop"
    )
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this measures CPUs
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = {"vqvae": run_vqvae, "prior": run_prior}[args.stage](args)
    if args.check:
        return
    settings = {"stage": args.stage, "rounds": args.rounds, "batch_size": args.batch_size}
    settings |= {"threads": args.threads, "precision": args.precision, "clean_below_cores": CLEAN_BELOW}
    own = {"preset": args.preset, "pythae": metadata.version("pythae")}
    settings |= {"grid": args.grid} if args.stage == "prior" else own
    path = REPORTS / f"{report_name(args)}.json"
    content = {"settings": settings, **rows, "environment": environment("cpu")}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    for name, row in rows["figures"].items():
        low, high = row["quartiles"]
        cpu = row["ratio_of_cpu_seconds"]
        print(f"{row['median']:6.3f}  ({low:.3f} to {high:.3f}; in CPU seconds {cpu:.3f})  {name}")


def report_name(args: argparse.Namespace) -> str:
    """training-vqvae or training-prior, and whatever is not the default."""
    parts = [f"training-{args.stage}"]
    parts += [f"{args.grid}x{args.grid}"] if args.grid != 16 else []
    parts += [args.preset] if args.preset != "f8" else []
    parts += [args.precision] if args.precision != "fp32" else []
    return "-".join(parts)


if __name__ == "__main__":
    main()
