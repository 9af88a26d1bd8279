"""How fast the package trains, as ratios to other ways of training the same networks.

    python benchmarks/training.py vqvae     # tokenizer, 128 x 128; needs pythae, see benchmarks/README.md
    python benchmarks/training.py prior     # gated PixelCNN over 16 x 16 codes
    python benchmarks/training.py prior --check    # only check that peer and package are the same function

A step is a whole optimizer step; contestants take turns as measure.py has it. Results go to
benchmarks/reports/training-{vqvae,prior}.json; a grid, preset or precision that is not the default is added to
the name.
"""

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import MinimalQuantizer, MinimalVQVAE, full_tap_pixelcnn, pythae_vqvae, start_codebook
from torch import Tensor, nn

from isic_vq.data.loading import DecodedImages, collate
from isic_vq.data.sources import open_source
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
from measure import (
    Contestant,
    compare,
    num_parameters,
    print_figures,
    timed,
    training_contestant,
    write_report,
)

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
    return Contestant(
        lambda: next(steps), args.batch_size, facts={"parameters": num_parameters(model)}
    ), trainer


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
    settings = {"use_ema": True, "decay": config.ema_decay, "commitment_loss_factor": config.beta}
    peer = pythae_vqvae(deepcopy(model.encoder), deepcopy(model.decoder), config, **settings)

    whole, trainer = trainer_contestant(deepcopy(model), images, True, args, stack)
    plain, _ = trainer_contestant(deepcopy(model), images, False, args, stack)
    step, minimal, bare = (m.to(memory_format=CHANNELS_LAST) for m in (deepcopy(model), model, bare))
    averaged = AveragedParameters(step, trainer.recipe.average_decay)
    batch = pixel_values.contiguous(memory_format=CHANNELS_LAST)
    common = args.batch_size, args.precision
    return {
        TRAINER: whole,
        PLAIN_TRAINER: plain,
        STEP: training_contestant(
            step,
            lambda: step(batch).loss,
            *common,
            before_update=lambda: nn.utils.clip_grad_norm_(step.parameters(), trainer.recipe.max_grad_norm),
            after_update=lambda: averaged.update(step),
        ),
        MODEL: training_contestant(minimal, lambda: minimal(batch).loss, *common),
        BARE: training_contestant(bare, lambda: bare(batch), *common),
        PYTHAE: training_contestant(
            peer,
            lambda: peer({"data": pixel_values}).loss,
            *common,
            torch.optim.Adam(peer.parameters(), lr=1e-4),  # its trainer's default
        ),
    }, trainer


def checkpoint_row(trainer: Trainer, step_seconds: float) -> dict[str, float]:
    """What saving a checkpoint costs, also as a share of the steps between two of them."""
    seconds = median(timed(lambda: trainer.checkpoints.save(trainer.progress)).seconds for _ in range(5))
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
        return training_contestant(copy, lambda: copy(codes, labels).loss, args.batch_size, args.precision)

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
        rows = {} if args.check else compare(contestants, FIGURES["vqvae"], args.rounds, args.warmup)
        if rows:
            step_seconds = rows["contestants"][STEP]["seconds_per_step"]["median"]
            rows["checkpoint"] = checkpoint_row(trainer, step_seconds)
            rows["loop"] = loop_row(contestants[TRAINER])
        return rows


def run_prior(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the prior."""
    contestants = prior_contestants(args)
    return {} if args.check else compare(contestants, FIGURES["prior"], args.rounds, args.warmup)


def main() -> None:
    """Measure one stage and write its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=sorted(FIGURES))
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before its first timed one")
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
    settings |= {"threads": args.threads, "precision": args.precision}
    if args.stage == "prior":
        settings |= {"grid": args.grid}
    else:
        settings |= {"preset": args.preset, "pythae": metadata.version("pythae")}
    write_report(report_name(args), settings, rows)
    print_figures(rows)


def report_name(args: argparse.Namespace) -> str:
    """training-vqvae or training-prior, and whatever is not the default."""
    parts = [f"training-{args.stage}"]
    parts += [f"{args.grid}x{args.grid}"] if args.grid != 16 else []
    parts += [args.preset] if args.preset != "f8" else []
    parts += [args.precision] if args.precision != "fp32" else []
    return "-".join(parts)


if __name__ == "__main__":
    main()
