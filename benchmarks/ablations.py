"""Short runs that differ in one setting each: what the defaults of the recipes rest on.

    python benchmarks/ablations.py vqvae    # 400 steps each
    python benchmarks/ablations.py prior    # 600 steps each, on the codes of runs/codes-f8
    python benchmarks/ablations.py scales   # 250 steps each
    python benchmarks/ablations.py var      # 600 steps each, on the codes of runs/codes-f8-scales
    python benchmarks/ablations.py decoder  # 100 steps each, two seeds, on the shipped tokenizer
    python benchmarks/ablations.py priors   # 300 steps each, two seeds, on the shipped tokenizer's codes
    python benchmarks/ablations.py priors-start  # 100 steps each, from the shipped prior, which saw the held-out images

Each run is `isic-vq train` with a recipe and overrides, kept in runs/ablations/, so that a stopped sweep goes on
where it stood. Results go to benchmarks/reports/ablations-STAGE.json. One seed each, but where a stage names two: differences
under about 0.3 dB, or 0.02 bits, mean nothing. Decoders and priors of two seeds train without the lesions of 500 images of the
training files, on which their settings are chosen; they are measured on these and on validation. A yardstick that no loss saw is named by the
environment variable ISIC_VQ_YARDSTICK, a folder of an image model; it is measured on validation alone.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoders import (
    BATCH,
    Reference,
    decode,
    held_out,
    in_batches,
    measure,
    open_tokenizer,
    open_validation,
    others,
    paired,
)
from torch import Tensor

from isic_vq.data.code_cache import read_code_cache, write_code_cache
from isic_vq.data.loading import DecodedImages, collate
from isic_vq.data.parts import open_part
from isic_vq.data.sources import open_source
from isic_vq.evaluation.appearance import Appearance
from isic_vq.evaluation.bits_per_code import bits_per_code
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.generation import EmbeddedImages, Yardstick, distance_metrics, generated_images
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import psnr
from isic_vq.evaluation.report import Report, environment
from isic_vq.files import write_atomically
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.vqvae import quantizer_frozen, refit_batch_norm

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "model_cards/isic-vq-128"
HAM = "parquet:${ISIC_VQ_DATA}/ham10000"
STAGES: dict[str, dict[str, Any]] = {
    "vqvae": {
        "train": "vqvae",
        "config": "examples/configs/vqvae-f8.yaml",
        "shared": [
            "loop.max_steps=400",
            "loop.average_decay=0",
            "loop.eval_every=100",
            "loop.save_every=200",
        ],
        "runs": {
            "base": [],
            "random start, no warm-up": ["codebook_start=random", "codebook_warmup_steps=0"],
            "k-means start at step 0": ["codebook_warmup_steps=0"],
            "no dead-code reset": ["model.dead_code_threshold=0"],
            "random start, no reset": [
                "codebook_start=random",
                "codebook_warmup_steps=0",
                "model.dead_code_threshold=0",
            ],
            "gradient codebook": ["model.codebook_update=gradient"],
            "L1 alone": ["model.mse_weight=0"],
            "MSE alone": ["model.l1_weight=0"],
            "L1 + 5 MSE + 0.2 (1 - SSIM)": ["ssim_weight=0.2"],
            "GroupNorm": ["model.norm=group"],
        },
    },
    "prior": {
        "train": "prior",
        "codes": "codes-f8",
        "config": "examples/configs/prior-f8.yaml",
        "shared": [
            "loop.max_steps=600",
            "loop.average_decay=0",
            "loop.eval_every=2",
            "model.hidden_size=64",
            "model.num_layers=6",
            "num_samples=1",
        ],
        "runs": {
            "base (dropout 0.1, 8 views)": [],
            "no dropout": ["model.dropout=0"],
            "dropout 0.3": ["model.dropout=0.3"],
            "1 view": ["train_codes=runs/ablations/codes-f8-one-view.parquet"],
        },
    },
    "priors": {
        "train": "prior",
        "config": "examples/configs/prior-f8.yaml",
        "shared": [
            "tokenizer=model_cards/isic-vq-128",
            "train_codes=runs/ablations/codes-priors/train.parquet",
            "validation_codes=runs/ablations/codes-priors/held-out.parquet",
            "loop.max_steps=300",
            "loop.warmup_steps=30",
            "loop.average_decay=0.98",
            "loop.eval_every=100",
            "loop.save_every=100",
            "model.hidden_size=64",
            "model.num_layers=6",
            "num_samples=1",
        ],
        "seeds": [0, 1],
        "runs": {
            "none": [],
            "noise 0.3": ["context_noise=0.3"],
            "64 clusters": ["model.num_clusters=64"],
            "noise 0.3, 64 clusters": ["context_noise=0.3", "model.num_clusters=64"],
        },
    },
    "priors-start": {
        "train": "prior",
        "config": "examples/configs/prior-f8-refined.yaml",
        "shared": [
            "train_codes=runs/ablations/codes-priors/train.parquet",
            "validation_codes=runs/ablations/codes-priors/held-out.parquet",
            "loop.max_steps=100",
            "loop.warmup_steps=10",
            "loop.save_every=20",
            "loop.learning_rate=3.0e-4",
            "loop.average_decay=0.98",
            "loop.eval_every=100",
            "num_samples=1",
        ],
        "runs": {
            "none": ["context_noise=0", "model.num_clusters=0"],
            "noise 0.3, 64 clusters": [],
            "64 clusters": ["context_noise=0"],
            "noise 0.3": ["model.num_clusters=0"],
        },
    },
    "decoder": {
        "train": "decoder",
        "config": "examples/configs/decoder-f8.yaml",
        "shared": [
            "data.validation=null",
            "data.validation_share=0.1",
            "loop.max_steps=100",
            "loop.warmup_steps=20",
            "loop.average_decay=0.97",
            "adversarial_start=30",
        ],
        "seeds": [0, 1],
        "runs": {
            "base": [],
            "no grid loss": ["grid_weight=0"],
            "no refinement, so no noise": ["refinement_size=0"],
            "no spectrum loss": ["spectrum_weight=0"],
            "discriminator 0.02": ["adversarial_weight=0.02", "discriminator_layers=2"],
            "discriminator 0.02, no spectrum or grid loss, no refinement": [
                "adversarial_weight=0.02",
                "spectrum_weight=0",
                "grid_weight=0",
                "refinement_size=0",
            ],
            "half the spectrum loss": ["spectrum_weight=0.015"],
            "SSIM 0.2": ["ssim_weight=0.2"],
            "no code noise": ["code_noise.image_share=0"],
            "no feature distance": ["feature_weight=0"],
            "beta1 0.9": ["loop.beta1=0.9"],
            "discriminator 0.02, LeCam 0.1": [
                "adversarial_weight=0.02",
                "discriminator_layers=2",
                "lecam_weight=0.1",
            ],
            "discriminator 0.02, field of 16 pixels": ["adversarial_weight=0.02", "discriminator_layers=1"],
            "logits 0.01": ["logit_weight=0.01"],
        },
    },
    "scales": {
        "train": "vqvae",
        "config": "examples/configs/vqvae-f8-scales.yaml",
        "shared": [
            "loop.max_steps=250",
            "loop.average_decay=0",
            "loop.eval_every=100",
            "loop.save_every=250",
        ],
        "runs": {
            "base (the paper's eight scales)": [],
            "a single grid": ["model.scales=null"],
            "five scales (1, 2, 4, 8, 16)": ["model.scales=[1,2,4,8,16]"],
            "two scales (4, 16)": ["model.scales=[4,16]", "model.num_phi=2"],
            "8 code channels": ["model.code_dim=8"],
            "32 code channels": ["model.code_dim=32"],
            "one phi": ["model.num_phi=1"],
        },
    },
    "var": {
        "train": "prior",
        "codes": "codes-f8-scales",
        "config": "examples/configs/prior-f8-var.yaml",
        "shared": [
            "loop.max_steps=600",
            "loop.average_decay=0",
            "loop.eval_every=2",
            "model.hidden_size=64",
            "model.num_heads=2",
            "model.num_layers=4",
            "num_samples=1",
        ],
        "runs": {
            "base (4 layers of 64, dropout 0.1, 8 views)": [],
            "2 layers": ["model.num_layers=2"],
            "8 layers": ["model.num_layers=8"],
            "no dropout": ["model.dropout=0"],
            "dropout 0.3": ["model.dropout=0.3"],
            "1 view": ["train_codes=runs/ablations/codes-f8-scales-one-view.parquet"],
        },
    },
}


def run(stage: str, name: str, overrides: list[str]) -> Path:
    """Train one setting, unless its folder holds a finished run; returns the folder."""
    folder = ROOT / "runs/ablations" / stage / "".join(c if c.isalnum() else "-" for c in name)
    if not (folder / "report.json").exists():
        settings = STAGES[stage]
        command = [sys.executable, "-m", "isic_vq", "train", settings["config"]]
        command += [*settings["shared"], *overrides, f"output_dir={folder.relative_to(ROOT)}"]
        if list(folder.glob("checkpoints/step-*")):
            command.append("--resume")
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def mean_psnr(model: VQVAEModel, batches: list[torch.Tensor]) -> float:
    """Mean over images, in dB, in whatever mode each module of the model is in."""
    values = [psnr(batch, model(batch).reconstruction) for batch in batches]
    return torch.cat(values).mean().item()


@torch.no_grad()
def tokenizer_row(
    folder: Path, train: list[torch.Tensor], validation: list[torch.Tensor]
) -> dict[str, float]:
    """The report's figures, and what BatchNorm's statistics cost: batch, running and re-estimated ones."""
    report = Report.load(folder / "report.json")
    row = {name: report.value(name) for name in ("psnr", "ssim", "usage", "perplexity")}
    model = VQVAEModel.from_pretrained(folder / "model").eval()
    row["psnr_running_statistics"] = mean_psnr(model, validation)
    refit_batch_norm(model, iter(train))
    row["psnr_refitted_statistics"] = mean_psnr(model.eval(), validation)
    with quantizer_frozen(model):
        row["psnr_batch_statistics"] = mean_psnr(model, validation)
    return row


def prior_row(folder: Path) -> dict[str, float]:
    """Validation bits per code of the best epoch, and the training loss of the last one in the same unit."""
    records = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    epochs = [record for record in records if record["kind"] == "epoch"]
    return {
        "bits_per_code": Report.load(folder / "report.json").value("bits_per_code"),
        "train_bits_per_code_last_epoch": epochs[-1]["train/loss"] / torch.tensor(2.0).log().item(),
    }


def decoder_measure() -> Callable[[Path], dict[str, Any]]:
    """What measures a run's decoder on both sets of images."""
    yardstick = os.environ.get("ISIC_VQ_YARDSTICK")
    trained_on = {"derm-features": FeatureModel.from_pretrained(str(ROOT / "model_cards/isic-derm-features"))}
    other = {Path(yardstick).name: FeatureModel.from_pretrained(yardstick)} if yardstick else {}
    sets = {
        "held_out": Reference(held_out(), trained_on),
        "validation": Reference(open_validation()[0], trained_on | other),
    }

    def row(folder: Path) -> dict[str, Any]:
        tokenizer = open_tokenizer(str(folder / "model"))
        result = {}
        for name, real in sets.items():
            images = decode(tokenizer, in_batches(tokenizer.encode, real.images))
            result[name] = measure(images, real) | paired(images, real.images)
        return result

    return row


def split_codes() -> None:
    """Codes of the training files in four views, but for those of the lesions that are held out, and of 500 of these."""
    whole, folder = "runs/codes-isic-vq-128/train.parquet", ROOT / "runs/ablations/codes-priors"
    command = [sys.executable, "-m", "isic_vq", "encode", "model_cards/isic-vq-128", "--views", "4"]
    subprocess.run([*command, "--data", f"{HAM}/train-*.parquet", "-o", whole], cwd=ROOT, check=True)
    cache = read_code_cache(ROOT / whole)
    rows = {name: row for row, name in enumerate(cache.isic_ids)}
    kept_out = [
        rows[name] for name in open_part(f"{HAM}/train-*.parquet", "validation", 0.1, [])[0]["isic_id"]
    ]
    trained = sorted(set(rows.values()).difference(kept_out))
    for name, part in (("train", trained), ("held-out", kept_out[:500])):
        write_code_cache(cache.select(part), folder / f"{name}.parquet")


def prior_measure() -> Callable[[Path], dict[str, Any]]:
    """What measures a run's prior on both sets of images: bits, and its samples of the same diagnoses.

    With a row of real images: others of the same diagnoses, and these through the tokenizer.
    """
    judge = os.environ.get("ISIC_VQ_YARDSTICK")
    chooser = Yardstick.from_pretrained(str(ROOT / "model_cards/isic-derm-features"))
    validation, labels = open_validation()
    held_out_labels = read_code_cache(ROOT / "runs/ablations/codes-priors/held-out.parquet").diagnoses
    judges = [chooser, *([Yardstick.from_pretrained(judge)] if judge else [])]
    sets = {"held_out": (held_out(), held_out_labels, [chooser]), "validation": (validation, labels, judges)}
    references = {name: embedded(*parts)[0] for name, parts in sets.items()}
    tokenizer = open_tokenizer(str(SHIPPED))
    codes = {name: in_batches(tokenizer.encode, parts[0]) for name, parts in sets.items()}

    def lines(name: str, images: Tensor) -> dict[str, Any]:
        """Distances and coherence of images of the diagnoses of a set, each with its interval."""
        _, diagnoses, yardsticks = sets[name]
        seen, appearance = embedded(images, diagnoses, yardsticks)
        on = MeasuredOn(name, "ham10000")
        metrics = appearance.metrics(on, 0)
        for yardstick in yardsticks:
            metrics += distance_metrics(references[name], {"these": seen}, yardstick.name, on, 0)
        kept = ("coherence", "texture", "frechet_distance", "precision", "recall")
        return {
            " ".join([m.name, *(label for label in m.labels.values() if label != "these")]): [
                m.value,
                m.interval,
            ]
            for m in metrics
            if m.name in kept
        }

    def row(folder: Path) -> dict[str, Any]:
        if not folder.name:
            other = others(labels)
            through = decode(tokenizer, in_batches(tokenizer.encode, other))
            real = {"validation": validation, "others": other, "their reconstructions": through}
            return {name: lines("validation", images) for name, images in real.items()}
        model = IsicVQModel.from_pretrained(folder if folder == SHIPPED else folder / "model").eval()
        result = {}
        for name, (images, diagnoses, _) in sets.items():
            ids = model.label_ids(diagnoses, len(images))
            samples = torch.cat(list(generated_images(model, ids, seed=0)))
            bits = bits_per_code(model, codes[name], ids)
            result[name] = {"n": len(images), "bits_per_code": bits.mean().item(), **lines(name, samples)}
        return result

    return row


def embedded(
    images: Tensor, diagnoses: list[str], yardsticks: list[Yardstick]
) -> tuple[EmbeddedImages, Appearance]:
    """What yardsticks see in images, and how these look."""
    seen, appearance = EmbeddedImages(yardsticks), Appearance(8)
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            seen.add(part, diagnoses[start : start + BATCH])
            appearance.add(part)
    return seen, appearance


def images(name: str, limit: int) -> list[torch.Tensor]:
    """The first images of a part of HAM10000, in batches of 32."""
    records = open_source(f"{HAM}/{name}-*.parquet")
    items = DecodedImages(records, IsicVQImageProcessor(size=128))
    subset = torch.utils.data.Subset(items, range(min(limit, len(items))))
    return [batch["pixel_values"] for batch in torch.utils.data.DataLoader(subset, 32, collate_fn=collate)]


def rows_of(path: Path) -> dict[str, Any]:
    """The rows of a report so far; another process may write some, too."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}


def main() -> None:
    """Run one stage's sweep and write its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=sorted(STAGES))
    parser.add_argument(
        "--seed", type=int, help="of a stage with several: only this one, beside other processes"
    )
    arguments = parser.parse_args()
    stage = arguments.stage
    kind = STAGES[stage]["train"]
    if stage.startswith("priors"):
        split_codes()
    elif kind == "prior":
        codes = STAGES[stage]["codes"]
        one_view = f"runs/ablations/{codes}-one-view.parquet"
        command = [sys.executable, "-m", "isic_vq", "encode", f"runs/{codes.replace('codes', 'vqvae')}/model"]
        command += ["--data", f"{HAM}/train-*.parquet", "-o", one_view, "--views", "1"]
        subprocess.run(command, cwd=ROOT, check=True)  # leaves codes that are there already as they are
    row_of: Callable[[Path], dict[str, Any]] = prior_row
    if kind == "vqvae":
        row_of = partial(tokenizer_row, train=images("train", 1024), validation=images("validation", 597))
    if kind == "decoder":
        row_of = decoder_measure()
    if stage.startswith("priors"):
        row_of = prior_measure()
    path = ROOT / f"benchmarks/reports/ablations-{stage}.json"
    seeds = STAGES[stage].get("seeds")
    measured: dict[str, Callable[[], dict[str, Any]]] = {}
    if stage == "priors-start":
        measured["shipped"] = lambda: row_of(SHIPPED)
    if stage == "priors" and arguments.seed in (None, seeds[0]):
        measured["real"] = lambda: row_of(Path())
    for seed in seeds or [0]:
        if arguments.seed in (None, seed):
            for name, overrides in STAGES[stage]["runs"].items():
                title = name if seeds is None else f"{name}, seed {seed}"
                settings = [*overrides, f"loop.seed={seed}"]
                measured[title] = lambda title=title, settings=settings: row_of(run(stage, title, settings))  # type: ignore[misc]
    for title, measure_row in measured.items():
        if title in rows_of(path):
            continue  # delete its row to run it again
        row = measure_row()
        rows = rows_of(path) | {title: row}
        result = {"shared": STAGES[stage]["shared"], "rows": rows, "environment": environment()}
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
        print(title, row, flush=True)


if __name__ == "__main__":
    main()
